"""The whole command: runs what is missing, goes on where it stopped, writes what there is."""

import csv
import pathlib
import re
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
import reproduce_cases as cases

from rlft.evaluation.protocol import Base
from rlft.performance.reproduce import reproduce as reproduce_lib
from rlft.performance.reproduce.reproduce import ReproduceSettings, reproduce
from rlft.report import samples
from rlft.types import Prompt, UserError


@pytest.fixture
def measured(monkeypatch):
  """Replaces the measuring; the names of the runs that are measured."""
  monkeypatch.setattr(reproduce_lib, "Protocol", cases.Protocol)
  monkeypatch.setattr(reproduce_lib, "open_run", lambda path: type("Run", (), {"path": path}))
  cases.Protocol.log = []
  return cases.Protocol.log


def settings(tmp_path, **changes):
  how = {"workdir": str(tmp_path / "runs"), "output": str(tmp_path / "results"), "seeds": 2}
  return ReproduceSettings(**(how | changes))


def starting(*, failing=(), killed=""):
  """In the place of processes; those of `killed` end half way."""
  names = []

  def start(command, kept_open, environment):
    workdir = pathlib.Path(command[-1].partition("=")[2]).parent
    names.append(workdir.name)
    if any(part in workdir.name for part in failing):
      return 2
    cases.write_run(workdir, until=2 if workdir.name == killed else 0)
    return -9 if workdir.name == killed else 0

  return start, names


def run(tmp_path, start, **changes):
  lines = []
  text = reproduce(
    settings(tmp_path, **changes), scale=cases.scale(), start=start, say=lines.append
  )
  return text, lines


def test_everything(tmp_path, measured):
  start, names = starting()
  text, lines = run(tmp_path, start)
  assert len(names) == len(set(names)) == len(measured) == 2 * 13
  assert names[:2] == ["refl-preference-0", "raft-preference-0"] and names[13].endswith("-1")
  # 4 iterations of 8 images, and 3 evaluations of 24.
  assert lines[0].startswith("training 1 of 26: refl-preference-0, 104 of ")
  results = tmp_path / "results"
  assert text == (results / "README.md").read_text()
  for title in ("T1", "T2", "T3", "T4", "T5", "ablation", "Curves", "Hacked rewards"):
    assert f"## {title}" in text
  for name in ("curves.svg", "hacking.svg"):
    ElementTree.fromstring((results / name).read_text())
  assert {path.name for path in results.iterdir()} >= {"T1.csv", "T1-orderings.csv", "hacking.csv"}
  # Nothing is left to be done.
  again, lines = run(tmp_path, start)
  assert again == text and lines == [] and len(names) == 26


def test_a_command_that_was_killed_goes_on(tmp_path, measured):
  start, names = starting(killed="rwr-preference-0")
  with pytest.raises(UserError, match="rwr-preference-0 was ended by signal 9"):
    run(tmp_path, start, only="T1")
  assert names[-1] == "rwr-preference-0" and not (tmp_path / "results").exists()
  start, names = starting()
  run(tmp_path, start, only="T1")
  # What was done is not done again; what was half done goes on.
  assert names[0] == "rwr-preference-0" and len(names) == 2 * 5 - 3
  assert len(measured) == 10


def test_a_method_that_fails_leaves_the_others(tmp_path, measured):
  start, names = starting(failing=("refl", "draft"))
  with pytest.raises(UserError, match="4 of 10 trainings failed .*refl-preference-0 ended with"):
    run(tmp_path, start, only="T1")
  assert len(names) == 10 and len(measured) == 6
  table = (tmp_path / "results" / "T1.md").read_text()
  assert "| ReFL | 0 | not run |" in table and "| RL | 2 | 1.400 ±" in table


def test_parts_are_written_beside_those_of_earlier(tmp_path, measured):
  start, names = starting()
  run(tmp_path, start, only="T4", seeds=1)
  text, _ = run(tmp_path, start, only=" T3 ,T2", seeds=1)
  assert [line for line in text.splitlines() if line.startswith("## ")] == [
    "## T2: Images and time to converge, trained on preference",
    "## T3: Skin tones: how uneven they are, lower is better",
    "## T4: Composition: both of two objects",
  ]
  assert {name.split("-")[1] for name in names} == {"composition", "skintone", "preference"}


def test_the_plan(tmp_path, measured):
  start, names = starting()
  run(tmp_path, start, only="T4", seeds=1)
  text, lines = run(tmp_path, start, only="T4,T3", seeds=1, dry_run=True)
  assert len(names) == 3 and lines == []
  assert "| raft-composition-0 | done | 4 | 104 |" in text
  assert "| rl-skintone-0 | missing | 4 | 104 |" in text
  assert "3 of 6 trainings are left, with 312 images." in text
  assert "The protocol draws 24 images of each run" in text and "2 guidance scales" in text


