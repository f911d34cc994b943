"""The benchmark at tiny sizes: both sides run, take turns, and agree."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft.models import clip, image_reward, owlvit
from rlft.models.files import darknet
from rlft.performance.benchmark import contest as benchmark
from rlft.performance.benchmark import ports as benchmark_rewards
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
  ports = {
    name: dataclasses.replace(port, config=TINY[name])
    for name, port in benchmark_rewards.PORTS.items()
  }
  monkeypatch.setattr(benchmark_rewards, "PORTS", ports)


# One of each kind; clip-score is run below.
KINDS = ["aesthetic-v2", "hpsv2", "image-reward", "owlv2", "yolov3-tiny"]


def test_every_kind_of_port_runs_beside_pytorch(tiny, tmp_path, capsys):
  config = benchmark.BenchmarkConfig(
    port=",".join(reversed(KINDS)),
    batch_size=2,
    image_size=24,
    repeats=2,
    json=str(tmp_path / "new" / "times.json"),
  )
  results = {result.name: result for result in benchmark.run(config)}
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
  config = benchmark.BenchmarkConfig(batch_size=2, image_size=24, dtype="bfloat16")
  with benchmark_rewards.contest("clip-score", config) as contest:
    for make in contest.sides.values():
      scores = np.asarray(make().run())
      assert scores.shape == (2,) and scores.dtype == np.float32
      assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_only_our_side(tiny, capsys):
  config = benchmark.BenchmarkConfig(port="yolov3-tiny", image_size=24, repeats=1, sides="rlft")
  (result,) = benchmark.run(config)
  assert list(result.sides) == ["rlft"] and result.count == 2
  assert "torch" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("name", "parameters"),
  [("aesthetic-v2", 303_966_208 + 1 + 769), ("yolov3-tiny", 8_849_182)],
)
def test_sizes_are_the_published_ones(name, parameters):
  # CLIP's ViT-L/14 image tower with its projection has 303,966,208 in transformers; here are also
  # the logit scale and the head.
  with benchmark_rewards.contest(name, benchmark.BenchmarkConfig(batch_size=1)) as contest:
    assert contest.parameters == parameters


def test_random_weights_are_noise():
  shapes = {
    "norm": {"scale": jax.ShapeDtypeStruct((300,), jnp.float32)},
    "kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32),
  }
  params = benchmark_rewards.random_params(shapes)
  assert float(params["norm"]["scale"].mean()) == pytest.approx(1, abs=0.01)
  kernel = np.asarray(params["kernel"])
  assert kernel.std() == pytest.approx(0.02, rel=0.02) and abs(kernel.mean()) < 1e-3
  assert np.linalg.matrix_rank(kernel[:64]) == 64


def recorded(log, name):
  def make():
    log.append(f"make {name}")
    return benchmark.Side(
      lambda: log.append(name), compile_s=2.0, close=lambda: log.append(f"close {name}")
    )

  return make


def missing():
  raise benchmark.Unavailable("no c")


def measured(log, flops=0.0):
  sides = {"a": recorded(log, "a"), "c": missing, "b": recorded(log, "b")}
  contest = benchmark.Contest("x", "4 images", 4, 10**9, 5 * 10**9, sides, flops)
  ticks = []
  result = benchmark.measure(contest, dtype="float32", repeats=2, tick=ticks.append)
  assert sum(ticks) == 9  # 3 calls of each side, made or not
  return result


@pytest.mark.parametrize(
  ("memory", "expected", "note"),
  [
    (15e9, ["make a", "make b", *"ababab", "close b", "close a"], ""),
    (
      14e9,
      ["make a", *"aaa", "close a", "make b", *"bbb", "close b"],
      "one after the other, to save memory",
    ),
  ],
)
def test_sides_take_turns_if_there_is_memory(monkeypatch, memory, expected, note):
  monkeypatch.setattr(benchmark, "_memory", lambda: memory)
  log = []
  result = measured(log)
  assert log == expected and result.note == note
  assert list(result.sides) == ["a", "c", "b"]
  assert len(result.sides["a"].seconds) == len(result.sides["b"].seconds) == 2
  assert result.sides["a"].compile_s >= 2.0 and result.sides["c"].note == "no c"


def test_work_is_compared_with_matrix_products(monkeypatch):
  monkeypatch.setattr(benchmark, "_PEAK_SIZES", {"cpu": 16})
  result = measured([], flops=1e9)
  assert result.peak > 0 and set(result.sides) == {"a", "b", "c"}


def test_what_a_first_call_takes_longer_is_compilation(monkeypatch):
  clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0])  # calls of 5, 1 and 3 seconds
  monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
  sides = {"a": lambda: benchmark.Side(lambda: None, compile_s=0.5)}
  contest = benchmark.Contest("x", "", 1, 1, 1, sides)
  result = benchmark.measure(contest, dtype="float32", repeats=2, tick=lambda count: None)
  assert result.sides["a"].seconds == (1.0, 3.0)
  assert result.sides["a"].compile_s == 0.5 + 5.0 - 2.0


def test_the_table():
  timing = benchmark.Timing
  results = [
    benchmark.Result(
      "one",
      "",
      4,
      8_849_182,
      {"rlft": timing((2.0, 8.0, 4.0), 1.25), "torch": timing((1.0, 2.0, 4.0))},
      flops=6e12,
      peak=4e12,
    ),
    benchmark.Result(
      "second",
      "",
      4,
      986_109_441,
      {"rlft": timing((40.0,), 12.0), "torch": timing(note="no torch")},
    ),
  ]
  # Medians of 4 and 2 seconds for 4 images, of 1.5 and 3 TFLOP/s where 4 are possible.
  assert benchmark.table(results, "images") == (
    "        parameters  side            images/s  rlft is  GFLOP/s  of peak  compile\n"
    "one        8.849 M  rlft                   1   1.00 x     1500      38%    1.2 s\n"
    "                    torch                  2   0.50 x     3000      75%    0.0 s\n"
    "                    matrix product         -        -     4000     100%        -\n"
    "second     986.1 M  rlft                 0.1   1.00 x        -        -   12.0 s\n"
    "                    torch                  -        -        -        -        -  no torch"
  )


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
    benchmark.run(benchmark.BenchmarkConfig(**given))
