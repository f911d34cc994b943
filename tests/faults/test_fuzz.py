"""Bad input ends in success or in one line; what was found once stays found."""

import experiment_cases
import pytest


@pytest.fixture(scope="module")
def fuzz():
  with experiment_cases.script("fuzz") as module:
    yield module


def test_bad_input_ends_in_one_line(fuzz):
  kinds = list(fuzz.KINDS)
  outcomes = [fuzz.one(seed=0, number=number) for number in range(40 * len(kinds))]
  assert [(number, text) for number, (_, text) in enumerate(outcomes) if "Traceback" in text] == []
  # Both ends are met by each kind of input, or the damage is too small or too large.
  assert {kind for kind, text in outcomes if not text} == set(kinds)
  assert {kind for kind, text in outcomes if text} == set(kinds)


def test_a_case_is_the_same_again(fuzz):
  for number in range(len(fuzz.KINDS)):
    assert fuzz.one(seed=3, number=number) == fuzz.one(seed=3, number=number)


def test_a_traceback_is_told(fuzz, monkeypatch):
  def fails(folder, draw):
    raise TypeError("no luck")

  monkeypatch.setattr(fuzz, "KINDS", {"flagfile": fails})
  kind, text = fuzz.one(seed=0, number=0)
  assert kind == "flagfile" and text.startswith("Traceback") and "TypeError: no luck" in text
