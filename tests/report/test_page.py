import base64
import hashlib
import html.parser
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from rlft.evaluation import results, statistics
from rlft.report import metrics, samples
from rlft.report import page as report
from rlft.types import Prompt, UserError


def result(name, scores, **rest):
  scores = np.array(scores, np.float32)
  low, high = statistics.bootstrap_interval(scores)
  return results.EvalResult(
    name, "m", statistics.mean(scores), low, high, len(scores), len(scores), scores, **rest
  )


def evaluation(shift):
  return {
    "up": result("up", np.arange(20) + shift, trained_on=True),
    "down": result("down", np.arange(20) + shift, lower_is_better=True, found=1 - shift / 8),
    "same <b>": result("same <b>", np.arange(20)),
  }


def iteration_metrics(iteration):
  return {
    "reward/tone/mean": 0.1 * iteration,
    "reward/tone/std": 0.2,
    "ratio/max_abs_deviation": 0.0,
    "clip_fraction/tone": 0.2,
    "clip_fraction/objects": 0.3,
    "approx_kl": float("nan") if iteration == 1 else 1e-6,
    "loss/pretrain": 0.1,
    "grad_norm": 1.0,
    "learning_rate": 1e-5,
    "images_seen": 64 * (iteration + 1),
    "time/sample_s": 60.0,
    "time/reward_s": 6.0,
    "time/update_s": 54.0,
    "images_per_second": 20.0,
    "mine/curve": 1.0,
  }


@pytest.fixture
def workdir(tmp_path):
  task = {"name": "tone", "prompts": "p.txt", "reward": "r", "batch_size": 64}
  config = {"iterations": 5, "pretrained": "emoji-sd", "task": [task], "seed": 12345}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with metrics.MetricsWriter(tmp_path, first_iteration=0) as writer:
    for iteration in range(4):
      writer.write(iteration, iteration_metrics(iteration))
  for iteration in (0, 2, 4):
    results.append_history(tmp_path, iteration, evaluation(iteration))
    images = np.full((2, 8, 8, 3), 60 * iteration, np.uint8)
    prompts = [Prompt("<script>alert(1)</script>"), Prompt("a dog")]
    samples.Keeper(tmp_path, iteration).save("up", images, prompts)
  return tmp_path


class Checker(html.parser.HTMLParser):
  """Collects tags and every reference to something outside of the page."""

  def __init__(self):
    super().__init__()
    self.tags, self.outside = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for key, value in attrs:
      if key in ("src", "href", "srcset", "data") and not value.startswith("data:"):
        self.outside.append(value)


