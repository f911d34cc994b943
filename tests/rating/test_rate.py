"""The whole way from folders or models to tables, and mistakes of users."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import rating_cases

from rlft.config import stored
from rlft.config.settings import Config
from rlft.inference.contenders import Contender
from rlft.rating import pictures, rate, simulate
from rlft.rating.settings import PRESETS, PageSettings, PromptSet, StudySettings, parse_set
from rlft.rating.study import Study, parse_models
from rlft.rating.votes import Votes
from rlft.storage import images
from rlft.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
BRIGHT = "def bright(images, prompts, metadata):\n  return images.mean((1, 2, 3))\n"


def test_models():
  assert parse_models(["emoji-sd", "runs/joint?guidance_scale=3&name=ours"]) == [
    Contender("emoji-sd", "emoji-sd", {}),
    Contender("ours", "runs/joint", {"guidance_scale": 3.0}),
  ]
  (one, _) = parse_models(["m.safetensors?tokenizer=folder", "other"])
  assert one.source == "m.safetensors?tokenizer=folder"


@pytest.mark.parametrize(
  ("specs", "said"),
  [
    (["a"], "1 models are given: give --models=... twice or more"),
    (["a/x", "b/x"], "two of the name x: add [?]name=..."),
    (["a", "b?name=c&guidance=3"], "unknown option guidance, did you mean guidance_scale[?]"),
    (["a", "b?eta=much"], "eta=much is not a number: give one"),
  ],
)
def test_mistakes_in_models(specs, said):
  with pytest.raises(UserError, match=said):
    parse_models(specs)


def test_sets():
  assert parse_set("emoji,count=4")[2] == PromptSet(
    "skintone", "emoji:portrait/test", 4, 6, "variety", "oracle-parity"
  )
  (one,) = parse_set("name=mine,prompts=p.txt,count=10")
  assert one == PromptSet("mine", "p.txt", 10)


@pytest.mark.parametrize(
  ("sets", "settings", "said"),
  [
    ([PromptSet("a"), PromptSet("a")], {}, "name=a: the name is taken"),
    ([PromptSet("all")], {}, "name=all: the name is taken"),
    ([PromptSet("a", ask="variety")], {}, "is about groups: add images=6"),
    ([PromptSet("a", images=2)], {}, "has 1 pictures of 'a picture of thing 0', of which set a"),
    ([PromptSet("a", count=0)], {}, "--set=name=a,...,count=0 is out of range"),
    ([], {"checks": 2.0}, "--checks=2.0 is out of range"),
  ],
)
def test_mistakes_in_settings(tmp_path, sets, settings, said):
  with pytest.raises(UserError, match=said):
    rating_cases.write_folder(tmp_path / "a", 1)
    rating_cases.write_folder(tmp_path / "b", 2)
    models = [str(tmp_path / "a"), str(tmp_path / "b")]
    study = rate.open_study(tmp_path / "out", models, sets, StudySettings(**settings))
    pictures.collect(study, batch_size=1)


def test_prompts_must_come_from_somewhere(tmp_path):
  with pytest.raises(UserError, match="there are no prompts: give --set=name=NAME,prompts=FILE"):
    rate.open_study(tmp_path / "out", ["org/one@1", "org/two@1"], [], StudySettings())
  assert rate.default_sets(parse_models(["emoji-sd", "org/two@1"])) == tuple(PRESETS["emoji"])


def test_a_comparison_goes_on_as_it_was(tmp_path):
  study = rating_cases.make_study(tmp_path)
  again = [str(tmp_path / name) for name in ("base", "tuned")]
  sets = [PromptSet("things")]
  assert Study.load(study.directory) == study
  assert rate.open_study(study.directory, [], [], StudySettings()) == study
  assert rate.open_study(study.directory, again, sets, StudySettings()) == study
  for models, other, settings, said in (
    (again, sets, {"ties": False}, "with ties=True in the place of ties=False among its settings"),
    (again, [PromptSet("other")], {}, "with name=things in the place of name=other among its sets"),
    (
      again[::-1],
      sets,
      {},
      "with name=base, source=.*base in the place of name=tuned.* among its contenders",
    ),
    ([], [], {"seed": 3}, "whose prompts and settings are fixed: give --output alone"),
  ):
    with pytest.raises(UserError, match=said):
      rate.open_study(study.directory, models, other, StudySettings(**settings))


def test_pictures_keep_their_pixels_and_nothing_else(tmp_path):
  rating_cases.write_folder(tmp_path / "a", 10, prompts=["x"])
  rating_cases.write_folder(tmp_path / "b", 20, prompts=["x"])
  picture = PIL.Image.fromarray(np.full((4, 6, 3), 99, np.uint8))
  exif = PIL.Image.Exif()
  exif[0x0110] = "model of mine"
  picture.save(tmp_path / "b" / "0-0.jpg", quality=100, exif=exif)
  rating_cases.write_listing(tmp_path / "b", [{"file_name": "0-0.jpg", "text": "x"}])
  models = [str(tmp_path / "a"), str(tmp_path / "b")]
  study = rate.open_study(tmp_path / "out", models, [], StudySettings())
  pictures.collect(study, batch_size=1)
  copied = study.picture(0, 1, 0)
  assert b"model of mine" not in copied.read_bytes()
  assert pictures.read([copied]).shape == (1, 4, 6, 3)


@pytest.mark.parametrize(
  "name", ["../secret.png", "/etc/passwd", "inside/../../secret.png", "link"]
)
def test_a_list_names_nothing_outside_of_its_folder(tmp_path, name):
  images.save_png(tmp_path / "secret.png", np.zeros((4, 4, 3), np.uint8))
  for folder in ("a", "b"):
    rating_cases.write_folder(tmp_path / folder, 1, prompts=["x"])
  (tmp_path / "b" / "link").symlink_to(tmp_path / "secret.png")
  rating_cases.write_listing(tmp_path / "b", [{"file_name": name, "text": "x"}])
  models = [str(tmp_path / "a"), str(tmp_path / "b")]
  with pytest.raises(UserError, match="which is outside: remove its line"):
    rate.open_study(tmp_path / "out", models, [], StudySettings())


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("bare", r"bare has pictures and no metadata.jsonl: add one, with a line \{\"file_name\": "),
    ("typo", "typo is not a directory: give a Stable Diffusion model"),
    ("moved", "the base model of the run in .*moved: .*gone is not a directory.*--pretrained"),
    ("other", r"other has 0 pictures of 'x', of which set pictures needs 1: add them"),
  ],
)
def test_what_is_missing_is_found_before_anything_is_written(tmp_path, name, said):
  """Or else the command, put right, would be one of another comparison."""
  rating_cases.write_folder(tmp_path / "a", 1, prompts=["x"])
  rating_cases.write_folder(tmp_path / "other", 1, prompts=["y"])
  rating_cases.write_folder(tmp_path / "bare", 1, prompts=["x"])
  (tmp_path / "bare" / "metadata.jsonl").unlink()
  checkpoint = tmp_path / "moved" / "checkpoints" / "00000001"
  checkpoint.mkdir(parents=True)
  config = dataclasses.replace(Config(), pretrained=str(tmp_path / "gone"))
  (tmp_path / "moved" / "config.json").write_text(stored.to_json(config))
  models = [str(tmp_path / "a"), "emoji-sd", str(tmp_path / name)]
  with pytest.raises(UserError, match=said):
    rate.open_study(tmp_path / "out", models, [], StudySettings())
  assert not (tmp_path / "out").exists()


def test_a_model_that_comes_with_pictures_is_a_model(tmp_path):
  """Published models have some beside their card."""
  rating_cases.write_folder(tmp_path / "a", 1, prompts=["x"])
  rating_cases.write_folder(tmp_path / "model", 1, prompts=["x"])
  (tmp_path / "model" / "metadata.jsonl").unlink()
  (tmp_path / "model" / "model_index.json").write_text("{}")
  models = [str(tmp_path / "a"), str(tmp_path / "model")]
  study = rate.open_study(tmp_path / "out", models, [], StudySettings())
  assert Study.load(tmp_path / "out") == study


def test_a_picture_that_is_none(tmp_path):
  for folder in ("a", "b"):
    rating_cases.write_folder(tmp_path / folder, 1, prompts=["x"])
  (tmp_path / "b" / "0-0.png").write_text("<svg onload=alert(1)>")
  models = [str(tmp_path / "a"), str(tmp_path / "b")]
  with pytest.raises(UserError, match=r"b/0-0.png cannot be decoded .*: replace it"):
    rate.open_study(tmp_path / "out", models, [], StudySettings())
  assert not (tmp_path / "out").exists()


def test_a_comparison_of_which_nothing_was_made_is_replaced(tmp_path):
  """For a mistake that only the drawing found, and that is mended."""
  for folder in ("a", "b"):
    rating_cases.write_folder(tmp_path / folder, 1, prompts=["x"])
  models, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out"
  study = rate.open_study(out, models, [PromptSet("wrong")], StudySettings())
  study.picture(0, 0, 0).parent.mkdir()
  (study.picture(0, 0, 0).parent / "from-1.json").write_text("null\n")  # It came as far as that.
  study = rate.open_study(out, models, [PromptSet("right")], StudySettings())
  pictures.collect(study, batch_size=1)
  with pytest.raises(UserError, match="holds another comparison"):
    rate.open_study(out, models, [PromptSet("wrong")], StudySettings())


def test_pictures_that_have_changed_are_not_compared_in_silence(tmp_path, capsys):
  study = rating_cases.make_study(tmp_path, prompts=["x", "y"])
  pictures.collect(study, batch_size=1)
  assert "has changed" not in capsys.readouterr().err
  images.save_png(tmp_path / "tuned" / "0-0.png", np.zeros((9, 9, 3), np.uint8))
  pictures.collect(study, batch_size=1)
  assert capsys.readouterr().err.endswith(
    "tuned has changed since its pictures were made; it is they that are compared\n"
  )
  assert pictures.read([study.picture(0, 1, 0)]).shape == (1, 8, 8, 3)
  study.picture(1, 1, 0).unlink()
  with pytest.raises(UserError, match="tuned has changed since some of its .*: give another --out"):
    pictures.collect(study, batch_size=1)
  # What is whole no longer needs what it was made from.
  shutil.rmtree(tmp_path / "base")
  study.picture(1, 1, 0).write_bytes(study.picture(0, 1, 0).read_bytes())
  rate.open_study(study.directory, [], [], StudySettings())


@pytest.mark.parametrize(
  ("options", "settings", "page", "said"),
  [
    ("?lora=/none.safetensors", {}, {}, "lora has no effect on a folder of pictures: leave it out"),
    ("", {"image_size": "7"}, {}, "--image_size has no effect on folders of pictures"),
    ("", {"guidance_scale": 3.0}, {}, "--guidance_scale has no effect on folders of pictures"),
    ("", {}, {"output": ""}, "--output is empty: give the directory of the comparison"),
    ("", {}, {"simulate": 2, "results": True}, "--results has no effect with --simulate"),
    ("", {}, {"address": "http://[::1"}, r"--address=http://\[::1 is no address of a server"),
    ("", {}, {"address": "http://x:99999"}, "--address=http://x:99999 is no address of a server"),
    ("", {}, {"simulate": 2}, "--set=name=p: oracle=nosuch: .*"),
  ],
)
def test_what_has_no_effect_or_cannot_be_is_said_first(tmp_path, options, settings, page, said):
  for folder in ("a", "b"):
    rating_cases.write_folder(tmp_path / folder, 1, prompts=["x"])
  models, out = [str(tmp_path / "a"), f"{tmp_path}/b{options}"], str(tmp_path / "out")
  with pytest.raises(UserError, match=said):
    sets = [PromptSet("p", oracle="nosuch")]
    rate.rate(models, sets, StudySettings(**settings), PageSettings(**{"output": out, **page}))
  assert not list(tmp_path.glob("out/pictures/*"))


def test_oracles_need_pictures_of_one_size(tmp_path):
  rating_cases.write_folder(tmp_path / "a", 1, prompts=["x", "y"])
  images.save_png(tmp_path / "a" / "1-0.png", np.zeros((4, 6, 3), np.uint8))
  with pytest.raises(UserError, match=r"pictures of 8x8 and 4x6 \(.*1-0.png\) cannot be scored"):
    pictures.read([tmp_path / "a" / "0-0.png", tmp_path / "a" / "1-0.png"])


def simulated(study, *, noise, count=5):
  """Votes of simulated raters who like bright pictures."""
  votes = Votes(study.directory / "s.sqlite", rating_cases.make_plan(study, raters=count))
  simulate.rate(study, votes, count=count, noise=noise)
  answered = votes.answered()
  votes.close()
  return answered


def test_simulated_raters_follow_the_oracle_with_noise(tmp_path, monkeypatch):
  study = rating_cases.make_study(tmp_path, checks=0.5)
  # The first four prompts are better of the first model; nothing is known of the last.
  gap = np.array([1.0, 1, 1, 1, -1, -1, -1, np.nan])
  monkeypatch.setattr(simulate, "scores", lambda _: np.stack([gap, 0 * gap], axis=1))
  votes = simulated(study, noise=1e-3)
  assert len(votes) == 5 * (8 + 4)
  assert all(vote.value == (0 if vote.pair < 4 else 1) for vote in votes if vote.pair < 7)
  assert {vote.answer for vote in votes if vote.pair == 7} == {"tie"}
  (tmp_path / "study" / "s.sqlite").unlink()
  noisy = [vote.value for vote in simulated(study, noise=100.0) if vote.pair < 4]
  assert 0.2 < np.mean(noisy) < 0.8


@pytest.mark.parametrize("ties", [True, False])
def test_simulated_raters_where_the_oracle_sees_no_difference(tmp_path, monkeypatch, ties):
  study = rating_cases.make_study(tmp_path, checks=0.0, ties=ties)
  equal = np.array([0.3] * 6 + [0.1, 0.2])
  monkeypatch.setattr(simulate, "scores", lambda _: np.stack([equal, np.full(8, 0.3)], axis=1))
  values = [vote.value for vote in simulated(study, noise=1e-3) if vote.pair < 6]
  assert len(values) == 30
  assert set(values) == ({0.5} if ties else {0.0, 1.0})


def test_simulated_raters_begin_anew(tmp_path, monkeypatch):
  """Another noise would be without effect on answers that are there."""
  study = rating_cases.make_study(tmp_path, checks=0.0)
  monkeypatch.setattr(simulate, "scores", lambda _: np.stack([np.ones(8), np.zeros(8)], axis=1))
  monkeypatch.setattr(simulate, "oracles", lambda _: [])

  def preferred(noise):
    page = PageSettings(output=str(study.directory), simulate=5, noise=noise)
    rate.rate([], [], StudySettings(), page)
    return json.loads((study.directory / "simulated.json").read_text())["rates"][0]["rate"]

  assert preferred(1e-3) == 0
  assert preferred(100.0) > 0.2
  assert preferred(1e-3) == 0


def test_from_folders_to_tables_by_simulated_raters(tmp_path):
  """The launch script, in a process of its own, with an oracle from a file."""
  for name in ("base", "tuned"):
    rating_cases.write_folder(tmp_path / name, rating_cases.BRIGHTNESS[name], images_per_prompt=6)
  (tmp_path / "bright.py").write_text(BRIGHT)
  done = subprocess.run(
    [
      sys.executable,
      ROOT / "launch" / "rate.py",
      "--models=base",
      "--models=tuned",
      "--set=name=one,oracle=host:bright.py:bright",
      "--set=name=six,images=6,count=4,oracle=host:bright.py:bright",
      "--simulate=5",
      "--noise=0.001",
      "--output=out",
    ],
    cwd=tmp_path,
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert "tuned is preferred to base in 100.0 % of 60 votes" in done.stdout
  assert "wrote out/simulated.md, .json, .csv and -votes.csv" in done.stdout
  assert "5 simulated raters compare 12 pairs" in done.stderr
  found = json.loads((tmp_path / "out" / "simulated.json").read_text())
  assert [(row["set"], row["wins"]) for row in found["rates"]] == [
    ("one", 40),
    ("six", 20),
    ("all", 60),
  ]
  assert {rater["consistent"] for rater in found["raters"]} == {1.0}


def test_what_is_missing_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(rate, "_NEEDED", ("starlette", "rlft_none"))
  with pytest.raises(UserError, match=r"needs rlft_none: pip install 'rlft\[rating\]'"):
    rate.rate([], [], StudySettings(), PageSettings(output=str(tmp_path)))
