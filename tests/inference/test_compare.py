"""Runs against their base model, by the protocol."""

import dataclasses
import json

import jax
import models_cases
import numpy as np
import pytest

from rlft.config import fields, stored
from rlft.config.settings import Config, EvalConfig, PolicySettings, ScoringSettings, TaskConfig
from rlft.evaluation import results
from rlft.inference import compare as compare_lib
from rlft.inference import draw
from rlft.inference import load as finetuned
from rlft.inference import protocol as protocol_lib
from rlft.models.files import pretrained
from rlft.storage import folders
from rlft.types import UserError

_METRICS = """
def bright(images, prompts, metadata):
  return images.mean((1, 2, 3))


def dark(images, prompts, metadata):
  return images.mean((1, 2, 3, 4))


dark.is_set = dark.lower_is_better = True
"""
# How much brighter than black the base model's images are at a guidance, and a run's.
BRIGHTNESS = {1.0: 0.2, 3.0: 0.4, 5.0: 0.3}
GAIN = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compare")
  pretrained.save(folder / "model", models_cases.tiny_pipeline())
  (folder / "metrics.py").write_text(_METRICS)
  for split, animal in (("test", "dog"), ("development", "cat")):
    (folder / f"{split}.txt").write_text("\n".join(f"{animal} {i}" for i in range(8)))
  return folder


@pytest.fixture
def drawn(monkeypatch, folder):
  """Replaces models and sampling; the list gets (gain in hundredths, guidance, seed, images)."""
  log = []
  load = finetuned.load

  class Sampler:
    def __init__(self, model, policy, *, batch_size):
      self._guidance = policy.guidance_scale

    def batches(self, prompts, seed, *, weights, progress):
      gain = 0.0 if weights is None else float(jax.tree.leaves(weights.unet)[0].ravel()[0])
      log.append((round(100 * gain), self._guidance, seed, len(prompts)))
      noise = np.random.RandomState(seed).uniform(-0.05, 0.05, len(prompts))
      level = BRIGHTNESS[self._guidance] + gain + noise
      for start in range(0, len(prompts), 5):
        rows = level[start : start + 5, None, None, None]
        yield np.broadcast_to(rows, (len(rows), 16, 16, 3)).astype(np.float32)

  def load_run(path, **how):
    run = path.partition("run-")[2]
    if not run:
      return load(path, **how)
    model = load(str(folder / "model")).model
    gain = np.full((1,), GAIN + 0.01 * int(run), np.float32)
    return finetuned.Finetuned(
      dataclasses.replace(model, params={**model.params, "unet": {"a": gain}}),
      stored.from_json((folder / path.rpartition("/")[2] / "config.json").read_text()),
    )

  monkeypatch.setattr(draw, "Sampler", Sampler)
  monkeypatch.setattr(finetuned, "load", load_run)
  monkeypatch.setattr(folders, "newest", lambda directory: folders.step_of(4, 0))
  return log


def make_run(folder, seed, **changes):
  path = folder / f"run-{seed}"
  task = TaskConfig("t", "p", f"host:{folder}/metrics.py:bright", batch_size=8)
  settings = {"pretrained": str(folder / "model"), "task": (task,), "seed": seed}
  settings |= {"guidance_scale": 3.0, "sampling_steps": 2}
  path.mkdir(exist_ok=True)
  config = fields.make(Config, **(settings | changes))
  (path / "config.json").write_text(stored.to_json(config))
  return str(path)


def evals(folder, **changes):
  settings = {
    "prompts": str(folder / "test.txt"),
    "development": str(folder / "development.txt"),
    "images": 16,
    "images_per_prompt": 2,
  }
  return [
    EvalConfig(name="bright", metric=f"host:{folder}/metrics.py:bright", **(settings | changes)),
    EvalConfig(
      name="dark", metric=f"host:{folder}/metrics.py:dark", guard=True, **(settings | changes)
    ),
  ]


def settings(tmp_path, **changes):
  how = {"output": str(tmp_path / "out"), "guidance_scales": "5,1,3"}
  return protocol_lib.ProtocolSettings(**(how | changes))


def compare(paths, entries, how, **more):
  return compare_lib.compare(paths, entries, how, scoring=ScoringSettings(), **more)


