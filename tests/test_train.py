"""Whole runs of the trainer on a tiny model: what they write, and that they learn what they should."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import train_cases as cases

from rlft.config import EvalConfig
from rlft.models import pretrained

PROGRAMS = ("sample", "update", "accumulate", "apply", "pretrain", "average")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = cases.folder(tmp_path_factory)
  with cases.fast_compilation(folder / "cache"):
    yield folder


def record(programs, calls):
  """Adds (name, shapes of the state's shards, other arguments, result) to `calls` at each call."""

  def recording(name):
    def call(*args):
      shapes = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, args[0])
      result = getattr(programs, name)(*args)
      # Copies: the next call is given the memory of this one's results.
      calls.append((name, shapes, args[1:], jax.tree.map(np.array, result)))
      return result

    return call

  return dataclasses.replace(programs, **{name: recording(name) for name in PROGRAMS})


def results(calls, name):
  return [result for called, _, _, result in calls if called == name]


class Run:
  """A run of two tasks, one of them with a score that is NaN, and of what else `changes` say.

  Attributes:
    workdir: its directory.
    calls: see `record`.
    compiled: the names of what XLA compiled.
  """

  def __init__(self, folder, workdir, *, devices=1, **changes):
    self.workdir = workdir
    tasks = cases.task(folder), cases.task(folder, "spread", "host:spread", images_per_prompt=2)
    config = cases.config(folder, workdir, **({"task": tasks, "max_nan_share": 0.5} | changes))
    self.calls = []
    with cases.compilations() as self.compiled:
      cases.run(config, devices=devices, change=lambda programs: record(programs, self.calls))


@pytest.fixture(scope="module")
def one_device(folder, tmp_path_factory):
  return Run(folder, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def eight_devices(folder, tmp_path_factory):
  """Also evaluates."""
  evals = (
    EvalConfig("red", str(folder / "prompts.txt"), f"jax:{folder}/rewards.py:red", 16, 2),
    EvalConfig("spread", str(folder / "prompts.txt"), f"host:{folder}/rewards.py:spread", 16, 2),
  )
  return Run(folder, tmp_path_factory.mktemp("eight"), devices=8, eval=evals)


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
  return Run(folder, tmp_path_factory.mktemp("sharded"), devices=8, fsdp=4)


def test_metrics(eight_devices):
  lines = cases.metrics(eight_devices.workdir)
  assert [line["iteration"] for line in lines] == [0, 1]
  for line in lines:
    assert line.keys() >= {
      "reward/red/mean",
      "reward/spread/mean",
      "ratio/max_abs_deviation",
      "clip_fraction",
      "approx_kl",
      "loss/pretrain",
      "time/sample_s",
      "time/reward_s",
      "time/update_s",
      "images_per_second",
    }
    assert line["ratio/max_abs_deviation"] <= 1e-5
    seconds = line["time/sample_s"] + line["time/reward_s"] + line["time/update_s"]
    assert line["images_per_second"] == pytest.approx(2 * cases.BATCH / seconds)
    assert 0 < line["reward/red/min"] < line["reward/red/mean"] < line["reward/red/max"] < 1
    assert line["reward/red/unscored"] == 0
    assert line["grad_norm"] > 0 and line["loss/pretrain"] > 0


def test_an_image_without_a_score_is_counted_and_left_out(eight_devices):
  # 4 of the 5 prompts are in an iteration's 4 sets; that of 'two cats' has no score.
  lines = cases.metrics(eight_devices.workdir)
  assert sorted(line["reward/spread/unscored"] for line in lines) in ([0, 0.25], [0.25, 0.25])
  updates = [args for name, _, args, _ in eight_devices.calls if name == "update"]
  masks = [(np.asarray(advantage), np.asarray(mask)) for _, _, _, advantage, mask, _ in updates]
  assert {int((~mask).sum()) for _, mask in masks} == {0, 2}
  for advantage, mask in masks:
    assert np.isfinite(advantage).all() and not advantage[~mask].any()
    assert advantage.mean() == pytest.approx(0, abs=1e-5)


def test_what_a_run_leaves(eight_devices):
  workdir = eight_devices.workdir
  found = json.loads((workdir / "eval.json").read_text())
  for when in ("before", "after"):
    assert found[when].keys() == {"red", "spread"}
    red = found[when]["red"]
    assert red["images"] == 16 and red["low"] < red["mean"] < red["high"]
    assert found[when]["spread"]["unscored"] == 2  # 8 sets of 5 prompts
  assert found["before"]["red"]["mean"] != found["after"]["red"]["mean"]
  assert json.loads((workdir / "config.json").read_text())["learning_rate"] == 1e-2
  page = (workdir / "report.html").read_text()
  assert "Reward: red" in page and "data:image/png;base64," in page
  assert list((workdir / "tensorboard").iterdir())
  assert sorted(path.name for path in (workdir / "grids" / "red").glob("*.png")) == [
    "000000.png",
    "000002.png",
  ]


@pytest.mark.parametrize("run", ["eight_devices", "sharded"])
def test_each_program_is_compiled_once(run, request):
  compiled = request.getfixturevalue(run).compiled
  for name in ("sample", "update", "pretrain"):
    assert compiled.count(f"jit({name})") == 1


def test_golden(one_device):
  # Whatever changes these numbers changes what everyone's runs do.
  expected = {}
  line = cases.metrics(one_device.workdir)[0]
  print({k: v for k, v in line.items() if k in cases.reproducible([line])[0]})
  print({k: v for k, v in cases.metrics(one_device.workdir)[1].items() if k in cases.reproducible([line])[0]})
  assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("run", ["eight_devices", "sharded"])
def test_any_number_of_devices_gives_the_same(run, request, one_device):
  """Up to the order of float32 sums: the bounds below, which are for two iterations."""
  other = request.getfixturevalue(run)
  for number, (expected, found) in enumerate(
    zip(results(one_device.calls, "sample"), results(other.calls, "sample"), strict=True)
  ):
    for name, a, b in (
      ("latents", expected[0].latents, found[0].latents),
      ("log_probs", expected[0].log_probs, found[0].log_probs),
      ("images", expected[1], found[1]),
    ):
      print(run, number, name, np.abs(a - b).max() / np.abs(a).max())
  a, b = cases.final_state(one_device.workdir)["params"], cases.final_state(other.workdir)["params"]
  d = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(x).max(), a, b)
  print(run, "params", max(jax.tree.leaves(d)))
  d = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(x), a, b)
  print(run, "params", max(jax.tree.leaves(d)))
  for a, b in zip(cases.metrics(one_device.workdir), cases.metrics(other.workdir)):
    print({k: (a[k], b[k]) for k in cases.reproducible([a])[0]})


