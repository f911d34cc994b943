"""Sums of rewards, vetoes and judges: what a user writes, hand-computed scores, and a whole run."""

import json
import math
import threading

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
import train_cases as cases

from rlft import catalog
from rlft.config import fields
from rlft.config.settings import EvalConfig, TaskConfig
from rlft.parallel import cpu
from rlft.rewards import grammar
from rlft.rewards.scoring import task as combine
from rlft.types import HostReward, JaxReward, Prompt, Scores, UserError

NAN = float("nan")
TASK = TaskConfig(name="t", prompts="p", reward="r")


def reward(name, score=None, kind=JaxReward, **rest):
  return kind(name, score, **rest)


# What a user writes.


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("jpeg", [(1, "jpeg")]),
    ("0.7*a?w=/x+y&z=1 + 0.3*b", [(0.7, "a?w=/x+y&z=1"), (0.3, "b")]),
    ("a + -2e-1 * b", [(1, "a"), (-0.2, "b")]),
    (".5*host:f.py:g + 1.*a", [(0.5, "host:f.py:g"), (1, "a")]),
    ("2*a", [(2, "a")]),
  ],
)
def test_terms(spec, expected):
  assert grammar.terms(spec) == expected
  assert grammar.is_combination(spec) == (spec != "jpeg")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a>=0.5", ("a", True, 0.5)),
    ("a?x=1 >= -1e3", ("a?x=1", True, -1000)),
    ("http://h:1/v2/models/m?output=y<=0.2", ("http://h:1/v2/models/m?output=y", False, 0.2)),
  ],
)
def test_vetoes(text, expected):
  assert grammar.parse_veto(text) == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"reward": "a + "}, "a term has no name: write"),
    ({"reward": "0.5* + b"}, "a term has no name"),
    ({"reward": "a + 0*b"}, "the weight of b is 0: give another, or watch=b to measure it"),
    ({"reward": "1e999*a"}, "the weight of a is inf"),
    ({"veto": "a"}, "veto=a: write NAME>=NUMBER, or NAME<=NUMBER"),
    ({"veto": "a>=much"}, "veto=a>=much: write"),
    ({"veto": "a>=nan"}, "veto=a>=nan: write"),
    ({"veto": "a>0.5"}, "veto=a>0.5: write"),
    ({"veto": "a + b>=1"}, "veto=a + b is a sum, which measures nothing by itself: give one"),
    ({"watch": "credit"}, "watch=credit is the credit of images within their set"),
    ({"watch": "2*a"}, "watch=2*a is a sum"),
    ({"veto": "less>=0.5"}, "would keep what is worse, as less of less is better: write less<=0.5"),
  ],
)
def test_mistakes_are_named(change, message):
  def make(name):
    return reward(name, is_measure=name != "credit", lower_is_better=name == "less")

  with pytest.raises(UserError) as error:
    combine.task_reward(fields.replace(TASK, **change), make)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_terms_have_names_of_their_own():
  names = ["jpeg?x=1", "host:a/b.py:green", "jpeg", "http://h:80/v2/models/nsfw det?x=/y", "jpeg-2"]
  found = combine.task_reward(fields.replace(TASK, reward=" + ".join(names)), reward)
  assert [term.label for term in found.terms] == ["jpeg", "green", "jpeg-2", "nsfw_det", "jpeg-2-2"]
  assert [term.reward.name for term in found.terms] == names


def test_what_is_trained_on():
  tasks = [
    fields.replace(TASK, reward="2*p?a=1&credit=leave-one-out&b=2 + q", veto="v>=1"),
    fields.replace(TASK, reward="r", watch="w"),
  ]
  is_trained_on = grammar.trained_on(tasks)
  names = ("p?b=2&a=1", "p?a=1", "q", "v", "r", "w")
  assert [is_trained_on(name) for name in names] == [True, False, True, True, True, False]
  # The same measure, however it is computed or asked for.
  names = ("q?dtype=bfloat16", "q?shares=soft", "r?timeout_s=5&in_flight=2", "q?weights=x")
  assert [is_trained_on(name) for name in names] == [True, True, True, False]


def test_a_sum_is_no_metric():
  entry = EvalConfig("e", "emoji:pair/test", "jpeg + 2*oracle-both")
  message = "--eval=name=e: metric=jpeg .* relative to their batch.*: give an evaluation for each"
  with pytest.raises(UserError, match=message):
    catalog.make_specs([entry])


# Scores.


def scores(values, veto=None, **rest):
  total, vetoed = combine.combine(
    [jnp.array(v, jnp.float32) for v in values],
    None if veto is None else jnp.array(veto, jnp.float32),
    **rest,
  )
  return np.asarray(total), np.asarray(vetoed)


