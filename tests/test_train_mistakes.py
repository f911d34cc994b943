"""What goes wrong in a run says so in one line, and nothing is lost."""

import contextlib
import dataclasses
import logging
import pathlib
import re
import resource
import shutil

import jax
import numpy as np
import pytest
import train_cases as cases

from rlft.config import fields
from rlft.config.settings import EvalConfig
from rlft.models.files import pretrained
from rlft.run.open import open_run
from rlft.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


@contextlib.contextmanager
def one_line(match):
  with pytest.raises(UserError, match=match) as error:
    yield
  assert "\n" not in str(error.value)


def config(folder, tmp_path, **changes):
  """A run in `tmp_path / 'run'`; its second reward has mistakes when BROKEN says so."""
  # A copy, for its own count of calls.
  rewards = shutil.copy(folder / "rewards.py", tmp_path)
  tasks = cases.task(folder), cases.task(folder, "green", "host:green", rewards)
  return cases.config(folder, tmp_path / "run", **({"task": tasks, "iterations": 3} | changes))


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("raises", r"task green, .*: reward=.*:green raised ValueError: no luck \(.*rewards.py:\d+\)"),
    ("nan", "task green, iteration 1: 100% of the images .* more than --max_nan_share=0.1"),
  ],
)
def test_a_reward_fails_in_the_middle(folder, tmp_path, monkeypatch, how, message):
  settings = config(folder, tmp_path)
  monkeypatch.setenv("BROKEN", f"{how}@2")
  with one_line(message):
    cases.run(settings)
  assert [line["iteration"] for line in cases.metrics(tmp_path / "run")] == [0]
  # The same command, with the reward mended.
  monkeypatch.delenv("BROKEN")
  cases.run(settings)
  cases.assert_same_run(tmp_path / "run", cases.uninterrupted(folder))


def test_an_image_cannot_be_read_in_the_middle(folder, tmp_path):
  pairs = shutil.copytree(folder / "pairs", tmp_path / "pairs")
  settings = config(folder, tmp_path, pretrain_data=str(pairs))
  cases.run(fields.replace(settings, iterations=1))
  for path in pairs.glob("*.png"):
    path.rename(path.with_suffix(".away"))
    path.write_bytes(b"damaged")
  with one_line(r"image .*\.png cannot be decoded .*: replace it or remove its line"):
    cases.run(settings)
  # Both tasks of the second iteration are done.
  assert (tmp_path / "run" / "checkpoints" / "iteration_1_task_2").is_dir()
  for path in pairs.glob("*.away"):
    path.rename(path.with_suffix(".png"))
  cases.run(settings)
  cases.assert_same_run(tmp_path / "run", cases.uninterrupted(folder))


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("raises", "raised ValueError: no luck"),
    (
      "nan",
      "--eval=name=green: metric=.* none of the 8 images after iteration 3: .*measures again",
    ),
  ],
)
def test_an_evaluation_fails_after_the_last_iteration(folder, tmp_path, monkeypatch, how, message):
  settings = config(folder, tmp_path, task=(cases.task(folder),), pretrain_weight=0.0)
  metric = f"host:{tmp_path / 'rewards.py'}:green"
  evals = (EvalConfig("green", str(folder / "prompts.txt"), metric, images=8),)
  settings = fields.replace(settings, eval=evals)
  monkeypatch.setenv("BROKEN", f"{how}@2")
  with one_line(message):
    cases.run(settings)
  monkeypatch.delenv("BROKEN")
  trained = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert len(cases.metrics(tmp_path / "run")) == 3
  cases.run(settings)
  # Only the evaluation was done again.
  assert (tmp_path / "run" / "metrics.jsonl").read_text() == trained
  assert (tmp_path / "run" / "eval.json").exists()


def test_a_full_disk(folder, tmp_path):
  cases.run(config(folder, tmp_path, iterations=1))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # More than the metrics need, and less than a checkpoint. In a process of its own, with which the
  # threads of the save that fails end, too.
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
  try:
    process = cases.start(config(folder, tmp_path, iterations=2))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  _, said = process.communicate(timeout=300)
  assert process.returncode == 2 and "Traceback" not in said
  assert re.search(
    "error: checkpoint iteration_2 could not .* earlier checkpoints are intact", said
  )
  cases.run(config(folder, tmp_path))
  cases.assert_same_run(tmp_path / "run", cases.uninterrupted(folder))


def test_a_half_written_checkpoint(folder, tmp_path, caplog):
  for iterations in (1, 2):
    cases.run(config(folder, tmp_path, iterations=iterations))
  checkpoints = tmp_path / "run" / "checkpoints"
  for path in (checkpoints / "iteration_2" / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:1000])
  shutil.copytree(checkpoints / "iteration_1", checkpoints / "iteration_3.orbax-checkpoint-tmp")
  with caplog.at_level(logging.WARNING, "rlft"):
    cases.run(config(folder, tmp_path))
  assert "moved to iteration_2.unreadable" in caplog.text and "at iteration 1" in caplog.text
  expected = ["iteration_1", "iteration_2.unreadable", "iteration_3"]
  assert sorted(path.name for path in checkpoints.iterdir()) == expected
  cases.assert_same_run(tmp_path / "run", cases.uninterrupted(folder))


