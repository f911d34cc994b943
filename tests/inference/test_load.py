"""What sampling, evaluation and export read is what was trained."""

import os
import shutil

import jax
import numpy as np
import pytest
import train_cases as cases

from rlft.inference import load as finetuned
from rlft.models import lora, stable_diffusion
from rlft.models.files import lora_files, pretrained
from rlft.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


@pytest.fixture(scope="module")
def base(folder):
  return pretrained.load(folder / "model").params


@pytest.fixture(scope="module")
def lora_run(folder, base, tmp_path_factory):
  """A run that began with an adapter and was told other options than the model's."""
  workdir = tmp_path_factory.mktemp("lora")
  adapter = lora.init(jax.random.key(1), base["unet"], rank=2)
  lora_files.save(workdir / "start.safetensors", adapter, scale=1.0)
  cases.run(
    cases.config(
      folder,
      workdir,
      task=(cases.task(folder),),
      pretrain_weight=0.0,
      train_timesteps=1,
      image_size="8x4",
      scheduler="timestep_spacing=trailing",
      init_lora=str(workdir / "start.safetensors"),
      ema_decay=0.5,
    )
  )
  return workdir


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_directory_of_a_model(folder, base):
  found = finetuned.load(str(folder / "model"))
  assert_equal(found.model.params, base)
  assert found.config is None and found.lora is None and found.iteration == 0


def test_a_run(folder, base):
  workdir = cases.uninterrupted(folder)
  found = finetuned.load(str(workdir))
  assert_equal(found.model.params["unet"], cases.final_state(workdir)["params"])
  assert_equal(found.model.params["vae"], base["vae"])
  assert found.iteration == 3 and found.lora is None
  assert found.config == cases.config(folder, workdir, iterations=3)
  assert found.started_in == os.getcwd()


@pytest.mark.parametrize("ema", [True, False])
def test_a_run_of_lora(lora_run, base, ema):
  found = finetuned.load(str(lora_run), ema=ema)
  state = cases.final_state(lora_run)
  adapter = state["ema" if ema else "params"]
  assert_equal(found.lora, adapter)
  assert found.lora_scale == 1.0 and found.iteration == 2
  unet = found.model.params["unet"]
  for path, shape in lora.targets(base["unet"]).items():
    new, old = unet, base["unet"]
    for name in (*path.split("/"), "kernel"):
      new, old = new[name], old[name]
    change = adapter[path]["a"] @ adapter[path]["b"]
    assert change.shape == shape and np.abs(change).max() > 1e-6
    np.testing.assert_allclose(new, old + change, rtol=1e-6, atol=1e-7)
  assert_equal(unet["conv_in"], base["unet"]["conv_in"])


def test_a_model_is_set_as_the_run_was(lora_run, folder):
  found = finetuned.load(str(lora_run))
  assert found.config.policy.lora_rank == 2
  found = found.model
  assert found.scheduler["timestep_spacing"] == "trailing"
  assert stable_diffusion.image_size(found) == (8, 4)
  other = {"scheduler": "timestep_spacing=linspace,steps_offset=0", "image_size": "12"}
  for path in (lora_run, folder / "model"):
    found = finetuned.load(str(path), **other).model
    assert (found.scheduler["timestep_spacing"], found.scheduler["steps_offset"]) == ("linspace", 0)
    assert stable_diffusion.image_size(found) == (12, 12)


@pytest.mark.parametrize("format", lora_files.FORMATS)
def test_an_adapter_from_a_file_is_merged(folder, base, format, tmp_path):
  rng = np.random.RandomState(4)
  adapter = {
    path: {"a": rng.normal(size=(n, 2)), "b": rng.normal(size=(2, m))}
    for path, (n, m) in lora.targets(base["unet"]).items()
  }
  file = tmp_path / "adapter.safetensors"
  lora_files.save(file, adapter, scale=0.5, format=format)
  found = finetuned.load(str(folder / "model"), lora=str(file)).model.params
  expected = lora.merge(base["unet"], adapter, 0.5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found["unet"], expected)
  assert_equal(found["vae"], base["vae"])
  for wrong, message in (("nowhere", "does not exist: give a saf"), (__file__, "no safetensors")):
    with pytest.raises(UserError, match=message):
      finetuned.load(str(folder / "model"), lora=wrong)


def test_an_adapter_from_a_file_on_a_run_whose_base_has_moved(lora_run, folder, tmp_path):
  adapter, scale = (getattr(finetuned.load(str(lora_run)), n) for n in ("lora", "lora_scale"))
  file = tmp_path / "adapter.safetensors"
  lora_files.save(file, adapter, scale=-scale)
  moved = shutil.copytree(folder / "model", tmp_path / "moved")
  found = finetuned.load(str(lora_run), base=str(moved), lora=str(file)).model.params["unet"]
  # The run's own adapter is taken away again.
  plain = pretrained.load(folder / "model").params["unet"]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, plain)


def test_a_run_that_has_no_checkpoint_yet(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="has no checkpoint yet: wait for the run's first"):
    finetuned.load(str(tmp_path))


def test_a_checkpoint_that_cannot_be_read(lora_run, tmp_path):
  run = shutil.copytree(lora_run, tmp_path / "run")
  (step,) = (run / "checkpoints").iterdir()
  for path in (step / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match=f"checkpoint {step.name} in .* cannot be read") as error:
    finetuned.load(str(run))
  assert "\n" not in str(error.value)
  assert step.exists()  # Only the run itself sets it aside.


def test_a_base_model_that_has_moved_or_changed(lora_run, base, folder, tmp_path):
  kept = (folder / "model").rename(tmp_path / "kept")
  try:
    with pytest.raises(UserError, match="--pretrained") as error:
      finetuned.load(str(lora_run))
    assert str(error.value).startswith(
      f"the base model of the run in {lora_run}: {folder / 'model'} is not a directory"
    )
    assert "\n" not in str(error.value)
    assert_equal(finetuned.load(str(lora_run), base=str(kept)).model.params["vae"], base["vae"])
    with pytest.raises(UserError, match="nowhere is not a directory"):
      finetuned.load(str(lora_run), base="nowhere")
    with pytest.raises(UserError, match="has no effect: .*kept is no run, leave it out"):
      finetuned.load(str(kept), base=str(kept))
    pretrained.save(folder / "model", cases.tiny_model(seed=3))
    with pytest.raises(UserError, match="from another model than is now in .*model: restore"):
      finetuned.load(str(lora_run))
  finally:
    shutil.rmtree(folder / "model")
    kept.rename(folder / "model")
