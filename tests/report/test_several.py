import json
import re

import numpy as np

from rlft.evaluation import results, statistics
from rlft.report import metrics, samples, several
from rlft.report.run_files import read_run
from rlft.types import Prompt


def result(name, scores, **rest):
  scores = np.array(scores, np.float32)
  low, high = statistics.bootstrap_interval(scores, samples=50)
  return results.EvalResult(
    name, "m", statistics.mean(scores), low, high, len(scores), len(scores), scores, **rest
  )


def make(workdir, *, rate, gain, evals=("liked",), prompts=("a dog", "<b>")):
  workdir.mkdir()
  task = {"name": "t", "prompts": "p", "reward": "r", "batch_size": 4}
  config = {"iterations": 2, "task": [task], "learning_rate": rate, "workdir": str(workdir)}
  (workdir / "config.json").write_text(json.dumps(config))
  with metrics.MetricsWriter(workdir, first_iteration=0) as writer:
    for iteration in range(2):
      values = {"reward/t/mean": iteration * gain, "watch/t/mean": 1.0, "grad_norm": 0.5}
      writer.write(iteration, values)
  for iteration in (0, 2):
    found = {name: result(name, np.arange(20) + gain * iteration) for name in evals}
    results.append_history(workdir, iteration, found)
    images = np.full((len(prompts), 4, 4, 3), 100 * iteration, np.uint8)
    samples.Keeper(workdir, iteration).save("liked", images, [Prompt(text) for text in prompts])
  return read_run(workdir)


def test_runs_stand_side_by_side(tmp_path):
  fast = make(tmp_path / "fast", rate=1e-3, gain=2.0)
  still = make(tmp_path / "still", rate=1e-6, gain=0.0, prompts=("a dog", "a cat"))
  page = several.page_of([fast, still])
  heads = re.findall(r'<header class="verdict (\w+)">\s*<p>(\w+)</p>', page)
  assert heads == [("improved", "fast"), ("unmoved", "still")]
  assert "iterations: 2 of 2 · images seen: 8" in page
  # Of settings only what differs.
  settings = page[page.index("Settings that differ") :]
  assert re.findall("<td>(.*?)</td>", settings) == ["learning_rate", "0.001", "1e-06"]
  assert re.findall("<figcaption>(.*?)</figcaption><svg", page) == [
    "liked (held out, higher is better)",
    "Reward of t",
    "Judge of t",
    "Gradient norm",
  ]
  # Each chart has a curve for each run.
  assert page.count("</i>fast <b>") == page.count("</i>still <b>") == 4
  # Of pictures the prompt that both have: the base model, then both over their iterations.
  assert re.findall('alt="(.*?)"', page.partition("<dialog")[0]) == [
    "a dog, at the start",
    *(
      f"{name}: a dog, {when}"
      for name in ("fast", "still")
      for when in ("at the start", "after 2 iterations")
    ),
  ]
  assert not re.search(r"https?://|src=\"(?!data:)|<b><b>", page)


def test_a_run_keeps_its_colour_where_another_has_nothing(tmp_path):
  bare = make(tmp_path / "bare", rate=1.0, gain=0.0, evals=())
  full = make(tmp_path / "full", rate=1.0, gain=1.0)
  (chart,) = several._held_out([bare, full])
  assert re.findall(r"</i>(\w+) <b>(.*?)</b>", chart) == [("bare", "–"), ("full", "11.5")]
  assert "#0072b2" in chart.partition("</svg>")[2] and "<circle" in chart
  assert 'fill="#0072b2"' not in chart and 'fill="#d55e00"' in chart


def test_cells_of_the_table(tmp_path):
  one = make(tmp_path / "one", rate=1.0, gain=2.0, evals=("liked", "only"))
  two = make(tmp_path / "two", rate=1.0, gain=0.0)
  liked, only = several.rows([one.history, two.history, two.history[:1], []])
  assert (liked.name, liked.about) == ("liked", "m · higher is better")
  assert [cell.verdict for cell in liked.cells] == ["better", "no effect", "", ""]
  assert liked.cells[0].interval == "+4.0000 [+4.0000, +4.0000] since the start"
  assert liked.cells[2].interval == "not trained yet" and liked.cells[3].mean == "–"
  assert [cell.mean for cell in only.cells[1:]] == ["–", "–", "–"]


def test_settings_that_one_run_does_not_have():
  configs = {"a": {"x": 1, "same": 0, "workdir": "a"}, "b": {"x": 2, "same": 0, "y": "z"}}
  assert several.different(configs) == [("x", ["1", "2"]), ("y", ["–", '"z"'])]