@pytest.fixture
def trained(folder, tmp_path):
  """The settings of a run of one iteration, which leaves a checkpoint."""
  prompts = shutil.copy(folder / "prompts.txt", tmp_path)
  task = cases.task(folder, prompts=prompts)
  settings = config(folder, tmp_path, task=(task,), pretrain_weight=0.0, iterations=1)
  cases.run(settings)
  return settings


def test_a_checkpoint_of_another_model_or_other_prompts(tmp_path, trained):
  before = cases.final_state(tmp_path / "run"), (tmp_path / "run" / "config.json").read_text()
  other = tmp_path / "other"
  pretrained.save(other, cases.tiny_model(seed=3))
  with one_line("checkpoint .* was trained from another base model .*: give that model, or a new"):
    cases.run(fields.replace(trained, pretrained=str(other)))
  for message, changes in (
    ("seed: 0 -> 1; guidance_scale: 2.0 -> 3.0", {"seed": 1, "guidance_scale": 3.0}),
    ("lora_rank: 0 -> 2", {"lora_rank": 2}),  # Said before the shapes differ.
  ):
    with one_line(rf"other settings \({message}\): give the old ones"):
      cases.run(fields.replace(trained, **changes))
  with open(tmp_path / "prompts.txt", "a") as file:
    file.write("\na prompt more")
  with one_line(
    "pictures of .*prompts.txt are not those that the run in .* began with: put them back"
  ):
    cases.run(trained)
  after = cases.final_state(tmp_path / "run"), (tmp_path / "run" / "config.json").read_text()
  assert after[1] == before[1]
  jax.tree.map(np.testing.assert_array_equal, after[0], before[0])


def test_other_pictures_than_the_run_began_with(folder, tmp_path):
  pairs = pathlib.Path(shutil.copytree(folder / "pairs", tmp_path / "pairs"))
  settings = config(folder, tmp_path, pretrain_data=str(pairs), iterations=1)
  cases.run(settings)
  listing = pairs / "metadata.jsonl"
  listing.write_text("\n".join(reversed(listing.read_text().splitlines())))
  with one_line("pictures of --pretrain_data=.*pairs are not those that the run in"):
    cases.run(fields.replace(settings, iterations=2))


def test_prompt_files(folder, tmp_path, caplog):
  prompts = tmp_path / "prompts.txt"
  task = cases.task(folder, prompts=str(prompts))
  settings = config(folder, tmp_path, task=(task,), pretrain_weight=0.0)
  prompts.write_text(" \n\n")
  with one_line("prompts.txt has no prompts: give a file with at least one"):
    cases.run(settings)
  # The model takes 16 tokens.
  prompts.write_text("a dog\n" + "dogs " * 30 + "\n" + "a cat " * 20)
  with caplog.at_level(logging.WARNING, "rlft"):
    open_run(settings).close()
  assert (
    "2 of 3 prompts of" in caplog.text and "more than 16 tokens and were cut off" in caplog.text
  )


OWN = """
import numpy as np

def nothing(images, prompts, metadata):
  return np.full(len(images), np.nan)

def same(images):
  return 0 * images[:, 0, 0, 0]
"""


def test_rewards_that_cannot_score_the_prompts(folder, tmp_path):
  prompts = str(folder / "prompts.txt")
  for task, evals, where in (
    (cases.task(folder, watch="oracle-both"), (), "--task=name=red: watch"),
    (cases.task(folder), (EvalConfig("e", prompts, "oracle-both", 8),), "--eval=name=e: metric"),
  ):
    settings = config(folder, tmp_path, task=(task,), eval=evals, pretrain_weight=0.0)
    with one_line(f"{where}=oracle-both needs 'objects' in the prompts' metadata, which none of"):
      open_run(settings)


def test_who_scores_nothing_is_found_before_the_first_update(folder, tmp_path, caplog):
  own = tmp_path / "own.py"
  own.write_text(OWN)
  nothing = f"host:{own}:nothing"
  settings = config(
    folder,
    tmp_path,
    task=(cases.task(folder, "same", "jax:same", own, watch=nothing),),
    eval=(EvalConfig("e", str(folder / "prompts.txt"), nothing, 8),),
    pretrain_weight=0.0,
    iterations=1,
  )
  with one_line("--eval=name=e: metric=host:.* could score none of the 8 images of the base"):
    cases.run(settings)
  settings = fields.replace(settings, eval=())
  with one_line("task same, iteration 0: watch=host:.*:nothing could score none of the images"):
    cases.run(settings)
  assert not cases.metrics(tmp_path / "run")
  # A reward that says nothing is said to, and the run goes on.
  task = dataclasses.replace(settings.task[0], watch="")
  with caplog.at_level(logging.WARNING, "rlft"):
    cases.run(fields.replace(settings, task=(task,), iterations=2))
  assert [line["reward/same/constant"] for line in cases.metrics(tmp_path / "run")] == [1, 1]
  assert caplog.text.count("task same: jax:") == caplog.text.count("nothing is learned") == 1
