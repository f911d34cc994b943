import dataclasses

import pytest

from rlft.evaluation.hacking import Hacking
from rlft.evaluation.results import Difference
from rlft.report.hacking import Call
from rlft.report.verdict import Measure, Place, Training, Verdict, next_steps, verdict

# Ratios deviate from 1 by sqrt(2e-6) = 1.4e-3.
DONE = Training(20, 20, {"r": "better"}, clip_fraction=0.1, approx_kl=1e-6, clip_range=6e-4)


def measure(name, change, before="0.60", after="0.30", **rest):
  return Measure(name, before, after, change, **rest)


def call(trained, oracle, hacked=True, since=5):
  def change(mean):
    return Difference(mean, mean, mean, 1.0, "better")

  return Call("liked", "oracle", Hacking(hacked, since, 20, change(trained), change(oracle)))


def said(measures=(), calls=(), training=DONE, **changed):
  found = verdict(measures, calls, dataclasses.replace(training, **changed))
  return found.kind, found.sentence


def test_improved():
  measures = [measure("parity", "better"), measure("both", "better"), measure("c", "no effect")]
  assert said(measures) == (
    "improved",
    "improved parity 0.60 → 0.30, both 0.60 → 0.30, and nothing that was measured became worse",
  )
  many = [measure(name, "better") for name in "abcde"]
  assert "a 0.60 → 0.30, b 0.60 → 0.30, c 0.60 → 0.30 and 2 more, and nothing" in said(many)[1]
  # Only what was trained on.
  trained = measure("a", "better", trained_on=True)
  assert said([trained])[1].endswith("which was trained on; nothing else was measured")
  assert said([trained, measures[2]])[1].endswith("nothing else was seen to move")


def test_something_was_lost():
  measures = [measure("a", "better"), measure("b", "worse", guard=True)]
  assert said(measures) == ("mixed", "improved a 0.60 → 0.30, but b 0.60 → 0.30 became worse")
  assert verdict(measures, [], DONE).notes == (
    "b 0.60 → 0.30 is a guard: it was not to become worse",
  )
  assert said([measures[1]], rewards={}) == ("worse", "became worse: b 0.60 → 0.30")


def test_hacked():
  honest, one, other = call(1, 1, hacked=False), call(0.25, -0.5), call(1, 2)
  assert said([measure("a", "better")], [honest, one]) == (
    "hacked",
    "hacked: the reward of liked rose by 0.25 and its judge, oracle, fell by 0.5 since iteration 5",
  )
  # A judge that improves by falling, and a second task.
  assert said([], [other, one])[1].endswith(
    "its judge, oracle, became worse by 2 since iteration 5; so were 1 more"
  )
  assert said([], [honest])[0] == "improved"


@pytest.mark.parametrize("trained", [True, False])
def test_without_a_judge_what_falls_beside_a_reward_is_suspect(trained):
  measures = [measure("guard", "worse")]
  if trained:
    measures.append(measure("reward", "better", trained_on=True))
  kind, sentence = said(measures)
  name = "reward" if trained else "r"
  assert kind == "hacked"
  assert sentence.startswith(
    f"{name} rose, which was trained on, and guard 0.60 → 0.30 became worse"
  )


@pytest.mark.parametrize(
  ("changed", "kind", "sentence"),
  [
    ({"approx_kl": 1e-9, "rewards": {}}, "unmoved", "nothing moved: the rate is low"),
    # As much, in the paper's clip range, is half of it.
    (
      {"approx_kl": 1e-9, "rewards": {}, "clip_range": 1e-4},
      "unmoved",
      "nothing was seen to move: the run is measured on few images",
    ),
    ({"constant": 1.0}, "unmoved", "nothing moved: the reward gives all images the same score"),
    ({"clip_fraction": 0.62}, "clipped", "clipped nearly everywhere: 62% of the ratios lie beyond"),
    ({}, "unmoved", "r rose in training, and nothing held out was seen to move"),
    ({"rewards": {}}, "unmoved", "nothing was seen to move: the run is measured on few images"),
    ({"rewards": {"r": "worse"}}, "worse", "the reward of r fell in training"),
  ],
)
def test_why_nothing_moved(changed, kind, sentence):
  got = said([measure("a", "unclear"), measure("b", "no effect")], **changed)
  assert got[0] == kind and got[1].startswith(sentence)


def test_runs_that_measure_nothing_or_are_not_over():
  assert said() == ("improved", "the reward of r rose in training; nothing was held out")
  assert said(done=0) == ("early", "nothing is known yet: no iteration is done")
  assert said([measure("a", "better")], done=5)[1].startswith("after 5 of 20: improved a")


def test_notes():
  lost = measure("parity", "better", found=(0.95, 0.6))
  training = dataclasses.replace(DONE, clip_fraction=0.5, constant=0.25)
  assert verdict([lost], [], training).notes == (
    "parity is measured on fewer images than before: found in 60%, before in 95%",
    "50% of the ratios are clipped: a lower rate may learn more",
    "25% of the images that are compared had the same score, and taught nothing",
  )
  assert verdict([measure("a", "better", found=(0.95, 0.91))], [], DONE).notes == ()


PLACE = Place("runs/a b", "emoji-sd", "python launch/train.py --x=1", 2e-6, "emoji:pair/test")


def commands(kind, training=DONE, place=PLACE):
  return [step.command for step in next_steps(Verdict(kind, ""), place, training)]


def test_what_to_do_next():
  assert commands("improved") == [
    "python launch/sample.py --model='runs/a b' --prompts=emoji:pair/test"
    " --output='runs/a b/grid.png'",
    "python launch/rate.py --models=emoji-sd --models='runs/a b' --output='runs/a b/rating'",
    "python launch/export.py --workdir='runs/a b' --output='runs/a b/exported'",
  ]
  again = "--workdir='runs/a b-2'"
  assert commands("hacked")[:2] == [f"{again} --iterations=N", ""]
  weighed = dataclasses.replace(PLACE, pretrain_weight=0.1)
  assert commands("hacked", place=weighed)[1] == f"{again} --pretrain_weight=0.3"
  # Where the weight has no effect, smaller steps.
  bounded = dataclasses.replace(weighed, pretrain_bounded=True)
  assert commands("hacked", place=bounded)[1] == f"{again} --learning_rate=6.66667e-07"
  # Pictures of a model of one's own are rated by prompts that are said.
  own = dataclasses.replace(PLACE, base="a/b@c", prompts="held out.txt")
  assert " '--set=name=held-out,prompts=held out.txt' " in commands("improved", place=own)[1]
  still = dataclasses.replace(DONE, approx_kl=1e-9)
  assert commands("unmoved", still)[0] == f"{again} --learning_rate=2e-05"
  assert f"{again} --learning_rate=6.7e-07" in commands("clipped")
  # What moved needs no higher rate.
  assert not any("learning_rate" in command for command in commands("unmoved"))
  # A run that is not over goes on first; one whose command is not known has none.
  early = dataclasses.replace(DONE, done=3)
  assert commands("improved", early)[0] == "python launch/train.py --x=1"
  assert commands("improved", early, Place("runs/a"))[0] == ""
