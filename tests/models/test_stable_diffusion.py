"""The size of a model's images."""

import dataclasses

import jax.numpy as jnp
import models_cases
import numpy as np
import pytest
import repository_cases

from rlft.models import stable_diffusion, text
from rlft.types import UserError


def test_sizes_of_the_flag():
  assert stable_diffusion.parse_size("") is None
  assert stable_diffusion.parse_size("512") == (512, 512)
  assert stable_diffusion.parse_size("512x768") == (512, 768)


@pytest.mark.parametrize("words", ["0", "-8", "512x", "512 x 768", "512,768", "large"])
def test_what_is_no_size(words):
  with pytest.raises(UserError, match=f"--image_size={words} is no size in pixels: write e.g. 512"):
    stable_diffusion.parse_size(words)


@pytest.mark.parametrize(
  ("own", "size", "latents"),
  [
    (8, None, 8),
    ((8, 4), None, (8, 4)),
    ((4, 4), None, 4),
    (None, (16, 24), (4, 6)),
    (8, (16, 16), 4),
  ],
)
def test_latents_of_a_size(own, size, latents):
  # Two levels of the UNet, and a VAE of four pixels for one.
  model = models_cases.tiny_pipeline()
  config = dataclasses.replace(model.unet.config, sample_size=own)
  found = stable_diffusion.sized(config, model.vae.config, size)
  assert found == dataclasses.replace(config, sample_size=latents)


@pytest.mark.parametrize(
  ("own", "size", "words"),
  [
    (None, None, "unet/config.json: sample_size=None says nothing of the images' size: give"),
    ((8,), None, r"sample_size=\(8,\) says nothing"),
    ("8", None, "sample_size=8 says nothing"),
    (5, None, "images of 20x20 pixels do not fit .* multiples of 8: give --image_size=16x16"),
    (0, None, "images of 0x0 pixels do not fit"),
    (8, (16, 21), "images of 16x21 pixels do not fit .* give --image_size=16x24"),
  ],
)
def test_sizes_that_do_not_fit(own, size, words):
  model = models_cases.tiny_pipeline()
  config = dataclasses.replace(model.unet.config, sample_size=own)
  with pytest.raises(UserError, match=words):
    stable_diffusion.sized(config, model.vae.config, size)


def test_xl_is_told_where_its_images_come_from():
  model = repository_cases.tiny("sdxl")
  ids = jnp.asarray(model.tokenize(["a dog", "two cats"])[0])
  told = text.encode(model, model.params, ids, (16, 24))
  np.testing.assert_array_equal(told.sizes, [[16, 24, 0, 0, 16, 24]] * 2)
  sources = jnp.array([[40, 80, 0, 4], [16, 24, 0, 0]], jnp.int32)
  cut = text.encode(model, model.params, ids, (16, 24), sources)
  np.testing.assert_array_equal(cut.sizes, [[40, 80, 0, 4, 16, 24], [16, 24, 0, 0, 16, 24]])
  assert cut.sizes.dtype == told.sizes.dtype == jnp.float32
  np.testing.assert_array_equal(cut.pooled, told.pooled)
