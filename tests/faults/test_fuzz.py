"""Bad input ends in success or in one line; what was found once stays found."""

import experiment_cases
import pytest


@pytest.fixture(scope="module")
def fuzz():
  with experiment_cases.script("fuzz") as module:
    yield module


@pytest.mark.parametrize(
  "kind", ["flagfile", "prompts", "images", "model", "checkpoint", "adapter", "dataset", "answer"]
)
def test_bad_input_ends_in_one_line(fuzz, kind):
  count = 12 if kind in ("model", "checkpoint") else 40
  outcomes = [fuzz.case(kind, f"0 {number}") for number in range(count)]
  assert [text for text in outcomes if "Traceback" in text] == []
  assert any(outcomes)
  assert "" in outcomes or kind == "model"  # Hardly any damage to a model is none.


def test_a_case_is_the_same_again(fuzz):
  for number in range(9):  # One of each kind but the last, which is the program.
    assert fuzz.one(seed=3, number=number) == fuzz.one(seed=3, number=number)


def test_every_kind_has_its_share_of_a_hundred_cases(fuzz):
  assert len(fuzz._TURNS) == 100 and set(fuzz._TURNS) == set(fuzz.KINDS)


def test_a_traceback_is_told(fuzz, monkeypatch):
  def fails(folder, draw):
    raise TypeError("no luck")

  monkeypatch.setattr(fuzz, "KINDS", {"flagfile": fails})
  kind, text = fuzz.one(seed=0, number=0)
  assert kind == "flagfile" and text.startswith("Traceback") and "TypeError: no luck" in text