def test_figures_of_a_table(tmp_path, measured):
  start, _ = starting()
  text, _ = run(tmp_path, start, only="T1")
  rows = list(csv.DictReader((tmp_path / "results" / "T1.csv").open()))
  assert len(rows) == 7 * 8 + 6 * 4  # columns; guards, but for the best of 3
  assert "| base, best of 3 by the trained reward |  | 1.150 ±0.128 ▲ |" in text
  (rl,) = (r for r in rows if (r["row"], r["measure"]) == ("RL", "reward-seen"))
  # The base is at 0.5 + 0.5 (the mean of the prompts), RL 0.4 above it; seeds do not move the mean.
  assert (float(rl["mean"]), float(rl["gain"])) == (1.4, 0.4)
  assert (rl["verdict"], rl["paper"], rl["base_guidance"], rl["seeds"]) == (
    "better",
    "0.845",
    "3",
    "2",
  )
  assert 0.3 < float(rl["gain_low"]) < 0.4 < float(rl["gain_high"]) < 0.5
  # Raters follow the oracle with a noise of 0.1: sigmoid(4) of them prefer RL.
  (votes,) = (
    r
    for r in rows
    if r["row"] == "RL" and r["column"].startswith("raters") and r["column"].endswith(", in-domain")
  )
  assert float(votes["mean"]) == pytest.approx(0.982, abs=0.03) and votes["verdict"] == "better"
  (raft,) = (r for r in rows if (r["row"], r["measure"]) == ("RAFT", "reward-seen"))
  assert raft["verdict"] == "worse"
  assert "| base |  | 1.000 ±0.128 (0.170) |" in text
  assert re.search(r"\| RL \| 2 \| 1\.400 ±0\.1\d\d ▲ \(0\.845\) \|", text)


def test_orderings_beside_the_papers(tmp_path, measured):
  start, _ = starting()
  text, _ = run(tmp_path, start, only="T1")
  rows = list(csv.DictReader((tmp_path / "results" / "T1-orderings.csv").open()))
  in_domain = [r for r in rows if r["column"] == "trained reward, in-domain"]
  verdicts = {(r["better_in_paper"], r["worse_in_paper"]): r["verdict"] for r in in_domain}
  assert len(in_domain) == 15
  assert verdicts["refl", "rl"] == verdicts["rl", "draft"] == "same"
  assert verdicts["raft", "base"] == "other"  # worse than the base here
  # ReFL leads by the held-out scorer, too, where the paper has RL first.
  assert (
    "| held-out scorer, in-domain | RL > base, RL > RAFT, RL > DRaFT-LV, RL > RWR | RL > ReFL |"
    in text
  )
  assert "Of 50 pairs that the paper orders: " in text


def test_joint_training_beside_specialists(tmp_path, measured):
  start, _ = starting()
  text, _ = run(tmp_path, start, only="T5", seeds=1)
  # All RL runs have one gain here, so joint training keeps all of it.
  assert "What must not be lost beside these gains:\n\n|  | seeds | a single object" in text
  assert "\n\nSaid of skin.\n\n" in text
  assert "Made by `python launch/reproduce.py --scale=tiny --seeds=1 --only=T5`." in text
  assert "- skin tone (parity): joint training keeps 100% of the gain (the paper: 77%)" in text
  assert "One training seed: intervals say nothing of other seeds." in text


def test_convergence(tmp_path, measured):
  start, _ = starting()
  text, _ = run(tmp_path, start, only="T2")
  # Evaluations at 0, 2 and 4; 2 iterations of 30 s. The others are still rising at the end.
  there = "16 [16, 16] | 1.0 [1.0, 1.0]"
  assert f"| RL | 2 of 2 | {there} | 2 of 2 | " in text
  # Both are where RL ends when half is done; RAFT gets worse.
  assert f"| ReFL | 0 of 2 |  |  | 2 of 2 | {there} | no | 6.9 |" in text
  assert "| RAFT | 0 of 2 |  |  | 0 of 2 |  |  | yes | diverged |" in text
  assert "| hours |" in text  # all take the same time: nothing is decided
  assert "Of 6 pairs that the paper orders: 0 same, 0 other, 6 not decided by these seeds." in text