def test_a_sum_of_normalised_rewards():
  # 0, 2, 4: mean 2, std sqrt(8/3), so -1.2247, 0, 1.2247. The other one is a thousand times larger
  # and has a NaN: of 1000 and 3000, -1 and 1.
  z = math.sqrt(3 / 2)
  total, vetoed = scores([[0, 2, 4], [1000, 3000, NAN]], weights=[2, 0.5])
  np.testing.assert_allclose(total, [-2 * z - 0.5, 0.5, NAN], rtol=1e-5)
  assert not vetoed.any()
  # What does not differ says nothing.
  total, _ = scores([[0, 2, 4], [7, 7, 7]], weights=[1, 1])
  np.testing.assert_allclose(total, [-z, 0, z], atol=1e-5)


def test_vetoed_images_get_less_than_all_others():
  # As they are 1, 3, 5, 3: mean 3, std sqrt(2), lowest 1.
  floor = 1 - math.sqrt(2)
  values, veto = [[1, 3, 5, 3]], [0.9, 0.4, 0.2, 0.5]
  total, vetoed = scores(values, veto, weights=None, bound=0.5)
  np.testing.assert_allclose(total, [1, floor, floor, 3], rtol=1e-5)
  assert vetoed.tolist() == [0, 1, 1, 0]
  total, vetoed = scores(values, veto, weights=None, bound=0.5, least=False)
  np.testing.assert_allclose(total, [floor, 3, 5, 3], rtol=1e-5)
  # Normalised first: -sqrt(2), 0, sqrt(2), 0, of deviation 1.
  total, _ = scores(values, veto, weights=[1], bound=0.5)
  np.testing.assert_allclose(total, [-math.sqrt(2)] + [-math.sqrt(2) - 1] * 2 + [0], atol=1e-5)


def test_a_veto_among_images_that_cannot_be_scored_or_do_not_differ():
  # An image that the veto could not see is left out; one that it rejects is rejected, scored or
  # not: the others are 2 and 4.
  total, vetoed = scores([[2, 4, NAN, 4, NAN]], [1, NAN, 0, 1, 1], weights=None, bound=0.5)
  floor = 2 - math.sqrt(8 / 9)  # 2, 4, 4: mean 10/3
  np.testing.assert_allclose(total, [2, NAN, floor, 4, NAN], rtol=1e-5)
  assert vetoed.tolist() == [0, 0, 1, 0, 0]
  total, _ = scores([[3, 3, 3]], [1, 0, 1], weights=None, bound=0.5)
  np.testing.assert_allclose(total, [3, 2, 3])
  total, _ = scores([[NAN, NAN]], [1, 0], weights=None, bound=0.5)
  np.testing.assert_allclose(total, [NAN, -1])


# Batches of 16 images on a mesh.

both = threading.Barrier(2, timeout=20)


def row(images, *_):
  """The number of each image; returns only if another one is asked at the same time."""
  both.wait()
  return images[:, 0, 0, 0]


PARTS = {
  "host": reward("host", row, HostReward),
  "other": reward("other", row, HostReward),
  "set": reward("set", lambda _, images, __: -images[:, :, 0, 0, 0].mean(axis=1), is_set=True),
  "each": reward("each", lambda _, images, __: images[:, :, 0, 0, 0] % 4, is_set=True),
  "safe": reward("safe", lambda _, images, __: images[:, 0, 0, 0]),
}


def score(devices, **settings):
  mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
  rows = NamedSharding(mesh, PartitionSpec("data"))
  images = np.broadcast_to(np.arange(16.0, dtype=np.float32)[:, None, None, None], (16, 2, 2, 3))
  task = combine.task_reward(fields.replace(TASK, **settings), PARTS.__getitem__)
  scorer = combine.TaskScorer(
    task, batch_sharding=rows, batch_size=16, images_per_prompt=4, timeout_s=30.0, threads=1
  )
  try:
    found = scorer.score(jax.device_put(images, rows), [Prompt("")] * 16)
  finally:
    scorer.close()
  assert all(x.shape == (16,) for x in jax.tree.leaves(vars(found)))
  assert all(x.sharding.is_equivalent_to(rows, 1) for x in jax.tree.leaves(vars(found)))
  of_reward = lambda x: np.asarray(x.values if isinstance(x, Scores) else x)  # noqa: E731
  return jax.tree.map(of_reward, vars(found), is_leaf=lambda x: isinstance(x, Scores))


def z(values):
  return (values - values.mean()) / values.std()


