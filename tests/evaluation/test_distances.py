"""Distances between distributions of pictures: closed forms, and the definition written out."""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import PIL.Image
import pytest

from rlft.config.settings import ScoringSettings
from rlft.evaluation import distances, guards, metric
from rlft.evaluation.evaluate import EvalSpec
from rlft.types import Prompt, UserError


def features(seed, count, size=5, shift=0.0):
  return np.random.RandomState(seed).normal(shift, 1, (count, size))


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_definition(x, y, kernel):
  """The unbiased estimate as it is written, pair by pair."""

  def k(a, b):
    return float(kernel(a[None], b[None])[0, 0])

  within = [
    np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)
  ]
  return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("kernel", [distances.gaussian, distances.cubic])
def test_contributions_are_the_jackknife_of_the_definition(kernel, monkeypatch):
  monkeypatch.setattr(distances, "_BLOCK", 3)
  x, y = unit(features(0, 7)), unit(features(1, 5, shift=0.5))
  found = distances.contributions(x, y, kernel)
  whole = by_definition(x, y, kernel)
  assert found.mean() == pytest.approx(whole, rel=1e-9)
  expected = [7 * whole - 6 * by_definition(np.delete(x, i, 0), y, kernel) for i in range(7)]
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_cubic_kernel_is_that_of_kid():
  x, y = unit(features(2, 9)), unit(features(3, 8, shift=0.3))
  # There the product is divided by the number of features.
  expected = guards.kernel_distance(x * math.sqrt(5), y * math.sqrt(5))
  found = distances.contributions(x, y, distances.cubic).mean()
  assert found == pytest.approx(float(expected), rel=1e-4)


def test_gaussians_have_the_distance_that_theory_says():
  # For N(m, v I) and N(0, v I) in d dimensions and a kernel of width s,
  # D = 2 (s^2 / (s^2 + 2 v))^(d / 2) (1 - exp(-|m|^2 / (2 (s^2 + 2 v)))).
  # Here s = 10, v = 100, d = 2, |m|^2 = 2 * 8^2 = 128: 2 / 3 (1 - exp(-128 / 600)).
  expected = 2 / 3 * (1 - math.exp(-128 / 600))
  x, y = 10 * features(4, 1500, 2, 0.8), 10 * features(5, 1500, 2)
  found = distances.contributions(x, y, distances.gaussian)
  assert abs(found.mean() - expected) < 0.02 and 0.05 < expected
  # The spread of the contributions says how far off it may be.
  assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(1500) + 0.01


def test_equal_distributions_are_at_0_on_average():
  means = [
    distances.contributions(features(k, 12), features(k + 100, 12), distances.cubic).mean()
    for k in range(300)
  ]
  assert abs(np.mean(means)) < 4 * np.std(means) / math.sqrt(300)
  assert min(means) < 0


def test_the_metric_of_a_stream_of_images():
  """Batches of any sizes, padded, on several devices, give the distance of all images."""
  images = np.random.RandomState(6).uniform(size=(20, 2, 2, 3)).astype(np.float32)
  real = unit(features(7, 6, 12))

  def embed(params, x):
    x = x.reshape(len(x), -1) - params
    return x / jax.numpy.linalg.norm(x, axis=1, keepdims=True)

  one = distances.Distance("d", embed, np.float32(0.5), real, distances.cubic)
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  prompts = [Prompt(str(i)) for i in range(20)]
  with metric.MetricScorer(rows=rows, scoring=ScoringSettings()) as score:
    (found,) = score([one], iter(np.split(images, [3, 8])), prompts, 1)
  flat = images.reshape(20, -1) - 0.5
  expected = 1000 * distances.contributions(unit(flat), real, distances.cubic)
  np.testing.assert_allclose(found.scores, expected, rtol=1e-3, atol=1e-2)
  assert metric.uses([EvalSpec("e", one, prompts, 20)]) == []
  with pytest.raises(UserError, match="of which 2 images show nothing: draw thousands"):
    one.scores(real[:2])


def test_pictures_of_a_folder(tmp_path):
  with pytest.raises(UserError, match="is no folder: give one of real pictures"):
    distances._pictures(str(tmp_path / "none"))
  pixels = np.random.RandomState(8).randint(0, 256, (6, 9, 3), np.uint8)
  for name in ("b.png", "a.PNG", "c.txt"):
    PIL.Image.fromarray(pixels).save(tmp_path / name, format="PNG")
  with pytest.raises(UserError, match="has 2 pictures: give a folder of at least 3"):
    distances._pictures(str(tmp_path))
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "d.jpg").write_bytes(b"no picture")
  paths = distances._pictures(str(tmp_path))
  assert [path.name for path in paths] == ["a.PNG", "b.png", "d.jpg"]
  # The short side is the size already: only the middle is cut out.
  expected = pixels[:, 2:8].astype(np.float32) / 255
  np.testing.assert_array_equal(distances._read(paths[0], 6), expected)
  assert distances._read(paths[0], 4).shape == (4, 4, 3)
  with pytest.raises(UserError, match="d.jpg cannot be decoded"):
    distances._read(paths[2], 6)
