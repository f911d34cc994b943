"""Sampling, update and iteration at a tiny size: the sides do the same work, and report it."""

import copy
import dataclasses
import sys
import types

import jax
import numpy as np
import pytest

from rlft import train
from rlft.diffusion import sampler
from rlft.models import vae
from rlft.parallel import cpu
from rlft.performance.benchmark import contest, policy, suites, torch_policy, torch_ports, trl
from rlft.performance.benchmark import work as work_lib
from rlft.types import UserError

STEPS = 2
_VAE = vae.VAEConfig(
  down_block_types=("DownEncoderBlock2D",),
  up_block_types=("UpDecoderBlock2D",),
  block_out_channels=(8,),
  norm_num_groups=4,
)


def architecture():
  small = work_lib.random_architecture((32,), (True,), heads=2, features=16, sample_size=4)
  return dataclasses.replace(small, vae=_VAE)


@pytest.fixture(scope="module", autouse=True)
def tiny():
  with pytest.MonkeyPatch.context() as patch:
    size = work_lib.Size(architecture, jax.device_count(), STEPS, 3.0, 1)
    patch.setattr(policy, "SIZES", {"tiny": size})
    patch.setattr(contest, "_PEAK_SIZES", {"cpu": 16})
    # Threads of PyTorch that wait for each other on busy cores would take most of the time.
    patch.setattr(torch_ports, "cores", lambda: 1)
    yield


def configured(what="iteration", **given):
  given = {"size": "tiny", "cpu_devices": jax.device_count(), "repeats": 1} | given
  return contest.BenchmarkConfig(what=what, **given)


WORKER = """
import json, sys
work = json.loads(sys.argv[1])
assert len(work["prompts"]) == work["batch_size"] and work["mixed_precision"] == "no"
print("ready", flush=True)
for line in sys.stdin:
  print("done", flush=True)
"""


@pytest.fixture(scope="module")
def iterated(tmp_path_factory):
  """An iteration of all sides but those that compile again, and what ours and PyTorch's held."""
  worker = tmp_path_factory.mktemp("trl") / "worker.py"
  worker.write_text(WORKER)
  seen = types.SimpleNamespace()
  run_task, draw = train.run_task, sampler.Sampler.draw

  def task(*args):
    seen.state, metrics = run_task(*args)
    seen.run = args[0]
    return seen.state, metrics

  def drawn(*args):
    result = draw(*args)
    if not hasattr(seen, "path"):  # Before the first update: from the weights on disk.
      seen.path, seen.images, seen.text = result.collected, result.images, result.text
    return result

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trl, "_WORKER", worker)
    patch.setattr(train, "run_task", task)
    patch.setattr(sampler.Sampler, "draw", drawn)
    patch.setattr(jax, "clear_caches", lambda: None)

    class Kept(torch_policy.Policy):
      def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        seen.policy, state = self, self.unet.state_dict()
        seen.weights = {name: value.clone() for name, value in state.items()}

      def close(self):
        pass

    patch.setattr(torch_policy, "Policy", Kept)
    patch.setattr(cpu, "split_host", lambda devices: None)  # For one device less is compiled.
    config = configured(cpu_devices=1, sides="trl,torch,rlft", trl_python=sys.executable)
    (seen.result,) = suites.run(config)
    yield seen


def test_an_iteration_of_each_side_is_timed(iterated):
  result = iterated.result
  assert list(result.sides) == ["rlft", "torch", "trl"]
  assert result.sides["rlft"].seconds and result.sides["trl"].seconds
  assert result.sides["torch"].seconds or result.sides["torch"].note.startswith("no ")
  assert result.count == 8 and result.peak > 0
  words = "8 images, latents of 4 x 4, 77 tokens, 2 steps, guidance 3, 1 timesteps trained, float32"
  assert result.about == words
  lines = contest.table([result], "images").splitlines()[1:]
  assert [line.split()[0] for line in lines] == ["tiny", "torch", "trl", "matrix"]


def test_sampling_and_update_run_our_programs(iterated):
  run, ids = iterated.run, iterated.run.model.tokenize(["a fish"] * 8)[0]
  numbers = {"batch_size": 8, "sampling_steps": STEPS, "guidance_scale": 3.0, "train_timesteps": 1}
  work = work_lib.Work(
    model=run.workdir,
    scratch=run.workdir,
    devices=1,
    dtype="float32",
    ids=ids,
    empty=ids[0],
    timesteps=(1,),
    prompts=(),
    **numbers,
  )
  images = policy.sampling(run, iterated.state, work)().images
  assert images.shape == (8, 4, 4, 3) and len(np.unique(np.asarray(images).mean((1, 2, 3)))) == 8
  indices, learning = [], run.programs.learning

  def update(state, *batch):
    # Traced, not compiled: that takes most of a minute.
    after, metrics = jax.eval_shape(learning.update, state, *batch)
    assert jax.tree.structure(after) == jax.tree.structure(state) and "grad_norm" in metrics
    indices.extend(batch[-1].tolist())
    return state, None

  watched = copy.copy(learning)
  watched.update = update
  programs = dataclasses.replace(run.programs, learning=watched)
  policy.update(dataclasses.replace(run, programs=programs), iterated.state, work)()
  assert indices == [1]