def test_a_hacked_run_is_called_hacked(tmp_path, measured):
  start, _ = starting()
  text, _ = run(tmp_path, start, only="hacking", seeds=1)
  assert "| ReFL | 0 | hacked | 0 to 4 | +0.4" in text
  assert "| RL | 0 | not seen to be |" in text
  # Where each should have been stopped.
  (refl,) = re.findall(r"^\| ReFL \|.*\| (\d): [^|]*\|$", text, re.M)
  (rl,) = re.findall(r"^\| RL \|.*\| (\d): [^|]*\|$", text, re.M)
  assert (refl, rl) == ("0", "4")
  root = ElementTree.fromstring((tmp_path / "results" / "hacking.svg").read_text())
  words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
  assert {"ReFL", "trained reward", "oracle"} <= set(words)


def test_methods_that_only_show_how_rewards_are_hacked(tmp_path, measured, monkeypatch):
  monkeypatch.setitem(cases.GAINS, "hot", 0.0)
  hot = {"title": "Too fast", "flags": ["--learning_rate=1"], "tables": ["hacking"]}
  scale = cases.scale(methods={**cases.CONTENT["methods"], "hot": hot}, note="Rates were chosen.")
  start, names = starting()
  how = {"scale": scale, "start": start, "say": lambda line: None}
  text = reproduce(settings(tmp_path, only="T1,hacking", seeds=1), **how)
  assert "hot-preference-0" in names
  ranked, _, hacked = text.partition("## Hacked rewards")
  assert "| Too fast | 0 | not seen to be |" in hacked and "Too fast" not in ranked
  assert text.startswith("# Results") and "\n\nRates were chosen.\n\n## T1" in text


def test_the_best_of_several_is_taken_where_the_base_is_best(tmp_path, measured, monkeypatch):
  """In each measure: else a choice of guidance would count as one of images."""
  low, high = cases.measured(0.2), cases.measured(0.5)
  turned = {"preference-seen": high["preference-seen"]}
  each = {1.0: low | turned, 3.0: high | {"preference-seen": low["preference-seen"]}}
  asked = {}

  def best_of(self, choice, guidance, names):
    asked[guidance] = names
    return {name: cases.measured(0.65)[name] for name in names}

  monkeypatch.setattr(cases.Protocol, "base", lambda self, guidances: Base(each, each))
  monkeypatch.setattr(cases.Protocol, "best_of", best_of)
  start, _ = starting()
  run(tmp_path, start, only="T1", seeds=1)
  rest = ["reward-seen", "reward-unseen", "preference-unseen", "likeness-seen", "likeness-unseen"]
  assert asked == {3.0: rest, 1.0: ["preference-seen"]}


def test_pictures_stand_side_by_side(tmp_path, measured):
  start, _ = starting()
  run(tmp_path, start, only="ablation", seeds=1)
  assert not (tmp_path / "results" / "ablation.png").exists()
  # What the protocol keeps: of the base at its best guidance, and of each run. They share images
  # with an evaluation of another name.
  runs = tmp_path / "runs"
  folders = [
    runs / "protocol" / "base" / "test-guidance-3",
    *(runs / f"{name}-preference-0" / "measured" / "test" for name in ("rl", "rl-alone")),
  ]
  for level, folder in enumerate(folders):
    images = [np.full((8, 8, 3), 80 * level + 10 * place, np.uint8) for place in range(2)]
    prompts = [Prompt("a dog"), Prompt("a cat")]
    samples.Keeper(folder, 0).save("both-seen", images, prompts)
  text, _ = run(tmp_path, start, only="ablation", seeds=1)
  with PIL.Image.open(tmp_path / "results" / "ablation.png") as picture:
    pixels = np.asarray(picture)
  # Cells of 10 pixels, 9 times as large, with 2 pixels between them: two rows of three.
  assert pixels.shape == (2 * 122 + 2, 3 * 122 + 2, 3)
  found = [
    [int(pixels[62 + 122 * row, 62 + 122 * column, 0]) for column in range(3)] for row in (0, 1)
  ]
  assert found == [[0, 80, 160], [10, 90, 170]]
  assert "From left to right: base, RL, RL without the pretraining loss." in text
  assert "From top to bottom: a dog; a cat." in text


def test_mistakes(tmp_path, measured):
  start, names = starting()
  with pytest.raises(UserError, match="--only=T1,T9: T9: "):
    run(tmp_path, start, only="T1,T9")
  with pytest.raises(UserError, match="evals measure no parity-gendered, which a table shows"):
    entries = [text for text in cases.CONTENT["evals"] if "parity-gendered" not in text]
    how = settings(tmp_path, only="T3", seeds=1)
    reproduce(how, scale=cases.scale(evals=entries), start=start, say=print)
