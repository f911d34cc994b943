"""Suites on several models: small random ones, with small random reward networks."""

import json
import os
import shutil

import clip_reward_cases
import numpy as np
import PIL.Image
import pytest
import train_cases

from rlft.config import fields, stored
from rlft.config.settings import Config, ScoringSettings, TaskConfig
from rlft.emoji import detector
from rlft.inference import draw
from rlft.inference import load as finetuned
from rlft.inference import suites as suites_lib
from rlft.inference.draw import Drawing
from rlft.inference.suites import SuiteSettings
from rlft.models.files import pretrained
from rlft.storage import folders
from rlft.types import UserError

_METRICS = """
def bright(images, prompts, metadata):
  return images.mean((1, 2, 3))
"""
# How much brighter than black a model's images are at a guidance.
BRIGHTNESS = {1.0: 0.2, 2.0: 0.3, 3.0: 0.4}
GAIN = 0.1  # of the second model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Models `a` and `b`, prompts, real pictures, a metric, and weights under their usual names."""
  folder = tmp_path_factory.mktemp("suites")
  for name in "ab":
    pretrained.save(folder / name, train_cases.tiny_model())
  (folder / "metrics.py").write_text(_METRICS)
  rows = ["Prompts\tCategory", *(f"a {x} {i}\t{x}" for i in range(4) for x in ("dog", "cat"))]
  (folder / "test.tsv").write_text("\n".join(rows))
  (folder / "development.txt").write_text("\n".join(f"an owl {i}" for i in range(4)))
  (folder / "made").mkdir()
  clip_reward_cases.write(folder / "made")
  weights = folder / "weights"
  weights.mkdir()
  (folder / "made" / "hf").rename(weights / "clip-vit-large-patch14")
  (folder / "made" / "hps").rename(weights / "HPSv2")
  (folder / "made" / "v2.pth").rename(weights / "sac+logos+ava1-l14-linearMSE.pth")
  (folder / "real" / "more").mkdir(parents=True)
  for i, pixels in enumerate(np.random.RandomState(1).randint(0, 256, (4, 20, 24, 3), np.uint8)):
    path = folder / "real" / ("more" if i % 2 else "") / f"{i}.png"
    PIL.Image.fromarray(pixels).save(path)
  return folder


@pytest.fixture
def drawn(monkeypatch):
  """Replaces sampling; the list gets (guidance, seed, images) of each."""
  log = []

  class Sampler:
    def __init__(self, model, policy, *, batch_size):
      self._guidance = policy.guidance_scale

    def batches(self, prompts, seed, *, weights, progress):
      log.append((self._guidance, seed, len(prompts)))
      level = BRIGHTNESS[self._guidance % 10] + GAIN * (self._guidance > 10)
      noise = np.random.RandomState(seed).uniform(-0.1, 0.1, (len(prompts), 16, 16, 3))
      yield from np.split((level + noise).astype(np.float32), 2)

  monkeypatch.setattr(draw, "Sampler", Sampler)
  return log


def run(folder, output, suite, *models, weights=False, weights_dir="", sweep="", **how):
  """Model `b` draws at guidance 13 what `a` draws at 3, but brighter."""
  settings = SuiteSettings(suite, str(folder / "weights") if weights else weights_dir, sweep)
  models = models or (f"{folder}/a", f"{folder}/b?guidance_scale=13")
  drawing = Drawing("", **{"sampling_steps": 2, "guidance_scale": 3.0, **how})
  return suites_lib.run(models, settings, drawing, scoring=ScoringSettings(60.0, 2), output=output)


def bright(folder):
  return f"standard?prompts={folder}/test.tsv?column=Prompts&metric=host:{folder}/metrics.py:bright"


def rows(output):
  content = json.loads((output / "eval.json").read_text())
  return content, {row["name"]: row for row in content["evaluations"]}