def test_page_is_self_contained_and_well_formed(workdir):
  page = report.write_report(workdir).read_text()
  checker = Checker()
  checker.feed(page)
  assert checker.outside == []
  assert not re.search(r"https?://|@import|url\(", page)
  # The one script runs by its hash alone; what somebody wrote into a prompt does not.
  assert checker.tags.count("script") == 1 and "link" not in checker.tags
  (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = re.search(r'Content-Security-Policy"\s*content="(.*?)"', page)[1]
  assert policy.startswith("default-src 'none'; img-src data:;")
  assert policy.endswith(f"; script-src 'sha256-{digest}'")
  assert "&lt;script&gt;" in page and "same &lt;b&gt;" in page
  assert page.count("<body>") == page.count("</html>") == 1
  pictures = re.findall(r"<svg.*?</svg>", page)
  for picture in pictures:
    ElementTree.fromstring(picture)
  # 3 held-out metrics, 1 reward, 7 panels, the times, and 2 more curves.
  assert len(pictures) == 14 and "2 more curves" in page
  assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def facts(page):
  return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_page_says_what_was_run(workdir):
  page = report.write_report(workdir, command="train --x='<y>'").read_text()
  # 4 iterations of 64 images; 4 * (60 + 6 + 54) s = 8 minutes.
  assert facts(page) == {
    "Iterations": "4 of 5",
    "Images seen": "256",
    "Sampling, scoring, updating": "8.0 min",
  }
  assert "train --x=&#39;&lt;y&gt;&#39;" in page
  assert "<td>Base model</td><td>emoji-sd</td>" in page and "<td>seed</td><td>12345</td>" in page
  assert "sample 4.0 min, reward 24 s, update 3.6 min" in page
  assert "<b>tone</b>: reward r, prompts p.txt,\n    64 images an iteration" in page


def test_page_says_what_it_took(workdir):
  line = {"seconds": 5400, "device": "TPU v6 lite", "devices": 8, "commit": "abc", "python": "3.12"}
  line |= {
    "peak_device_bytes": 2**34,
    "peak_host_bytes": 2**32,
    "command": "python launch/train.py",
  }
  (workdir / "usage.jsonl").write_text(2 * f"{json.dumps(line)}\n")
  page = report.write_report(workdir).read_text()
  assert facts(page) == {
    "Iterations": "4 of 5",
    "Images seen": "256",
    "Wall clock": "3.0 h in 2 starts",
    "Device hours": "24",
    "Hardware": "8 x TPU v6 lite",
    "Peak memory": "16.0 GiB a device, 4.0 GiB on the host",
  }
  assert "<td>Commit of rlft</td><td>abc</td>" in page and "Python 3.12" in page
  assert "<code>python launch/train.py</code>" in page


def test_the_first_screen_says_what_the_run_came_to(workdir):
  page = report.write_report(workdir).read_text()
  kind, head = re.search('<header class="verdict (.*?)">(.*?)</header>', page, re.DOTALL).groups()
  assert kind == "hacked"  # What is trained on rises, something else falls.
  assert (
    "<h1>after 4 of 5: up rose, which was trained on, and down 9.50 → 13.5 became worse:" in head
  )
  assert "found in 50%, before in 100%.</p>" in head
  steps = page[page.index("What to do next") : page.index("Before and after")]
  assert "The run's own command, with" in steps.replace("&#39;", "'")
  assert f"<code>--workdir={workdir}-2 --iterations=N</code>" in steps
  # Nothing but the page's title is before it.
  assert page.index("<header") < page.index("<h2>")


def test_table_shows_direction_and_significance(workdir):
  page = report.write_report(workdir).read_text()
  rows = re.findall(r'<tr class="([\w-]+)">\s*<td><b>(.*?)</b>', page)
  assert rows == [("better", "up"), ("worse", "down"), ("no-effect", "same &lt;b&gt;")]
  assert "+4.0000<small>[+4.0000, +4.0000]</small><b>+42.1%, ▲ better</b>" in page  # 4 / 9.5
  assert page.count("<em>trained on</em><br>") == 1 and "<em>guard</em><br>" not in page
  assert "20 images, 20 prompts, found in 50.0%, before in 100.0%</small>" in page
  assert "<th>at the start</th><th>after 4 iterations</th><th>change</th>" in page


def test_the_base_at_its_best_stands_in_the_table(workdir):
  results.write_base(workdir, {"up": results.BestBase(3.0, result("up", np.arange(20) + 3.0))})
  page = report.write_report(workdir).read_text()
  labels = re.findall("<th>(.*?)</th>", page)
  change = "change from the base at its best"
  assert labels[:5] == [
    "evaluation",
    "at the start",
    "base at its best guidance",
    "after 4 iterations",
    change,
  ]
  assert re.search(r"12\.5000<small>\[[\d., ]+\]</small><b>guidance 3</b>", page)
  assert "+1.0000<small>[+1.0000, +1.0000]</small><b>+8.0%, ▲ better</b>" in page  # 1 / 12.5
  rows = re.findall(r'<tr class="[\w-]+">.*?</tr>', page, re.DOTALL)
  assert [row.count("<td") for row in rows] == [5, 5, 5]


def test_pictures_of_every_evaluation(workdir):
  page = report.write_report(workdir).read_text()
  assert page.count('<img src="data:image/png;base64,') == 2 * 3
  assert 'alt="a dog, after 2 iterations"' in page
  # The first stand beside the last; the others wait for the slider.
  shown = re.findall(r'class="shot" data-iteration="(\d)"( hidden)?>', page)
  assert shown == 2 * [("0", ""), ("2", " hidden"), ("4", "")]
  assert re.findall('<option value="(.)" label="(.*?)">', page) == [
    ("0", "at the start"),
    ("2", "after 2 iterations"),
    ("4", "after 4 iterations"),
  ]


def test_a_run_with_nothing_yet(tmp_path):
  page = report.write_report(tmp_path).read_text()
  for sentence in ("No iteration has finished", "No evaluation has finished", "No samples"):
    assert sentence in page
  assert "<h1>nothing is known yet: no iteration is done.</h1>" in page


def test_a_run_that_was_stopped_early(workdir):
  (workdir / "config.json").write_text('{"half')
  (workdir / "eval_history.jsonl").unlink()
  results.append_history(workdir, 0, evaluation(0))
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"iteration": 4, "reward')
  page = report.write_report(workdir).read_text()
  assert facts(page)["Iterations"] == "4"
  assert "better</b>" not in page and "(held out" not in page
  assert re.search(r'<tr class="">\s*<td><b>up</b>', page) and "<th>change" not in page


def test_a_damaged_file_is_named(workdir):
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write("rubbish\n{}\n")
  with pytest.raises(UserError, match="line 5 of .*metrics.jsonl"):
    report.write_report(workdir)


def test_a_reward_is_drawn_with_its_judge(tmp_path):
  def task(name, watch):
    return {"name": name, "prompts": "p", "reward": "r<1>", "batch_size": 8, "watch": watch}

  tasks = [
    task("tone", "oracle-parity"),
    task("sum", "oracle-both"),
    {**task("x", ""), "veto": "v"},
  ]
  (tmp_path / "config.json").write_text(json.dumps({"iterations": 3, "task": tasks}))
  names = ["reward/tone", "watch/tone", "reward/sum", "reward/sum/a", "reward/sum/b", "watch/sum"]
  with metrics.MetricsWriter(tmp_path, first_iteration=0) as writer:
    for iteration in range(3):
      writer.write(iteration, {f"{name}/mean": iteration for name in [*names, "reward/x"]})
  page = report.write_report(tmp_path, lower_is_better=["oracle-parity"]).read_text()
  charts = dict(re.findall(r"<figcaption>(.*?)</figcaption><svg(.*?)</svg>", page))
  tone, *terms, plain, total = charts
  assert tone == (
    "Reward: tone, and oracle-parity, never trained on (right scale, lower is better, drawn upside"
    " down)"
  )
  # Both are 0, 1, 2, but less is better of one.
  reward, judge = (
    [float(y) for y in re.findall(r'cy="(.*?)"', circles)]
    for circles in charts[tone].split("stroke-linejoin")[1:]
  )
  assert reward == sorted(reward, reverse=True) and judge == sorted(judge)
  # Of a sum, the terms are shown; its own mean says nothing and is folded away.
  assert [title[: title.index(" (")] for title in terms] == [
    f"Reward: sum/{term}, and oracle-both, never trained on" for term in "ab"
  ]
  assert all("higher is better)" in title for title in terms)
  assert plain == "Reward: x" and total == "reward/sum/mean" and "1 more curves" in page
  assert (
    "reward r&lt;1&gt;, watch oracle-parity, prompts p," in page and "veto v, prompts p" in page
  )


def test_a_run_in_which_nothing_could_be_scored(tmp_path):
  nothing, some = np.full(4, np.nan), [np.nan, 1, 2, 3]
  results.append_history(tmp_path, 0, {"a": result("a", nothing), "b": result("b", some)})
  results.append_history(tmp_path, 1, {"a": result("a", nothing), "b": result("b", nothing)})
  with metrics.MetricsWriter(tmp_path, first_iteration=0) as writer:
    writer.write(0, {"reward/t/mean": float("nan"), "watch/t/mean": float("nan")})
  page = report.write_report(tmp_path).read_text()
  assert page.count("not scored") == 3 and "no clear change" not in page
  assert "a (held out" not in page and "b (held out" in page
  assert not re.search(r"\bnan\b", page.lower())


def test_a_hacked_run_is_called_hacked(tmp_path):
  task = {"name": "liked", "prompts": "p", "reward": "r?credit=set", "watch": "oracle-preference"}
  entry = {"prompts": "p.txt", "images": 20}
  config = {
    "task": [task],
    "eval": [
      {"name": "trained", "metric": "r", **entry},
      {"name": "judged", "metric": "oracle-preference", **entry},
    ],
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  for iteration, fall in ((0, 0.0), (10, 5.0)):
    scores = {"trained": np.arange(20) + iteration, "judged": np.arange(20) - fall}
    found = {name: result(name, of) for name, of in scores.items()}
    results.append_history(tmp_path, iteration, found)
  page = " ".join(report.write_report(tmp_path).read_text().split())
  assert (
    "<h1>hacked: the reward of liked rose by 10 and its judge, oracle-preference, fell by 5 since"
    " iteration 0.</h1>" in page
  )
  assert (
    '<p class="warning"><b>liked: the reward rose and its judge became worse: it is being' in page
  )
  assert "being exploited</b> (from iteration 0 to 10 the reward changed by +10" in page
  # With the judge on other prompts, only the curves could tell, and there are none.
  config["eval"][1]["prompts"] = "other.txt"
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert "<h1>hacked" not in report.write_report(tmp_path).read_text()
  with metrics.MetricsWriter(tmp_path, first_iteration=0) as writer:
    for i in range(12):
      writer.write(i, {"reward/liked/mean": i + i % 2, "watch/liked/mean": i % 2 - i})
  page = report.write_report(tmp_path).read_text()
  assert "<h1>hacked: " in page and "(from iteration 0 to 11 the reward" in page
  page = report.write_report(tmp_path, lower_is_better=["oracle-preference"]).read_text()
  assert '<p class="note"><b>liked: the reward and its judge rose together</b>' in page


def test_a_reward_that_is_to_fall_has_risen_where_it_fell(tmp_path):
  """Of -1*NAME: by curves as by evaluations, a fall is what was asked for."""
  task = {"name": "small", "prompts": "p", "reward": "-1*jpeg", "watch": "judge"}
  (tmp_path / "config.json").write_text(json.dumps({"iterations": 50, "task": [task]}))
  with metrics.MetricsWriter(tmp_path, first_iteration=0) as writer:
    for i in range(50):
      means = {"reward/small": 0, "reward/small/jpeg": 20 - i / 5, "watch/small": 1 - i / 100}
      writer.write(i, {f"{name}/mean": mean + (i % 3) / 1000 for name, mean in means.items()})
  page = " ".join(report.write_report(tmp_path).read_text().split())
  assert "<h1>hacked: the reward of small/jpeg rose by " in page
  # Without a judge: it is the reward's gain.
  config = {"iterations": 50, "task": [{**task, "watch": ""}]}
  (tmp_path / "config.json").write_text(json.dumps(config))
  page = " ".join(report.write_report(tmp_path).read_text().split())
  assert "<h1>the reward of small/jpeg rose in training; nothing was held out.</h1>" in page
  # By evaluations of a metric of which more is better.
  entry = {"prompts": "p.txt", "images": 20}
  evals = [{"name": name, "metric": name, **entry} for name in ("jpeg", "judge")]
  config = {"iterations": 50, "task": [task], "eval": evals}
  (tmp_path / "config.json").write_text(json.dumps(config))
  for iteration in (0, 50):
    found = {one["name"]: result(one["name"], np.arange(20) - iteration) for one in evals}
    results.append_history(tmp_path, iteration, found)
  page = " ".join(report.write_report(tmp_path).read_text().split())
  assert "<h1>hacked: the reward of small rose by 50 and its judge, judge, fell by 50" in page