def test_runs_are_compared_with_the_base_at_its_best(folder, drawn, tmp_path):
  paths = [make_run(folder, seed) for seed in (1, 0)]
  text = compare(paths, evals(folder), settings(tmp_path))
  # The base at three scales on development prompts; on test prompts at the best of `bright` (3, the
  # runs' own) and of `dark` (1); then each run. Both metrics share their images.
  assert drawn == [
    *((0, guidance, 2000, 16) for guidance in (1.0, 3.0, 5.0)),
    *((0, guidance, 2001, 16) for guidance in (1.0, 3.0)),
    *((10 + seed, 3.0, 2001, 16) for seed in (0, 1)),
  ]
  bright, dark = json.loads((tmp_path / "out" / "protocol.json").read_text())
  assert (bright["method"], bright["best_guidance"], bright["verdict"]) == ("run", 3.0, "better")
  assert bright["gain"]["mean"] == pytest.approx(GAIN + 0.005, abs=1e-6)
  assert bright["gain"]["low"] < GAIN + 0.005 < bright["gain"]["high"]
  assert bright["trained_on"] and not bright["guard"]
  # Darker is better: the guard sees the base at guidance 1, though the runs draw at 3.
  assert (dark["best_guidance"], dark["verdict"], dark["guard"]) == (1.0, "worse", True)
  assert dark["gain"]["mean"] == pytest.approx(0.2 + GAIN + 0.005, abs=1e-6)
  assert dark["same"]["mean"] == pytest.approx(dark["best"]["mean"] + 0.2, abs=1e-6)
  assert text == (tmp_path / "out" / "protocol.md").read_text()
  assert "with training seeds 0, 1." in text and "| bright (trained on) |" in text
  csv = (tmp_path / "out" / "protocol.csv").read_text().splitlines()
  assert len(csv) == 3 and csv[0].startswith("method,measure,metric,") and "gain_low" in csv[0]


def test_nothing_is_measured_twice(folder, drawn, tmp_path, capsys):
  paths, how = [make_run(folder, 2)], settings(tmp_path)
  first = compare(paths, evals(folder), how)
  assert "guidance 5, development, 16 images" in capsys.readouterr().err
  drawn.clear()
  assert compare(paths, evals(folder), how) == first
  assert drawn == [] and capsys.readouterr().err == ""
  # Another run, and another evaluation of the first: only these are measured.
  paths.append(make_run(folder, 3))
  more = dataclasses.replace(evals(folder)[0], name="more", images=8)
  compare(paths, [*evals(folder), more], how)
  assert drawn == [
    *((0, guidance, 2000, 8) for guidance in (1.0, 3.0, 5.0)),
    (0, 3.0, 2001, 8),
    (12, 3.0, 2001, 8),
    (13, 3.0, 2001, 16),
    (13, 3.0, 2001, 8),
  ]


def test_what_has_changed_is_measured_anew(folder, drawn, tmp_path, monkeypatch):
  paths, how = [make_run(folder, 4)], settings(tmp_path)
  compare(paths, evals(folder), how)
  drawn.clear()
  # The run went on.
  monkeypatch.setattr(folders, "newest", lambda directory: folders.step_of(8, 0))
  compare(paths, evals(folder), how)
  assert drawn == [(14, 3.0, 2001, 16)]
  drawn.clear()
  # The prompts of the test split are others now.
  other = tmp_path / "other.txt"
  other.write_text((folder / "test.txt").read_text().replace("dog", "owl"))
  compare(paths, evals(folder, prompts=str(other)), how)
  assert [seed for _, _, seed, _ in drawn] == [2001] * 3
  drawn.clear()
  compare(paths, evals(folder, prompts=str(other)), dataclasses.replace(how, noise_seed=7))
  assert [seed for _, _, seed, _ in drawn] == [7, 7, 7, 8, 8, 8]