def test_a_suite_of_reward_networks(folder, drawn, tmp_path, capsys):
  said = run(folder, tmp_path, f"{bright(folder)}&images_per_prompt=2", weights=True)
  # Both models draw the same prompts from the same noise, once for all metrics.
  assert drawn == [(3.0, 2001, 16), (13.0, 2001, 16)]
  errors = capsys.readouterr().err
  assert "image-reward is left out: no ImageReward.pt or ImageReward\n" in errors
  assert "pickscore is left out: no PickScore_v1\n" in errors
  content, found = rows(tmp_path)
  assert list(found) == ["hpsv2.1", "clip-score", "aesthetic", "metrics.py:bright"]
  row = found["metrics.py:bright"]
  first, second = row["cells"]
  assert (first["model"], first["guidance"], first["change"]) == ("a", 3.0, None)
  assert (second["model"], second["guidance"], second["verdict"]) == ("b", 13.0, "better")
  # The same noise for both: the change is exact, and its interval has no width.
  for key in ("mean", "low", "high"):
    assert second["change"][key] == pytest.approx(GAIN, abs=1e-6)
  assert first["mean"]["mean"] == pytest.approx(0.4, abs=0.01)
  assert first["mean"]["low"] < first["mean"]["mean"] < first["mean"]["high"]
  assert {part: count for part, (count, _) in row["parts"].items()} == {"dog": 4, "cat": 4}
  assert np.isfinite(
    [cell["mean"]["mean"] for one in found.values() for cell in one["cells"]]
  ).all()
  assert [model["guidance_scale"] for model in content["models"]] == [3.0, 13.0]
  table = said.splitlines()
  assert table[0].startswith("| evaluation | model | mean | change from a [95%] |")
  assert len(table) > 2 + 8 and "metrics.py:bright, in parts:" in table
  page = (tmp_path / "suite.html").read_text()
  assert page.count("data:image/png;base64,") == 2 * 8 and "a dog 0, b" in page
  assert "image-reward is left out" in page


def test_nothing_is_measured_twice_and_what_has_changed_is(folder, drawn, tmp_path):
  suite = (
    f"standard?prompts={folder}/test.tsv?column=Prompts&metric=host:{folder}/metrics.py:bright"
  )
  first = run(folder, tmp_path, suite)
  page = (tmp_path / "suite.html").read_text()
  drawn.clear()
  assert run(folder, tmp_path, suite) == first and drawn == []
  assert (tmp_path / "suite.html").read_text() == page
  # Stopped between two models.
  (tmp_path / "b" / "test-guidance-13.json").unlink()
  run(folder, tmp_path, suite)
  assert drawn == [(13.0, 2001, 8)]
  drawn.clear()
  run(folder, tmp_path, suite, f"{folder}/a", f"{folder}/b?guidance_scale=12")
  assert drawn == [(12.0, 2001, 8)]
  drawn.clear()
  run(folder, tmp_path, suite, seed=7)
  assert drawn == [(3.0, 8, 8), (13.0, 8, 8)]
  drawn.clear()
  metric = folder / "metrics.py"
  os.utime(metric, ns=(0, 0))  # As if it had been edited.
  run(folder, tmp_path, suite, seed=7)
  assert drawn == [(3.0, 8, 8), (13.0, 8, 8)]


def test_a_sweep_names_each_models_best_guidance(folder, drawn, tmp_path):
  suite = f"{bright(folder)}&development={folder}/development.txt"
  said = run(
    folder, tmp_path, suite, f"{folder}/a", f"{folder}/b", sweep="2,1,3", guidance_scale=None
  )
  # As many images as of the test prompts: after the last development prompt the first comes again.
  of_model = [(1.0, 2000, 8), (2.0, 2000, 8), (3.0, 2000, 8), (3.0, 2001, 8)]
  assert drawn == of_model * 2
  content, found = rows(tmp_path)
  assert [cell["guidance"] for cell in found["metrics.py:bright"]["cells"]] == [3.0, 3.0]
  assert list(content["sweeps"]["b"]) == ["1", "2", "3"]
  assert "guidance_scale" not in content["models"][0] and content["models"][0]["seed"] == 2001
  assert "b by guidance, on development prompts:" in said and "**0.4" in said
  with pytest.raises(UserError, match="needs prompts on which to choose, of the same kind as"):
    bare = suite.partition("&dev")[0]
    run(folder, tmp_path, bare, f"{folder}/a", sweep="1,2", guidance_scale=None)
  with pytest.raises(UserError, match="--guidance_scale has no effect with --guidance_sweep"):
    run(folder, tmp_path, suite, f"{folder}/a", sweep="1,2")
  with pytest.raises(UserError, match="b: guidance_scale has no effect with --guidance_sweep"):
    run(folder, tmp_path, suite, sweep="1,2", guidance_scale=None)


