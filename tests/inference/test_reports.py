import json

import pytest

from rlft.inference import reports
from rlft.report import metrics
from rlft.types import UserError


def make(workdir, watch=""):
  workdir.mkdir(parents=True)
  task = {"name": "t", "prompts": "p", "reward": "r", "batch_size": 4, "watch": watch}
  (workdir / "config.json").write_text(json.dumps({"iterations": 12, "task": [task]}))
  with metrics.MetricsWriter(workdir, first_iteration=0) as writer:
    for i in range(12):
      # The reward rises, and so does its judge.
      writer.write(i, {"reward/t/mean": i + i % 2, "watch/t/mean": i % 2 + i})
  return str(workdir)


def test_a_report_is_written_again(tmp_path):
  run = make(tmp_path / "run")
  assert reports.report([run]) == [
    f"report: {run}/report.html",
    "the reward of t rose in training; nothing was held out",
  ]


def test_a_judge_that_improves_by_falling_is_known_by_its_name(tmp_path, caplog):
  hacked = make(tmp_path / "hacked", "oracle-parity")
  assert reports.report([hacked])[1].startswith("hacked: the reward of t rose by")
  gone = make(tmp_path / "gone", "host:nowhere.py:judge")
  assert reports.report([gone])[1].startswith("the reward of t rose in training")
  assert "more of its judge host:nowhere.py:judge is taken for better" in caplog.text


def test_several_runs_make_one_page(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  runs = [make(tmp_path / name) for name in "ab"]
  *said, written = reports.report(runs)
  assert [line[:2] for line in said] == ["a:", "b:"] and written == "report: compared.html"
  assert (tmp_path / "compared.html").read_text().count('class="verdict improved"') == 2


def test_mistakes(tmp_path):
  run, same = make(tmp_path / "run"), make(tmp_path / "other" / "run")
  for workdirs, output, message in (
    ([], "", "there is no run to report on: give directories"),
    ([run], "x.html", "--output=x.html is for a page that compares runs"),
    ([run, str(tmp_path)], "", "is no directory of a run: give one"),
    ([run, same], "", "two runs are called run: give directories"),
  ):
    with pytest.raises(UserError, match=message):
      reports.report(workdirs, output=output)
