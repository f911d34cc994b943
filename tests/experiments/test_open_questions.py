"""Choices by experiment: every answer is a training that can be made, and what is said of them."""

import pathlib

import experiment_cases
import numpy as np
import pytest

from rlft.evaluation.results import EvalResult
from rlft.performance.reproduce import scale as scale_lib
from rlft.performance.reproduce.scale import Experiment, Variation


@pytest.fixture(scope="module")
def questions():
  with experiment_cases.script("open_questions") as module:
    yield module


def test_every_answer_is_a_training_of_its_own(questions):
  scale = scale_lib.load("miniature")
  for _, task, answers in questions.QUESTIONS.values():
    configs = [
      Experiment("rl", (task,), 1).config(scale.varied("rl", task, answer), pathlib.Path("w"))
      for answer in answers.values()
    ]
    assert len({str((c.algorithm, c.task)) for c in configs}) == len(answers)
    assert {c.seed for c in configs} == {1}


def test_a_variation_stands_above_what_the_method_has_on_the_task():
  scale = scale_lib.load("miniature")
  more = Variation(("--learning_rate=7e-5",), "images_per_prompt=4")
  config = Experiment("raft", ("skintone",), 0).config(
    scale.varied("raft", "skintone", more), pathlib.Path("w")
  )
  assert config.optimizer.learning_rate == 7e-5
  assert config.task[0].images_per_prompt == 4
  assert "choose=sets" in config.algorithm.algorithm  # its own, on this task
  other = scale_lib.load("miniature").methods["raft"]
  assert scale.methods["raft"] == other  # the scale itself is as it was


def _history(*means, lower):
  scores = np.zeros(4, np.float32)
  return [
    (10 * i, EvalResult("parity", "oracle-parity", mean, mean, mean, 4, 1, scores, lower))
    for i, mean in enumerate(means)
  ]


def test_gains_are_told_as_more_is_better(questions):
  found = {
    "a": [_history(0.6, 0.5, 0.3, lower=True), _history(0.6, 0.6, 0.5, lower=True)],
    "b": [_history(0.6, 0.7, 0.7, lower=True)],
  }
  text = questions.section("credit", "Which?", "skintone", found)
  assert "| a | +0.200 | +0.300, +0.100 |" in text and "| b | -0.100 | -0.100 |" in text
  rows = questions.measurements(found)
  assert len(rows) == 9 and rows[5] == ("a", 1, 20, "0.50000")
  (first, _) = questions.curves(found)
  np.testing.assert_allclose(first.y, [0.6, 0.55, 0.4])
  np.testing.assert_allclose(first.low, [0.6, 0.5, 0.3])