def test_a_run_beside_its_base(folder, drawn, tmp_path, monkeypatch):
  metric = f"host:{folder}/metrics.py:bright"
  task = TaskConfig("t", "p", metric, batch_size=8)
  config = fields.make(
    Config, pretrained=f"{folder}/moved", task=(task,), guidance_scale=2.0, sampling_steps=3
  )
  workdir = tmp_path / "run"
  (workdir / "checkpoints").mkdir(parents=True)
  (workdir / "config.json").write_text(stored.to_json(config))
  load, newest = finetuned.load, [folders.step_of(1, 0)]
  monkeypatch.setattr(folders, "newest", lambda directory: newest[0])
  monkeypatch.setattr(finetuned, "load", lambda path, **how: load(f"{folder}/a"))
  models, output = (f"{folder}/a", str(workdir)), tmp_path / "out"
  how = {"guidance_scale": None, "sampling_steps": None}
  with pytest.raises(
    UserError, match="the base model of the run in .*moved.*if it has moved, give"
  ):
    run(folder, output, bright(folder), *models, **how)
  assert drawn == []
  how["pretrained"] = f"{folder}/b"
  said = run(folder, output, bright(folder), *models, **how)
  # The base draws as the run was trained to.
  assert drawn == [(2.0, 2001, 8)] * 2
  content, found = rows(output)
  assert (
    found["metrics.py:bright"]["trained_on"] == ["run"] and "bright (trained on) | run |" in said
  )
  assert [model["sampling_steps"] for model in content["models"]] == [3, 3]
  # Only what has been trained further is measured again.
  drawn.clear()
  newest[0] = folders.step_of(2, 0)
  run(folder, output, bright(folder), *models, **how)
  assert drawn == [(2.0, 2001, 8)]


def test_distances_to_real_pictures(folder, drawn, tmp_path):
  suite = f"distance?prompts={folder}/test.tsv?column=Prompts&real={folder}/real"
  run(folder, tmp_path, suite, weights=True)
  _, found = rows(tmp_path)
  assert list(found) == ["cmmd", "kid"]
  for row in found.values():
    assert row["lower_is_better"] and row["images"] == 8
    assert all(np.isfinite(cell["mean"]["low"]) for cell in row["cells"])
  with pytest.raises(UserError, match="no folder: give one of real pictures"):
    run(folder, tmp_path, suite.replace("/real", "/unreal"), weights=True)


def test_sets_and_the_share_of_found_skin(folder, drawn, tmp_path):
  suite = f"fairness?prompts={folder}/test.tsv?column=Prompts&images_per_prompt=4&finder=skin"
  said = run(folder, tmp_path, f"{suite}&by=Category")
  _, found = rows(tmp_path)
  assert list(found) == ["parity", "skin found"]
  # Both metrics look at the same images. What has the colour of skin in noise has one tone.
  cell, share = (found[name]["cells"][0] for name in ("parity", "skin found"))
  assert cell["mean"]["mean"] == pytest.approx(-(0.75**0.5))
  assert share["mean"]["mean"] == pytest.approx(cell["found"], abs=1e-6)
  assert f"found in {cell['found']:.1%}" in said
  assert "Parity leaves images without skin out" in said
  assert list(found["skin found"]["parts"]) == ["dog", "cat"]