def test_pytorch_does_the_same_work(iterated):
  torch = pytest.importorskip("torch")
  theirs, path = iterated.policy, iterated.path
  latents = torch.tensor(np.asarray(path.latents)).permute(0, 1, 4, 2, 3)
  text = torch.tensor(np.asarray(iterated.text.prompt.text))
  empty = torch.tensor(np.asarray(iterated.text.empty.text))
  with torch.no_grad():
    theirs.unet.load_state_dict(iterated.weights)
    for index in range(STEPS):
      mean = theirs._mean(index, latents[index], torch.cat([empty, text]), None)
      found = theirs._log_prob(index, latents[index + 1], mean)
      np.testing.assert_allclose(found, path.log_probs[index], atol=1e-4)
    images = theirs._vae.decode(latents[-1] / theirs._vae.config.scaling_factor).sample
  images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
  np.testing.assert_allclose(images, iterated.images, atol=1e-4)
  # What PyTorch makes of the tokens itself: of the empty prompt, then of the others.
  states, _ = theirs._conditioning()
  np.testing.assert_allclose(states[:8].detach(), empty, atol=1e-4)


def test_pytorch_updates_every_parameter(iterated):
  torch = pytest.importorskip("torch")
  before = [parameter.detach().clone() for parameter in iterated.policy.unet.parameters()]
  assert np.isfinite(iterated.policy.update())
  pairs = zip(before, iterated.policy.unet.parameters(), strict=True)
  assert all(not torch.equal(a, b) for a, b in pairs)
  assert torch.isfinite(iterated.policy.sampling()[0]).all()


def test_what_diffusers_flax_unet_cannot_do_is_said():
  size = work_lib.Size(None, 8, 1, 1.0, 1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(policy, "SIZES", {"miniature": size})
    (result,) = suites.run(configured("sampling", size="miniature", sides="flax"))
  assert "diffusers" in result.sides["flax"].note  # Not installed, or without groups of 16.


def test_settings_of_a_training():
  text = "microbatch=16,remat=true,learning_rate=1e-3,attention=xla"
  assert policy.parse_settings(text) == {
    "microbatch": 16,
    "remat": True,
    "learning_rate": 1e-3,
    "attention": "xla",
  }


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"settings": "microbach=1"}, "called microbach: did you mean microbatch"),
    ({"settings": "microbatch=x"}, "--settings=microbatch=x is not a whole number: give one"),
    ({"settings": "remat"}, "--settings=remat is neither true nor false: give one of them"),
    ({"settings": "task=a"}, "--settings=task=a: no setting of a training is called task"),
    ({"train_timesteps": 3}, "--train_timesteps=3 is more than --sampling_steps=2"),
    ({"batch_size": 12}, "--batch_size=12 cannot be spread over 8 devices"),
    ({"size": "tin"}, "--size=tin is not known: did you mean tiny"),
    ({"sides": "trl", "trl_python": "/no/python"}, "--trl_python=/no/python cannot be run"),
  ],
)
def test_mistakes_are_one_line(given, message):
  with pytest.raises(UserError, match=message) as caught:
    suites.run(configured(**given))
  assert "\n" not in str(caught.value)


def test_a_process_that_ends_is_reported(tmp_path, monkeypatch):
  worker = tmp_path / "worker.py"
  worker.write_text("raise SystemExit('no module named trl')")
  monkeypatch.setattr(trl, "_WORKER", worker)
  with pytest.raises(UserError, match="TRL's process has ended: no module named trl"):
    suites.run(configured(sides="trl", trl_python=sys.executable))


def test_without_its_python_trl_is_left_out():
  (result,) = suites.run(configured(sides="trl"))
  assert "experiments/trl_venv.sh" in result.sides["trl"].note


def test_trl_is_left_out_where_it_cannot_sample():
  (result,) = suites.run(configured(sides="trl", guidance_scale=1.0, trl_python=sys.executable))
  assert "--guidance_scale=5" in result.sides["trl"].note