def test_parameters_and_optimizer_are_sharded(sharded):
  updates = [before for name, before, _, _ in sharded.calls if name == "update"]
  whole = cases.final_state(sharded.workdir)
  for state in (updates[0], updates[-1]):
    sizes = {}
    for tree in (state.params, state.opt[1][0].mu, state.opt[1][0].nu):
      shapes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
      for shape, leaf in zip(shapes, jax.tree.leaves(whole["params"]), strict=True):
        assert np.prod(shape) == leaf.size / (4 if leaf.size >= 4096 else 1)
        sizes[leaf.shape] = shape
    assert sizes[64, 64] in ((16, 64), (64, 16))


def test_lora_with_kl_and_average(folder, tmp_path):
  run = Run(
    folder,
    tmp_path,
    task=(cases.task(folder),),
    pretrain_weight=0.0,
    train_timesteps=1,
    lora_rank=2,
    kl_weight=0.1,
    ema_decay=0.5,
    iterations=3,
  )
  lines = cases.metrics(tmp_path)
  # At first the adapter changes nothing.
  assert lines[0]["kl_to_base/red"] <= 1e-10
  assert all(line["kl_to_base/red"] > 1e-8 for line in lines[1:])
  assert all(line["ratio/max_abs_deviation"] <= 1e-5 for line in lines)
  assert all(line["grad_norm"] > 0 for line in lines)

  adapter = cases.final_state(tmp_path)["params"]
  assert adapter and all(factors.keys() == {"a", "b"} for factors in adapter.values())
  assert all(factors["b"].any() for factors in adapter.values())
  (frozen, *_) = [args for name, _, args, _ in run.calls if name == "update"][-1]
  base = pretrained.load(folder / "model").params
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, frozen), base)

  # E_1 = (E_0 + P_1) / 2, and b is 0 in E_0; then E_2 = (E_1 + P_2) / 2.
  first, second, _ = results(run.calls, "average")
  for path in adapter:
    b1, b2 = first.params[path]["b"], second.params[path]["b"]
    np.testing.assert_allclose(first.ema[path]["b"], b1 / 2, rtol=1e-6)
    np.testing.assert_allclose(second.ema[path]["b"], b1 / 4 + b2 / 2, rtol=1e-6, atol=1e-9)


def test_accumulated_timesteps_make_one_update(folder, tmp_path, one_device, recwarn):
  run = Run(
    folder,
    tmp_path,
    task=(cases.task(folder),),
    pretrain_weight=0.0,
    accumulate_timesteps=True,
    iterations=1,
  )
  assert [name for name, *_ in run.calls] == ["sample", "accumulate", "accumulate", "apply"]
  # No timestep sees another's update ...
  (line,) = cases.metrics(tmp_path)
  (each,) = cases.metrics(one_device.workdir)[:1]
  assert line["reward/red/mean"] == each["reward/red/mean"]
  assert line["approx_kl"] < 1e-10 < each["approx_kl/red"]
  # ... and the update is AdamW's first, with the mean of both gradients: g / (|g| + eps).
  total, _ = results(run.calls, "accumulate")[-1]
  base = pretrained.load(folder / "model").params["unet"]
  norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(total))) / 2

  def updated(p, g):
    g = g / 2 / max(norm, 1)
    return p - 1e-2 * (g / (np.abs(g) + 1e-2) + 1e-2 * p)

  expected = jax.tree.map(updated, base, total)
  (state,) = results(run.calls, "apply")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected
  )
  assert not [w for w in recwarn if "donated" in str(w.message)]


def test_the_policy_learns(folder, tmp_path):
  Run(folder, tmp_path, task=(cases.task(folder),), iterations=30, checkpoint_every=0, pretrain_weight=0.0)
  rewards = np.array([line["reward/red/mean"] for line in cases.metrics(tmp_path)])
  print(rewards)
  print(np.array([line["reward/red/std"] for line in cases.metrics(tmp_path)]))