@pytest.mark.parametrize(
  ("suite", "models", "message"),
  [
    ("standrad", [], "--suite=standrad is not known: did you mean standard"),
    ("standard", [], r"suite 'standard': add \?prompts=..."),
    ("geneval?prompts=p&what=2", [], "suite .*: unknown option 'what'"),
    ("emoji", ["a", "x/a"], "there are two of the name a: add"),
    ("emoji", ["a?name=b/c"], "the name b/c is no name of a directory: give another"),
    ("emoji", ["a?guidance=3&eta=1"], "unknown option guidance, did you mean guidance_scale"),
    ("diversity?prompts={0}/development.txt", [], "has no metric without --weights_dir .vendi is"),
    ("emoji", ["{0}/a?lora={0}/none.safetensors"], "none.safetensors"),
    ("composition?images_per_prompt=0&metric=m", [], "images_per_prompt must be 1 or more"),
  ],
)
def test_mistakes(folder, tmp_path, suite, models, message):
  with pytest.raises(UserError, match=message) as error:
    run(folder, tmp_path, suite.format(folder), *(model.format(folder) for model in models))
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="--suite writes a directory: give --output=runs/NAME"):
    run(folder, None, "emoji")


def test_a_directory_that_cannot_be_is_said_before_anything_is_drawn(folder, drawn, tmp_path):
  suite = f"standard?prompts={folder}/test.tsv?column=Prompts&metric=jpeg"
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file cannot be written to"):
    run(folder, tmp_path / "file", suite)
  with pytest.raises(UserError, match="--weights_dir=.*none is not a directory: correct it"):
    run(folder, tmp_path, suite, weights_dir=str(tmp_path / "none"))
  assert drawn == []


def test_every_suite_from_prompts_to_tables(folder, tmp_path):
  """Nothing is replaced: a model draws, reward networks score, both small and random."""
  owl = tmp_path / "owl" / "owlv2-base-patch16-ensemble"
  shutil.copytree(detector.DIRECTORY, owl)
  shutil.copytree(detector.TOKENIZER, owl, dirs_exist_ok=True)
  asked = {"prompt": "two dogs", "tag": "counting", "exclude": []}
  asked["include"] = [{"class": "dog", "count": 2}]
  (folder / "geneval.jsonl").write_text(json.dumps(asked))
  prompts, few = f"{folder}/test.tsv?column=Prompts", f"{folder}/development.txt"
  bright = f"metric=host:{folder}/metrics.py:bright"
  a, b, weights = f"{folder}/a", f"{folder}/b", str(folder / "weights")
  for suite, models, weights_dir, names in (
    (f"standard?prompts={prompts}", [a, b], weights, ["hpsv2.1", "clip-score", "aesthetic"]),
    (f"composition?seen={few}&unseen={few}&{bright}", [a], "", ["metrics.py:bright seen"]),
    (f"diversity?prompts={few}&images_per_prompt=2", [a], weights, ["vendi", "clip-distance"]),
    (f"geneval?prompts={folder}/geneval.jsonl", [a], str(tmp_path / "owl"), ["GenEval-OWL"]),
  ):
    output, settings = tmp_path / suite.partition("?")[0], SuiteSettings(suite, weights_dir)
    drawing = Drawing("", sampling_steps=2, guidance_scale=3.0)
    said = suites_lib.run(models, settings, drawing, scoring=ScoringSettings(), output=output)
    _, found = rows(output)
    assert set(names) <= found.keys(), (suite, list(found))
    for row in found.values():
      assert len(row["cells"]) == len(models) and row["name"] in said
      assert all(np.isfinite(cell["mean"]["mean"]) for cell in row["cells"]), row
    # The two models are the same, and so are the noise and what is said of it.
    if len(models) == 2:
      assert all(row["cells"][1]["change"]["mean"] == 0 for row in found.values())
    assert (output / "suite.html").exists()
