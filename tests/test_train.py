"""Whole runs of the trainer on a tiny model: what they write, and what they learn."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboard_cases
import train_cases as cases

from rlft.config.settings import EvalConfig
from rlft.diffusion.policy import make_policy
from rlft.inference import load as finetuned
from rlft.models import lora
from rlft.models.files import pretrained
from rlft.parallel.compiled import compilations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


class Run:
  """A run of two tasks, one of them with scores that are NaN, unless `changes` say otherwise.

  Attributes:
    workdir: its directory.
    evals: its evaluations.
    metrics: the lines of `metrics.jsonl`.
    compiled: the names of what XLA compiled.
  """

  def __init__(self, folder, workdir, *, devices=1, **changes):
    self.workdir = workdir
    tasks = cases.task(folder), cases.task(folder, "spread", "host:spread", images_per_prompt=2)
    config = cases.config(folder, workdir, **({"task": tasks, "max_nan_share": 0.5} | changes))
    self.evals, self._calls = config.eval, []
    with compilations() as self.compiled:
      cases.run(config, devices=devices, calls=self._calls)
    self.metrics = cases.metrics(workdir)

  def calls(self, name):
    """The calls of one program."""
    return [call for call in self._calls if call.name == name]


@pytest.fixture(scope="module")
def one_device(folder, tmp_path_factory):
  return Run(folder, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
  """As `one_device`; also evaluates, one of two metrics at another guidance, too."""
  evals = tuple(
    EvalConfig(
      task.name,
      task.prompts,
      task.reward,
      images=16,
      images_per_prompt=2,
      base_guidance=guidance,
    )
    for task, guidance in (
      (cases.task(folder), cases.GUIDANCE),
      (cases.task(folder, "spread", "host:spread"), 4.0),
    )
  )
  return Run(folder, tmp_path_factory.mktemp("sharded"), devices=8, fsdp=4, eval=evals)


@pytest.fixture(scope="module")
def gradient_at(folder):
  """The loss of policy gradients, written out: (params, index, latents, text, advantages)."""
  policy = make_policy(pretrained.load(folder / "model"), sampling_steps=3, guidance_scale=2.0)

  def loss(params, index, latents, text, advantages):
    steps = latents[index], latents[index + 1]
    log_probs, _ = policy.log_prob(lora.Weights(params), index, *steps, text)
    return -jnp.mean(advantages * log_probs)

  return jax.jit(jax.grad(loss))


def test_metrics(sharded):
  assert [line["iteration"] for line in sharded.metrics] == [0, 1]
  for line in sharded.metrics:
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
    assert line["grad_norm"] > 0 and line["loss/pretrain"] > 0 and line["pretrain/grad_norm"] > 0


def test_an_image_without_a_score_is_counted_and_left_out(sharded):
  # An iteration has 4 sets; that of one prompt has no score.
  assert {line["reward/spread/unscored"] for line in sharded.metrics} == {0.25}
  updates = [(np.asarray(c.args[3]), np.asarray(c.args[4])) for c in sharded.calls("update")]
  assert sorted(int((~mask).sum()) for _, mask in updates) == [0] * 4 + [2] * 4
  for advantages, mask in updates:
    assert np.isfinite(advantages).all() and not advantages[~mask].any()
    assert advantages.sum() == pytest.approx(0, abs=1e-4)


def test_what_a_run_leaves(sharded):
  workdir = sharded.workdir
  found = json.loads((workdir / "eval.json").read_text())
  for when in ("before", "after"):
    assert found[when].keys() == {"red", "spread"}
    red = found[when]["red"]
    assert red["images"] == 16 and red["low"] < red["mean"] < red["high"]
    assert found[when]["spread"]["unscored"] == 2  # of 8 sets, with 5 prompts
  assert found["before"]["red"]["mean"] != found["after"]["red"]["mean"]
  # The base at its best: where that is the run's own guidance it is what was measured before.
  best = found["best_base"]
  assert (best["red"]["guidance"], best["spread"]["guidance"]) == (cases.GUIDANCE, 4.0)
  assert best["red"]["mean"] == found["before"]["red"]["mean"]
  assert best["spread"]["mean"] != found["before"]["spread"]["mean"]
  assert found["difference_to_best_base"]["red"] == found["difference"]["red"]
  assert json.loads((workdir / "config.json").read_text())["learning_rate"] == 1e-2
  page = (workdir / "report.html").read_text()
  assert "Reward: red" in page and "data:image/png;base64," in page
  # Trackers get evaluations and pictures as well.
  found = {
    (event.step, value.tag)
    for event in tensorboard_cases.events(workdir)
    for value in event.summary.value
  }
  wanted = {"eval/red/mean", "samples/red/0"}
  assert found >= {(iteration, tag) for iteration in (0, 2) for tag in wanted}
  assert (1, "grad_norm") in found
  grids = sorted(path.name for path in (workdir / "grids" / "red").glob("*.png"))
  assert grids == ["000000.png", "000002.png"]


def test_each_program_is_compiled_once(sharded):
  for name in ("update", "normalise", "pretrain"):
    assert sharded.compiled.count(f"jit({name})") == 1, name
  # The base model at another guidance is another program.
  assert sharded.compiled.count("jit(sample)") == 2


def test_golden(one_device):
  # What changes these numbers changes everyone's runs.
  expected = {
    "reward/red/mean": 0.2396973,
    "reward/red/std": 0.03108844,
    "reward/spread/mean": 0.1909572,
    "approx_kl": 5.047824e-5,
    "grad_norm": 0.6134316,
    "loss/pretrain": 0.9700570,
    "pretrain/grad_norm": 0.1224805,
  }
  # Other prompts, noise and pairs, and weights that the first iteration has changed.
  later = {
    "reward/red/mean": 0.1702275,
    "reward/spread/mean": 0.2199797,
    "approx_kl": 1.275276e-2,
    "grad_norm": 4.579622,
    "loss/pretrain": 1.031091,
    "pretrain/grad_norm": 0.1385415,
  }
  for line, values, error in zip(one_device.metrics, (expected, later), (1e-4, 1e-2), strict=True):
    assert {name: line[name] for name in values} == pytest.approx(values, rel=error)


def test_with_all_optimisations_of_xla(folder, tmp_path, one_device):
  """As users run it; what else is tested here is compiled in a third of the time."""
  config = cases.config(folder, tmp_path, iterations=1, pretrain_weight=0.0)
  process = cases.start(config, JAX_DISABLE_MOST_OPTIMIZATIONS="false", XLA_FLAGS="")
  _, said = process.communicate(timeout=600)
  assert process.returncode == 0, said
  (line,) = cases.metrics(tmp_path)
  assert line["ratio/max_abs_deviation"] <= 1e-5
  name = "reward/red/mean"
  assert line[name] == pytest.approx(one_device.metrics[0][name], rel=1e-4)


def test_any_number_of_devices_gives_the_same(one_device, sharded):
  """Up to the order of float32 sums: 2e-5 of an array's largest value, after two iterations."""

  def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

  for expected, found in zip(one_device.calls("update"), sharded.calls("update"), strict=True):
    _, path, text, advantages, _, _ = expected.args
    jax.tree.map(assert_close, found.args[1:4], (path, text, advantages))
  expected, found = (cases.final_state(run.workdir) for run in (one_device, sharded))
  jax.tree.map(assert_close, found["params"], expected["params"])
  for expected, found in zip(one_device.metrics, sharded.metrics, strict=True):
    for name in expected:
      if name.startswith("reward/"):
        assert found[name] == pytest.approx(expected[name], rel=2e-5)