def test_a_run_that_goes_on_while_it_is_loaded_is_refused(folder, drawn, tmp_path, monkeypatch):
  """Its measurements would be kept as those of the checkpoint before."""
  load = finetuned.load

  def trained_on(path, **how):
    if "run-" in path:
      monkeypatch.setattr(folders, "newest", lambda directory: folders.step_of(8, 0))
    return load(path, **how)

  monkeypatch.setattr(finetuned, "load", trained_on)
  with pytest.raises(UserError, match="run-8 has changed since this command began: give it again"):
    compare([make_run(folder, 8)], evals(folder), settings(tmp_path))
  assert not (folder / "run-8" / "measured" / "test.json").exists()


def test_a_comparison_that_was_stopped_goes_on(folder, drawn, tmp_path):
  paths, how = [make_run(folder, 5)], settings(tmp_path)
  compare(paths, evals(folder), how)
  drawn.clear()
  (tmp_path / "out" / "base" / "test-guidance-3.json").unlink()
  file = folder / "run-5" / "measured" / "test.json"
  content = json.loads(file.read_text())
  del content["results"]["dark"]
  file.write_text(json.dumps(content))
  compare(paths, evals(folder), how)
  assert drawn == [(0, 3.0, 2001, 16), (15, 3.0, 2001, 16)]
  file.write_text('{"half')
  with pytest.raises(UserError, match="holds no measurements"):
    compare(paths, evals(folder), how)


def test_a_base_model_alone(folder, drawn, tmp_path):
  how = settings(tmp_path, pretrained=str(folder / "model"))
  text = compare([], evals(folder), how, policy=PolicySettings(sampling_steps=2))
  table = text[text.index("| evaluation |") :]
  assert table.splitlines()[0] == "| evaluation | 1 | 3 | 5 | test, at the best |"
  # The same noise for all, of mean -0.0096 on development prompts.
  found = [cell.split()[0] for cell in table.splitlines()[2].strip("| ").split(" | ")]
  assert found[:4] == ["bright", "0.1904", "**0.3904", "0.2904"]
  assert [seed for _, _, seed, _ in drawn] == [2000] * 3 + [2001] * 2


def test_a_hacked_run_is_named(folder, drawn, tmp_path):
  metric = f"host:{folder}/metrics.py:bright"
  task = TaskConfig("t", "p", metric, batch_size=8, watch="oracle-both")
  shared = {"prompts": "p.txt", "images": 20}
  entries = (
    EvalConfig("up", metric=metric, **shared),
    EvalConfig("o", metric="oracle-both", **shared),
  )
  path = make_run(folder, 6, task=(task,), eval=entries)
  for iteration, change in ((0, 0), (4, 5)):
    scores = {"up": np.arange(20) + change, "o": np.arange(20) - change}
    found = {
      name: results.EvalResult(name, name, 0, 0, 0, 20, 20, of.astype(np.float32))
      for name, of in scores.items()
    }
    results.append_history(path, iteration, found)
  text = compare([path], evals(folder), settings(tmp_path))
  assert "- seed 6, task t: reward hacked: from iteration 0 to 4 the reward changed by +5" in text
  assert "training seed 6. Intervals say nothing of other seeds." in text


def test_mistakes(folder, drawn, tmp_path):
  how, path = settings(tmp_path), make_run(folder, 7)
  with pytest.raises(UserError, match="nothing to compare: give --run, or --pretrained"):
    compare([], evals(folder), how)
  with pytest.raises(UserError, match="give --eval=emoji-protocol or others"):
    compare([path], [], how)
  with pytest.raises(UserError, match="--eval=name=bright has no prompts on which .* development="):
    compare([path], evals(folder, development=""), how)
  with pytest.raises(UserError, match="--eta=0.5 has no effect: the runs say how they draw"):
    compare([path], evals(folder), how, policy=PolicySettings(eta=0.5))
  other = make_run(folder, 8, sampling_steps=3)
  with pytest.raises(UserError, match="run-8 draws with --sampling_steps=3, others with 2"):
    compare([path, other], evals(folder), how)
  with pytest.raises(UserError, match="trained from .*model and from elsewhere"):
    compare([path, make_run(folder, 8, pretrained="elsewhere")], evals(folder), how)
  for scales, said in (("1,x", "is not a number"), ("0,1", "is not above 0")):
    with pytest.raises(UserError, match=f"--guidance_scales={scales} {said}"):
      compare([path], evals(folder), settings(tmp_path, guidance_scales=scales))
