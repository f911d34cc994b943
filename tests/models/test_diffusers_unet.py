"""diffusers' own Flax UNet in the place of ours."""

import dataclasses
from importlib import metadata

import jax
import models_cases
import numpy as np
import pytest
import train_cases as cases

from rlft.models import diffusers_unet, unet
from rlft.models.files import pretrained
from rlft.types import UserError


def widened(name, **changes):
  """A UNet of `models_cases` with the 32 groups that the class has."""
  config = models_cases.MODULES[name].config
  channels = tuple(32 * 2 ** (i > 0) for i in range(len(config.block_out_channels)))
  config = dataclasses.replace(config, norm_num_groups=32, block_out_channels=channels)
  return unet.UNet2DCondition(dataclasses.replace(config, **changes))


@pytest.fixture
def flax_diffusers():
  diffusers = pytest.importorskip("diffusers")
  if not hasattr(diffusers, "FlaxUNet2DConditionModel"):
    pytest.skip("this diffusers has no Flax classes")


@pytest.mark.parametrize("name", ["unet_sd2", "unet_sdxl"])
def test_it_computes_nearly_what_ours_does(flax_diffusers, name):
  ours = widened(name)
  params = models_cases.random_params(ours, seed=1)
  theirs = diffusers_unet.make(ours)
  given = models_cases.unet_inputs(name)
  expected, found = (
    np.asarray(jax.jit(one.apply)({"params": params}, *given)) for one in (ours, theirs)
  )
  error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
  # Not the same: the epsilon of some norms and the GELU differ.
  assert 1e-7 < error < 2e-3, error


def test_a_run_with_it(flax_diffusers, tmp_path):
  folder = cases.make_folder(tmp_path / "folder")
  model = cases.tiny_model()
  network = unet.UNet2DCondition(
    dataclasses.replace(model.unet.config, block_out_channels=(32,), norm_num_groups=32)
  )
  params = {**model.params, "unet": models_cases.random_params(network, seed=2)}
  pretrained.save(folder / "model", dataclasses.replace(model, unet=network, params=params))
  cases.run(
    cases.config(
      folder,
      tmp_path / "run",
      task=(cases.task(folder),),
      iterations=3,
      pretrain_weight=0.0,
      train_timesteps=1,
      sampling_steps=2,
      lora_rank=2,
      backend="diffusers",
    )
  )
  lines = cases.metrics(tmp_path / "run")
  assert len(lines) == 3
  for line in lines:
    assert line["ratio/max_abs_deviation"] <= 1e-5
  adapter = cases.final_state(tmp_path / "run")["params"]
  assert adapter and all(np.abs(factors["b"]).max() > 1e-4 for factors in adapter.values())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"remat": True}, "keeps all activations: give --noremat"),
    ({"attention": "splash"}, "has its own attention: leave --attention=splash out"),
    ({"config": {"norm_num_groups": 8}}, "has norm_num_groups=32, but this model 8: leave"),
    ({"config": {"norm_eps": 1e-3}}, "has norm_eps=1e-05, but this model 0.001: leave"),
  ],
)
def test_what_it_cannot_do_is_refused(monkeypatch, changes, message):
  monkeypatch.setattr(metadata, "version", lambda name: "0.39.0")
  module = widened("unet_sd2", **changes.pop("config", {})).clone(**changes)
  with pytest.raises(UserError, match=message) as error:
    diffusers_unet.make(module)
  assert "\n" not in str(error.value)


def missing(name):
  raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
  ("version", "message"),
  [
    (missing, "diffusers is not installed: pip install"),
    (lambda name: "0.40.0.dev0", "diffusers 0.40.0.dev0 has no Flax classes, 0.39 was the last"),
    (lambda name: "1.0", "diffusers 1.0 has no Flax classes"),
  ],
)
def test_without_a_diffusers_that_has_it(monkeypatch, version, message):
  monkeypatch.setattr(metadata, "version", version)
  with pytest.raises(UserError, match=f"--backend=diffusers: {message}.*leave --backend out"):
    diffusers_unet.make(widened("unet_sd2"))
