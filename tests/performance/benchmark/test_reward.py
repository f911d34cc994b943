"""Reward models at tiny sizes: both sides run, and score."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models import clip, image_reward, owlvit
from rlft.models.files import darknet
from rlft.performance.benchmark import ports, reward, suites
from rlft.performance.benchmark.contest import BenchmarkConfig
from rlft.types import UserError

_SMALL = {
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
}
_CLIP = clip.CLIPConfig(
  clip.CLIPTextConfig(vocab_size=50, max_position_embeddings=8, eos_token_id=2, **_SMALL),
  clip.CLIPVisionConfig(image_size=16, patch_size=8, **_SMALL),
  projection_dim=16,
)
_OWL = owlvit.OwlViTConfig(_CLIP.text_config, _CLIP.vision_config, projection_dim=16)
_BLIP = image_reward.ImageRewardConfig()
_NETWORK = darknet.Network(
  32,
  32,
  (
    darknet.Conv(4, 3, 2, 1, leaky=True, batch_norm=True),
    darknet.MaxPool(2, 1, 1),
    darknet.Conv(14, 1, 1, 0, leaky=False, batch_norm=False),
    darknet.Yolo(((4.0, 5.0), (9.0, 7.0)), 2),
  ),
)
TINY = {
  "clip-score": _CLIP,
  "aesthetic-v2": _CLIP,
  "pickscore": _CLIP,
  "hpsv2": dataclasses.replace(
    _CLIP,
    text_config=dataclasses.replace(_CLIP.text_config, hidden_act="gelu"),
    vision_config=dataclasses.replace(_CLIP.vision_config, hidden_act="gelu"),
  ),
  "image-reward": dataclasses.replace(
    _BLIP,
    vision=dataclasses.replace(_BLIP.vision, image_size=16, patch_size=8, **_SMALL),
    text=dataclasses.replace(_BLIP.text, vocab_size=50, **_SMALL),
    text_length=8,
    head_widths=(8, 4),
  ),
  "owlvit": _OWL,
  "owlv2": dataclasses.replace(_OWL, model_type="owlv2"),
  "yolov3-tiny": _NETWORK,
}


@pytest.fixture
def tiny(monkeypatch):
  tiny = {name: dataclasses.replace(port, config=TINY[name]) for name, port in ports.PORTS.items()}
  monkeypatch.setattr(reward, "PORTS", tiny)


# One of each kind; clip-score is run below.
KINDS = ["aesthetic-v2", "hpsv2", "image-reward", "owlv2", "yolov3-tiny"]


def test_every_kind_of_port_runs_beside_pytorch(tiny, tmp_path, capsys):
  config = BenchmarkConfig(
    port=",".join(reversed(KINDS)),
    batch_size=2,
    image_size=24,
    repeats=2,
    json=str(tmp_path / "new" / "times.json"),
  )
  results = {result.name: result for result in suites.run(config)}
  assert list(results) == KINDS
  for result in results.values():
    ours, theirs = result.sides["rlft"], result.sides["torch"]
    assert len(ours.seconds) == 2 and min(ours.seconds) > 0 and ours.compile_s > 0
    # The other side is there, or the note says what is missing.
    assert len(theirs.seconds) == 2 if not theirs.note else theirs.note.startswith("no ")
  heading, columns, *rows = capsys.readouterr().out.splitlines()
  assert heading.startswith("rewards: cpu (") and "2 images of 24 x 24 pixels" in heading
  assert columns.split()[:3] == ["parameters", "side", "images/s"]
  assert [row.split()[0] for row in rows] == [word for name in KINDS for word in (name, "torch")]
  stored = json.loads((tmp_path / "new" / "times.json").read_text())
  assert stored["config"]["batch_size"] == 2
  assert [row["name"] for row in stored["results"]] == KINDS
  seconds = stored["results"][0]["sides"]["rlft"]["seconds"]
  assert seconds == list(results["aesthetic-v2"].sides["rlft"].seconds)


def test_both_sides_score_finite_numbers(tiny):
  pytest.importorskip("torch")
  config = BenchmarkConfig(batch_size=2, image_size=24, dtype="bfloat16")
  with reward.contest("clip-score", config) as contest:
    for make in contest.sides.values():
      scores = np.asarray(make().run())
      assert scores.shape == (2,) and scores.dtype == np.float32
      assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_only_our_side(tiny, capsys):
  config = BenchmarkConfig(port="yolov3-tiny", image_size=24, repeats=1, sides="rlft")
  (result,) = suites.run(config)
  assert list(result.sides) == ["rlft"] and result.count == 2
  assert "torch" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("name", "parameters"),
  [("aesthetic-v2", 303_966_208 + 1 + 769), ("yolov3-tiny", 8_849_182)],
)
def test_sizes_are_the_published_ones(name, parameters):
  # CLIP's ViT-L/14 image tower with its projection has 303,966,208 in transformers; here are also
  # the logit scale and the head.
  with reward.contest(name, BenchmarkConfig(batch_size=1)) as contest:
    assert contest.parameters == parameters


def test_random_weights_are_noise():
  shapes = {
    "norm": {"scale": jax.ShapeDtypeStruct((300,), jnp.float32)},
    "kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32),
  }
  params = ports.random_params(shapes)
  assert float(params["norm"]["scale"].mean()) == pytest.approx(1, abs=0.01)
  kernel = np.asarray(params["kernel"])
  assert kernel.std() == pytest.approx(0.02, rel=0.02) and abs(kernel.mean()) < 1e-3
  assert np.linalg.matrix_rank(kernel[:64]) == 64


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"what": "reward"}, "--what=reward is not known: did you mean rewards"),
    ({"port": "clip-score,owlvitt"}, "--port=owlvitt is not known: did you mean owlvit"),
    ({"dtype": "float23"}, "--dtype=float23 is not known: did you mean float32"),
    ({"sides": "rlft,trl"}, "--sides=trl is not known: use one of rlft, torch"),
  ],
)
def test_mistakes_are_one_line(given, message):
  with pytest.raises(UserError, match=message):
    suites.run(BenchmarkConfig(**given))