def test_a_run_goes_on_on_other_devices(folder, tmp_path, one_device, sharded):
  runs = []
  for run in (one_device, sharded):
    workdir = shutil.copytree(run.workdir, tmp_path / run.workdir.name)
    runs.append(Run(folder, workdir, iterations=3, eval=run.evals))
    assert runs[-1].metrics[:2] == run.metrics
  expected, found = (run.metrics[2] for run in runs)
  for name in ("reward/red/mean", "reward/spread/mean", "loss/pretrain", "grad_norm"):
    assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_parameters_and_optimizer_are_sharded(sharded):
  shapes = [leaf.shape for leaf in jax.tree.leaves(cases.final_state(sharded.workdir)["params"])]
  assert (64, 64) in shapes and (3, 3, 32, 16) in shapes
  # Before the first update, and after all.
  for call in (sharded.calls("update")[0], sharded.calls("pretrain")[-1]):
    adam = call.shards.opt[1][0]
    for tree in (call.shards.params, adam.mu, adam.nu):
      shards = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
      for shard, shape in zip(shards, shapes, strict=True):
        assert np.prod(shard) * (4 if np.prod(shape) >= 4096 else 1) == np.prod(shape)


def test_parts_of_a_batch_give_the_same(folder, tmp_path, one_device):
  run = Run(folder, tmp_path, devices=4, microbatch=1, decode_chunk=1)
  for line, expected in zip(run.metrics, one_device.metrics, strict=True):
    assert line["ratio/max_abs_deviation"] <= 1e-5
    for name in ("reward/red/mean", "reward/spread/mean", "grad_norm", "loss/pretrain"):
      assert line[name] == pytest.approx(expected[name], rel=1e-4)


