"""Ahead-of-time compilation: what programs cost, what devices tell each other, and its command."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest
import train_cases

from rlft.config import fields
from rlft.config.settings import Config, TaskConfig
from rlft.parallel import sharding
from rlft.parallel.compiled import compilations
from rlft.performance.compile import ahead, communication, hlo, targets
from rlft.performance.compile.abstract_run import AbstractRun
from rlft.performance.compile.ahead import CompileConfig
from rlft.types import UserError

CONFIG = fields.make(
  Config,
  task=(TaskConfig(name="a", prompts="-", reward="-", batch_size=16, images_per_prompt=2),),
  sampling_steps=3,
  train_timesteps=2,
  guidance_scale=1.0,
  pretrain_weight=0.0,
  ema_decay=0.9,
  compute_dtype="float32",
  fsdp=4,
)


@pytest.fixture(scope="module")
def target():
  return targets.open_target("cpu:8", 4)


@pytest.fixture(scope="module")
def run(target):
  return AbstractRun.of(CONFIG, target.mesh, train_cases.tiny_model(channels=32))


# What XLA's text says.

HLO = """
HloModule m, entry_computation_layout={()->()}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %a)
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%x), dimensions={0}
  %done = bf16[32,128]{1,0} all-gather-done(%start)
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(50)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (q: f32[64]) -> f32[16] {
  %q = f32[64]{0} parameter(0)
  %loop = (s32[], bf16[8,128]{1,0}) while(%t), condition=%condition, body=%body
  %twice = (s32[], bf16[8,128]{1,0}) while(%t), condition=%c2, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
  %all = (f32[64]{0}, f32[64]{0}) all-reduce(%q, %q), to_apply=%sum
  ROOT %rs = f32[16]{0} reduce-scatter(%q), dimensions={0}, to_apply=%sum
}
"""


def test_collectives_of_a_text():
  assert hlo.total(hlo.collectives(HLO)) == {
    "all-gather": (52, 52 * 32 * 128 * 2),
    "reduce-scatter": (1, 64 * 4),
    "all-reduce": (1, 2 * 64 * 4),
  }


def test_work_is_multiplied_out():
  def function(x, w):
    def step(x, _):
      return jnp.tanh(x @ w), None

    return jax.lax.platform_dependent(
      jax.lax.scan(step, x, length=5)[0], cpu=lambda x: x @ w @ w, default=lambda x: x @ w
    )

  traced = jax.jit(function).trace(jnp.ones((3, 7)), jnp.ones((7, 7)))
  assert hlo.flops(traced.jaxpr) == 6 * 2 * 3 * 7 * 7  # Five steps, and the default.
  assert hlo.product_bytes(traced.jaxpr) == 6 * 4 * (3 * 7 + 7 * 7 + 3 * 7)

  def convolution(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers).sum()

  arrays = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
  assert hlo.flops(jax.jit(convolution).trace(*arrays).jaxpr) == 2 * 2 * 8 * 8 * 9 * 3 * 5
  moved = 2 * 8 * 8 * 3 + 3 * 3 * 3 * 5 + 2 * 8 * 8 * 5
  assert hlo.product_bytes(jax.jit(convolution).trace(*arrays).jaxpr) == 4 * moved
  # The kernel's gradient is as much work again; that of the image is not asked for.
  gradient = jax.jit(jax.grad(convolution, argnums=1)).trace(*arrays)
  assert hlo.flops(gradient.jaxpr) == 2 * (2 * 2 * 8 * 8 * 9 * 3 * 5)

  attention = jax.jit(jnp.matmul).trace(jnp.ones((2, 4, 8)), jnp.ones((2, 8, 4)))
  assert (hlo.flops(attention.jaxpr), hlo.product_bytes(attention.jaxpr)) == (2 * 2 * 4 * 8 * 4, 0)


# What devices tell each other.


@pytest.mark.parametrize("algorithm", ["policy-gradient", "raft?one_in=2"])
def test_an_update_gathers_parameters_and_scatters_gradients_and_nothing_else(
  run, target, algorithm
):
  if algorithm != "policy-gradient":
    config = fields.replace(CONFIG, algorithm=algorithm, train_timesteps=5)
    run = AbstractRun.of(config, target.mesh, run.model)
  (call,) = (call for call in run.calls() if call.name == "update")
  found = ahead.compile_program(call, target)
  size = sum(x.size * 4 for x in jax.tree.leaves(run.state.params))
  assert communication.surprises(found.collectives, call.theory, size) == ()
  # Nearly all parameters are spread over four devices: the theory is about something.
  assert call.theory["all-gather"] == call.theory["reduce-scatter"] > 0.9 * size
  assert found.flops > 0 and found.arguments > 2 * size / 4 and found.fits


@pytest.mark.parametrize("name", ["sample", "pretrain"])
def test_other_programs_gather_what_they_use(run, target, name):
  config = fields.replace(CONFIG, pretrain_weight=0.1, pretrain_batch_size=8)
  run = AbstractRun.of(config, target.mesh, run.model)
  call = next(call for call in run.calls() if call.name == name)
  found = ahead.compile_program(call, target).collectives
  assert found["all-gather"][1] == pytest.approx(call.theory["all-gather"], rel=0.01)
  size = sum(x.size * 4 for x in jax.tree.leaves(run.state.params))
  assert communication.surprises(found, call.theory, size) == ()


@pytest.mark.parametrize("how", ["gathered", "exchanged"])
def test_an_activation_that_moves_is_noticed(target, how):
  def local(w, x):
    whole = sharding.gather(w, P("fsdp"))
    y = x @ whole
    if how == "gathered":
      return jax.lax.all_gather(y, ("data", "fsdp"), tiled=True).sum(0)
    return jax.lax.all_to_all(y, "fsdp", 0, 1, tiled=True).sum(0)

  spread = jax.ShapeDtypeStruct(
    (64, 64), jnp.float32, sharding=jax.NamedSharding(target.mesh, P("fsdp"))
  )
  rows = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding.batch(target.mesh))
  program = jax.jit(
    sharding.on_each(
      target.mesh, local, in_specs=(P("fsdp"), sharding.ROWS), out_specs=sharding.ROWS
    )
  )
  found = hlo.total(hlo.collectives(program.lower(spread, rows).compile().as_text()))
  theory = communication.expected(target.mesh, gathers=[spread], scatters=[])
  surprises = communication.surprises(found, theory, 64 * 64 * 4)
  # The gathered rows are as large as the weight.
  (line,) = surprises if how == "gathered" else surprises[-1:]
  assert line.startswith("all-gather: 0.0 MiB in 2" if how == "gathered" else "all-to-all")


def test_gradients_may_be_summed_whole_if_they_are_few():
  theory = {"all-gather": 1000, "reduce-scatter": 10_000, "all-reduce": 500}
  found = {"all-gather": (1, 1000), "reduce-scatter": (9, 9500), "all-reduce": (2, 1000)}
  assert communication.surprises(found, theory, 10_000) == ()
  found |= {"reduce-scatter": (1, 0), "all-reduce": (9, 10_500)}
  assert len(communication.surprises(found, theory, 10_000)) == 2
  assert len(communication.surprises({}, theory, 10_000)) == 2  # the all-gather is below the slack


def test_float32_may_be_gathered_in_half_precision_where_that_is_said():
  theory = {"all-gather": 100_000}
  for size, sparable, count in ((50_000, 0, 1), (50_000, 50_000, 0), (40_000, 50_000, 1)):
    found = {"all-gather": (3, size)}
    assert len(communication.surprises(found, theory, 100_000, sparable)) == count
  assert len(communication.surprises({"all-gather": (3, 102_000)}, theory, 100_000, 50_000)) == 1


def test_nothing_is_sparable_on_cpus(run):
  assert not any(call.sparable for call in run.calls())


def test_the_gradients_of_an_adapter_may_be_summed_whole():
  theory = {"all-gather": 100_000, "reduce-scatter": 4000, "all-reduce": 500}
  found = {"all-gather": (1, 100_000), "reduce-scatter": (1, 500), "all-reduce": (9, 4000)}
  assert communication.surprises(found, theory, 100_000) == ()
  found |= {"all-reduce": (9, 8000)}
  assert len(communication.surprises(found, theory, 100_000)) == 1


# The command.


def settings(tmp_path, **changes):
  given = {"target": "cpu:8", "architecture": "sd2-base", "cache_dir": str(tmp_path)}
  return CompileConfig(**(given | changes))


def test_a_command_given_again_compiles_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(ahead, "open_model", lambda *_: train_cases.tiny_model(channels=32))
  output = tmp_path / "found.json"
  chosen = settings(tmp_path, programs="average", json=str(output))
  with compilations() as names:
    ahead.compile_run(CONFIG, chosen)
    table = capsys.readouterr().out
    assert names.count("jit(average)") == 1
    ahead.compile_run(CONFIG, chosen)
    assert names.count("jit(average)") == 1
  assert capsys.readouterr().out == table
  assert "| average | 1 |" in table and "sd2-base on cpu:8: 8 devices, 2 x 4" in table
  (found,) = json.loads(output.read_text())["programs"]
  state = AbstractRun.of(CONFIG, targets.open_target("cpu:8", 4).mesh, train_cases.tiny_model())
  assert found["name"] == "average" and found["arguments"] > 0 and state.resident() > 0


def test_what_does_not_fit_is_an_error_after_the_table(tmp_path, monkeypatch, capsys):
  def small(*args):
    return fields.replace(targets_open(*args), memory=1000.0)

  targets_open = targets.open_target
  monkeypatch.setattr(targets, "open_target", small)
  monkeypatch.setattr(ahead, "open_model", lambda *_: train_cases.tiny_model())
  with pytest.raises(UserError, match="average does not fit cpu:8.*lower --microbatch"):
    ahead.compile_run(CONFIG, settings(tmp_path, programs="average"))
  assert "**does not fit**" in capsys.readouterr().out


@pytest.mark.parametrize(
  "changes, config, words",
  [
    ({"target": "gpu:8"}, {}, "--target=gpu:8 is not known: give cpu:8"),
    ({"target": "v6e:8"}, {}, "--target=v6e:8 is not known"),
    ({"target": "cpu:8"}, {"fsdp": 3}, "--fsdp=3 does not divide the 8 devices"),
    ({"architecture": ""}, {}, "either --pretrained or --architecture"),
    ({}, {"pretrained": "emoji-sd"}, "either --pretrained or --architecture"),
    ({}, {"task": ()}, "--task is missing"),
    ({}, {"train_timesteps": 4}, "--train_timesteps=4 is more than"),
    ({"architecture": "sd3"}, {}, "architecture 'sd3' is unknown"),
  ],
)
def test_mistakes(tmp_path, changes, config, words):
  with pytest.raises(UserError, match=words):
    ahead.compile_run(fields.replace(CONFIG, **config), settings(tmp_path, **changes))


def test_an_unknown_program_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(ahead, "open_model", lambda *_: train_cases.tiny_model())
  with pytest.raises(UserError, match="--programs=updte: this run has none; did you mean update"):
    ahead.compile_run(CONFIG, settings(tmp_path, programs="updte"))


def test_without_a_compiler_the_table_says_that_it_is_estimated(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(ahead, "open_model", lambda *_: train_cases.tiny_model())
  ahead.compile_run(CONFIG, settings(tmp_path, target="v5e:2x4", programs="average"))
  table = capsys.readouterr().out
  assert "| at least 0% |" in table and "Estimated, not compiled" in table
  assert "Communication" not in table