@pytest.mark.parametrize("devices", [1, 8])
def test_all_kinds_of_rewards_together(devices):
  rows = np.arange(16)
  sets = -(rows // 4 * 4 + 1.5)
  settings = {"reward": "host + 3*set + 2*each", "veto": "safe>=2", "watch": "other"}
  found = score(devices, **settings)
  expected = z(rows) + 3 * z(sets) + 2 * z(rows % 4)
  expected[:2] = expected.min() - expected.std()
  np.testing.assert_allclose(found["scores"], expected, rtol=1e-4)
  assert found["terms"].keys() == {"host", "set", "each"}
  for label, values in (("host", rows), ("set", sets), ("each", rows % 4)):
    np.testing.assert_allclose(found["terms"][label], values)
  np.testing.assert_allclose(found["veto"], rows)
  np.testing.assert_allclose(found["vetoed"], rows < 2)
  np.testing.assert_allclose(found["watch"], rows)


def test_programs_of_several_devices_have_run_when_host_rewards_begin(monkeypatch):
  # A host reward that calls JAX would take threads of the CPU for which devices wait.
  events = []

  def call(images, prompts, metadata):
    events.append("host")
    return images[:, 0, 0, 0] + np.asarray(jnp.zeros(len(images)))

  class Awaited(cpu.Awaited):
    def __call__(self, *args):
      found = super().__call__(*args)
      events.append("jax" if jax.tree.all(jax.tree.map(lambda x: x.is_ready(), found)) else "late")
      return found

  monkeypatch.setattr(cpu, "Awaited", Awaited)
  monkeypatch.setitem(PARTS, "host", reward("host", call, HostReward))
  score(8, reward="host + each", watch="set")
  assert events == ["jax", "jax", "host", "jax"]  # At the end the sum.


def test_one_reward_is_taken_as_it_is():
  rows = np.arange(16.0)
  found = score(8, reward="safe", watch="each")
  np.testing.assert_array_equal(found["scores"], rows)
  np.testing.assert_array_equal(found["watch"], rows % 4)
  assert found["terms"] == {} and found["veto"] is None and found["vetoed"] is None
  found = score(8, reward="safe", veto="safe<=14")
  np.testing.assert_allclose(found["scores"], [*rows[:15], -rows.std()], rtol=1e-5)
  assert found["terms"] == {} and found["watch"] is None


def test_when_all_images_of_a_set_score_the_same():
  def same(**settings):
    return combine.task_reward(fields.replace(TASK, **settings), PARTS.__getitem__).same_in_set

  assert same(reward="set") and same(reward="2*set", watch="safe")
  assert not same(reward="set + safe") and not same(reward="set", veto="safe>=0")


# A whole run.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


def test_a_run_with_a_sum_a_veto_and_a_judge(folder, tmp_path):
  def name(kind, function):
    return f"{kind}:{folder / 'rewards.py'}:{function}"

  red, green, spread = name("jax", "red"), name("host", "green"), name("host", "spread")
  task = fields.replace(
    cases.task(folder, "sum", images_per_prompt=2),
    reward=f"2*{red} + -0.5*{green} + {spread}",
    veto=f"{red}>=0.23",
    watch=spread,
  )
  config = cases.config(
    folder,
    tmp_path,
    task=(task, cases.task(folder)),
    pretrain_weight=0.0,
    max_nan_share=0.5,
    eval=(EvalConfig("red", task.prompts, red, images=8),),
  )
  calls = []
  cases.run(config, calls=calls)
  line, last = cases.metrics(tmp_path)
  # One prompt of four cannot be scored by `spread`.
  assert line["reward/sum/spread/unscored"] == line["watch/sum/unscored"] == 0.25
  assert line["watch/sum/mean"] == line["reward/sum/spread/mean"] > 0
  assert line["reward/sum/red/mean"] == line["veto/sum/mean"]
  assert 0 < line["veto/sum/share"] < 1 and 0 < line["reward/sum/green/std"] < 1
  assert line.keys() >= {f"reward/sum/{key}" for key in ("mean", "std", "min", "max", "unscored")}
  assert last["reward/sum/red/mean"] != line["reward/sum/red/mean"]
  # A veto needs no other score.
  count = config.algorithm.train_timesteps
  updates = [call.args for call in calls if call.name == "update"][:count]
  vetoed = line["veto/sum/share"] * cases.BATCH
  for _, _, _, advantages, mask, _ in updates:
    advantages, mask = np.asarray(advantages), np.asarray(mask)
    assert (advantages == advantages.min()).sum() == vetoed and not advantages[~mask].any()
    assert advantages.sum() == pytest.approx(0, abs=1e-4)
  assert line["reward/red/mean"] > 0 and "watch/red/mean" not in line
  page = (tmp_path / "report.html").read_text()
  for label in ("red", "green", "spread"):
    assert f"Reward: sum/{label}, and {spread}, never trained on (right scale" in page
  assert json.loads((tmp_path / "eval.json").read_text())["after"]["red"]["trained_on"]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"reward": "broken"}, "^reward=broken raised ValueError"),
    ({"reward": "safe", "watch": "broken"}, "^watch=broken raised ValueError"),
    ({"reward": "safe", "veto": "broken>=2"}, "^veto=broken raised ValueError"),
  ],
)
def test_what_fails_is_said_of_its_key(monkeypatch, settings, message):
  def fails(images, prompts, metadata):
    raise ValueError("no luck")

  monkeypatch.setitem(PARTS, "broken", HostReward("broken", fails))
  with pytest.raises(UserError, match=message):
    score(8, **settings)
