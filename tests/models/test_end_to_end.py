"""From prompts to images as diffusers' pipelines make them: stored numbers, and live."""

import functools

import models_cases
import numpy as np
import pipeline_cases
import pytest

flax_outputs = functools.cache(pipeline_cases.flax_outputs)


def check(found, expected):
  """Tokens and timesteps are the same, everything else to 1e-4 of the size of what it is."""
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
    tolerance = 1e-4 * max(1.0, np.abs(value).max()) if value.dtype == np.float32 else 0
    np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", pipeline_cases.KINDS)
def test_images_are_those_that_diffusers_drew(kind):
  with np.load(models_cases.FIXTURES / "pipeline.npz") as stored:
    prefix = f"{kind}/"
    expected = {k.removeprefix(prefix): stored[k] for k in stored if k.startswith(prefix)}
  assert expected["images"].std() > 0.1  # neither black nor white
  check(flax_outputs(kind), expected)


@pytest.mark.parametrize("kind", pipeline_cases.KINDS)
def test_images_are_those_that_diffusers_draws(kind):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  check(flax_outputs(kind), pipeline_cases.torch_outputs(kind))


def test_the_second_encoder_of_sdxl_counts():
  found = flax_outputs("sdxl")
  assert found["text"].shape == (2, 16, 32 + 24) and found["pooled"].shape == (2, 12)
  # Padding differs between the tokenizers, the prompt does not.
  first, second = found["ids"][:, 0], found["ids"][:, 1]
  assert (first == second)[:, :4].all() and not (first == second)[:, -1].any()
  assert not found["empty_text"].any() and not found["empty_pooled"].any()