def test_bfloat16_throughout(folder, tmp_path, one_device):
  """The network, its parameters and Adam's moments; ratios, latents and the master are float32."""
  half = {name: "bfloat16" for name in ("compute_dtype", "param_dtype", "moments_dtype")}
  run = Run(folder, tmp_path, devices=2, fsdp=2, ema_decay=0.5, pretrain_weight=0.0, **half)
  for line, expected in zip(run.metrics, one_device.metrics, strict=True):
    assert line["ratio/max_abs_deviation"] <= 1e-5
    assert line["reward/red/mean"] == pytest.approx(expected["reward/red/mean"], rel=0.05)
  path = run.calls("update")[-1].args[1]
  assert path.latents.dtype == path.log_probs.dtype == np.float32
  state = cases.final_state(tmp_path)
  master, params = state["opt"]["master"], state["params"]
  for low, high in zip(jax.tree.leaves(params), jax.tree.leaves(master), strict=True):
    assert low.dtype == jnp.bfloat16 and high.dtype == np.float32
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))
  # What is exported are the averages, else the master.
  found = finetuned.load(str(tmp_path), ema=False).model.params["unet"]
  jax.tree.map(np.testing.assert_array_equal, found, master)


def test_lora_with_kl_and_average(folder, tmp_path):
  run = Run(
    folder,
    tmp_path,
    task=(cases.task(folder),),
    pretrain_weight=0.0,
    train_timesteps=1,
    lora_rank=2,
    kl_weight=0.1,
    ema_decay=0.75,
    iterations=3,
  )
  # At first the adapter changes nothing.
  assert run.metrics[0]["kl_to_base/red"] <= 1e-10
  assert all(line["kl_to_base/red"] > 1e-8 for line in run.metrics[1:])
  assert all(line["ratio/max_abs_deviation"] <= 1e-5 for line in run.metrics)
  assert all(line["grad_norm"] > 0 for line in run.metrics)

  adapter = cases.final_state(tmp_path)["params"]
  assert adapter and all(factors.keys() == {"a", "b"} for factors in adapter.values())
  assert all(factors["b"].any() for factors in adapter.values())
  frozen = jax.tree.map(np.asarray, run.calls("update")[-1].args[0])
  base = pretrained.load(folder / "model").params
  jax.tree.map(np.testing.assert_array_equal, frozen, {name: base[name] for name in frozen})
  assert "unet" in frozen

  # E_1 = (3 E_0 + P_1) / 4, and b is 0 in E_0; then E_2 = (3 E_1 + P_2) / 4.
  first, second, _ = (call.result for call in run.calls("average"))
  for path in adapter:
    b1, b2 = first.params[path]["b"], second.params[path]["b"]
    np.testing.assert_allclose(first.ema[path]["b"], b1 / 4, rtol=1e-6)
    expected = 3 * b1 / 16 + b2 / 4
    np.testing.assert_allclose(second.ema[path]["b"], expected, rtol=1e-6, atol=1e-9)


# One device takes its 8 images at one timestep after the other, each of eight its one at both.
@pytest.mark.parametrize("devices", [1, 8])
def test_accumulated_timesteps_make_one_update(
  folder, tmp_path, one_device, gradient_at, recwarn, devices
):
  run = Run(
    folder,
    tmp_path,
    devices=devices,
    task=(cases.task(folder),),
    pretrain_weight=0.0,
    accumulate_timesteps=True,
    iterations=1,
  )
  # No timestep sees another's update ...
  line, each = run.metrics[0], one_device.metrics[0]
  assert line["reward/red/mean"] == pytest.approx(each["reward/red/mean"], rel=1e-6)
  assert line["approx_kl"] < 1e-10 < each["approx_kl/red"]
  assert line["ratio/max_abs_deviation"] <= 1e-5
  # ... and the update is AdamW's first, with the mean g of two gradients: g / (|g| + eps). The
  # ratio is 1, so that a gradient is that of the advantage times the log-probability.
  (call,) = run.calls("update")
  _, path, text, advantages, _, indices = jax.tree.map(np.asarray, call.args)
  assert indices.shape == (2,)
  params = pretrained.load(folder / "model").params["unet"]
  both = [gradient_at(params, index, path.latents, text, advantages) for index in indices]
  gradient = jax.tree.map(lambda a, b: (a.astype(np.float64) + b) / 2, *jax.device_get(both))
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
  assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)

  def updated(p, g):
    g = g / max(norm, 1)
    return p - 1e-2 * (g / (np.abs(g) + 1e-2) + 1e-2 * p)

  state, _ = call.result
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    state.params,
    jax.tree.map(updated, params, gradient),
  )
  assert not [warning for warning in recwarn if "donated" in str(warning.message)]


def test_the_policy_learns(folder, tmp_path):
  run = Run(folder, tmp_path, task=(cases.task(folder),), pretrain_weight=0.0, iterations=30)
  rewards = np.array([line["reward/red/mean"] for line in run.metrics])
  # The mean of 80 images, whose deviation is 0.016, has a standard error of 0.002.
  assert rewards[-10:].mean() > rewards[:10].mean() + 0.012
