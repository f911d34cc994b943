"""Preprocessing against PIL, scipy.ndimage and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from rlft.rewards import preprocess

PIL_METHODS = {
  "linear": Image.Resampling.BILINEAR,
  "cubic": Image.Resampling.BICUBIC,
  "lanczos3": Image.Resampling.LANCZOS,
}


def noise(height, width, seed=0):
  rng = np.random.RandomState(seed)
  return rng.uniform(0, 1, (1, height, width, 3)).astype(np.float32)


def smooth(height, width):
  """A picture without detail at the scale of pixels, in steps of 1/255."""
  y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
  planes = [np.sin(5 * y + 3 * x), np.cos(4 * x * y + 1), np.sin(9 * x) * np.cos(7 * y)]
  return (np.round(np.stack(planes, -1)[None] * 120 + 127) / 255).astype(np.float32)


def pil_float(image, shape, method="cubic"):
  """PIL's resampling of one image `[H, W, 3]` in floating point: nothing rounded or clipped."""
  planes = [
    Image.fromarray(np.ascontiguousarray(image[..., c])).resize(shape[::-1], PIL_METHODS[method])
    for c in range(3)
  ]
  return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def pil_bytes(image, shape, method="cubic"):
  """PIL's resampling of 8-bit pixels, as the scorers' own pipelines call it; in [0, 1]."""
  pixels = Image.fromarray(np.round(image * 255).astype(np.uint8))
  return np.asarray(pixels.resize(shape[::-1], PIL_METHODS[method]), np.float32) / 255


@pytest.mark.parametrize("method", PIL_METHODS)
@pytest.mark.parametrize(
  ("before", "after"),
  [((64, 64), (28, 28)), ((37, 51), (16, 23)), ((9, 14), (24, 17)), ((13, 40), (13, 16))],
)
def test_resize_is_pils_before_its_rounding(before, after, method):
  image = noise(*before)
  expected = pil_float(image[0], after, method).clip(0, 1)
  found = preprocess.resize(image, after, method)[0]
  assert found.shape == (*after, 3) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_resize_is_pils_within_its_rounding():
  # PIL rounds to 8 bits after the rows and after the columns.
  image = smooth(512, 512)
  difference = 255 * np.abs(
    preprocess.resize(image, (224, 224))[0] - pil_bytes(image[0], (224, 224))
  )
  assert difference.max() <= 1.1 and difference.mean() <= 0.3


def test_resize_keeps_what_has_the_size_and_clips_what_overshoots():
  image = noise(6, 7)
  np.testing.assert_array_equal(preprocess.resize(image, (6, 7)), image)
  edge = np.zeros((1, 4, 8, 3), np.float32)
  edge[:, :, 4:] = 1
  assert pil_float(edge[0], (4, 16)).max() > 1.05
  found = preprocess.resize(edge, (4, 16))
  assert found.min() == 0 and found.max() == 1


def test_a_halved_and_a_doubled_row_by_hand():
  # Halving stretches the cubic (a = -0.5) by 2: at distances .25, .75, 1.25, 1.75 (in new pixels)
  # it is .8671875, .2265625, -.0703125, -.0234375, which is 1 in sum; each on two sides, so halved.
  # New pixels 1, 2, 3 have their centres at 2.5, 4.5, 6.5: 1.25, .25 and .75 away from old pixel 5.
  row = np.zeros((1, 1, 12, 3), np.float32)
  row[:, :, 5] = 1
  halved = preprocess.resize(row, (1, 6))[0, 0, :, 0]
  np.testing.assert_allclose(halved[1:4], [0, 0.43359375, 0.11328125], atol=1e-6)
  # Linear, doubled: centres at -.25, .25, .75, 1.25 of the old pixels 0 and 1.
  pair = np.broadcast_to(np.array([0.0, 1.0], np.float32)[None, None, :, None], (1, 1, 2, 3))
  doubled = preprocess.resize(pair, (1, 4), "linear")[0, 0, :, 0]
  np.testing.assert_allclose(doubled, [0, 0.25, 0.75, 1], atol=1e-6)


@pytest.mark.parametrize("height, width", [(40, 40), (33, 60), (61, 29), (11, 18)])
@pytest.mark.parametrize("centre", ["floor", "round"])
def test_short_side_crop(height, width, centre):
  image, size = noise(height, width), 16
  scale = size / min(height, width)
  # PIL wants (width, height); the long side is rounded down.
  shape = (int(height * scale + 1e-9), int(width * scale + 1e-9))
  resized = pil_float(image[0], shape).clip(0, 1)
  cut = [(n - size) / 2 for n in shape]
  top, left = (round(c) if centre == "round" else int(c) for c in cut)
  expected = resized[top : top + size, left : left + size]
  found = preprocess.short_side_crop(image, size, centre=centre)[0]
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_two_ways_to_crop_an_odd_rest():
  # 16 x 19: 3 columns too many; floor(1.5) = 1, round(1.5) = 2, and round(0.5) = 0.
  columns = np.broadcast_to(np.arange(19)[None, None, :, None] / 32, (1, 16, 19, 3))
  columns = columns.astype(np.float32)
  first = {
    centre: float(preprocess.short_side_crop(columns, 16, centre=centre)[0, 0, 0, 0]) * 32
    for centre in ("floor", "round")
  }
  assert first == {"floor": 1, "round": 2}
  assert preprocess.short_side_crop(columns[:, :, :17], 16, centre="round")[0, 0, 0, 0] == 0


def test_transformers_crops_at_the_same_place():
  transformers = pytest.importorskip("transformers")
  processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
  for height, width in ((45, 60), (71, 33)):
    image = smooth(height, width)
    pixels = np.round(image[0] * 255).astype(np.uint8)
    expected = processor(pixels, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    found = preprocess.clip_normalise(preprocess.short_side_crop(image, 16))[0]
    # A pixel off would be 0.1 and more; what remains is PIL's rounding, 1.1/255 over 0.26.
    np.testing.assert_allclose(found, expected, atol=0.017)


@pytest.mark.parametrize(
  ("height", "width", "rows", "columns"),
  [(40, 40, (0, 16), (0, 16)), (20, 40, (4, 12), (0, 16)), (40, 27, (0, 16), (2, 13))],
)
def test_long_side_pad(height, width, rows, columns):
  # 40 x 27 -> 16 x round(10.8) = 11, and 5 columns of black: 2 to the left, 3 to the right.
  image = noise(height, width)
  found = np.array(preprocess.long_side_pad(image, 16))[0]
  inside = (slice(*rows), slice(*columns))
  expected = pil_float(image[0], found[inside].shape[:2])
  np.testing.assert_allclose(found[inside], expected, atol=2e-6)
  found[inside] = 0
  assert found.shape == (16, 16, 3) and not found.any()


def test_long_side_pad_is_torchs_antialiased_bicubic():
  torch = pytest.importorskip("torch")
  image = noise(50, 31)
  tensor = torch.from_numpy(image).permute(0, 3, 1, 2)
  options = {"mode": "bicubic", "antialias": True, "align_corners": False}
  expected = torch.nn.functional.interpolate(tensor, size=(16, 10), **options)
  expected = np.pad(expected.permute(0, 2, 3, 1).numpy(), ((0, 0), (0, 0), (3, 3), (0, 0)))
  np.testing.assert_allclose(preprocess.long_side_pad(image, 16), expected, atol=2e-6)
  assert preprocess.long_side_pad(image[:, :1], 16).shape == (1, 16, 16, 3)


def test_square_is_a_plain_resize():
  image = noise(30, 17)
  expected = pil_float(image[0], (24, 24)).clip(0, 1)
  np.testing.assert_allclose(preprocess.square(image, 24)[0], expected, atol=2e-6)


def scipy_owlv2(image, size):
  """Pad, blur, zoom and clip `[H, W, 3]` with scipy, in float64."""
  side = max(image.shape[:2])
  rows, columns = side - image.shape[0], side - image.shape[1]
  padded = np.pad(image.astype(np.float64), ((0, rows), (0, columns), (0, 0)), constant_values=0.5)
  sigma = max(0, (side / size - 1) / 2)
  blurred = ndimage.gaussian_filter(padded, (sigma, sigma, 0), mode="mirror")
  factors = (size / side, size / side, 1)
  zoomed = ndimage.zoom(blurred, factors, order=1, mode="mirror", grid_mode=True)
  return zoomed.clip(padded.min(), padded.max())


@pytest.mark.parametrize(
  ("height", "width", "size"), [(50, 50, 20), (37, 61, 24), (45, 20, 32), (13, 9, 30), (16, 16, 16)]
)
def test_owlv2_is_scipys(height, width, size):
  image = noise(height, width)
  found = preprocess.owlv2(image, size)[0]
  np.testing.assert_allclose(found, scipy_owlv2(image[0], size), atol=2e-6)


def test_owlv2_is_that_of_transformers():
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  processor = transformers.Owlv2ImageProcessor(size={"height": 20, "width": 20})
  for height, width in ((37, 50), (12, 9)):
    image = smooth(height, width)
    pixels = np.round(image[0] * 255).astype(np.uint8)
    expected = processor(pixels, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    found = preprocess.clip_normalise(preprocess.owlv2(image, 20))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_owlv2_pads_with_grey_and_mirrors_by_hand():
  # 1 x 2 pixels 0, 1 and a grey row below; doubled: columns at -.25 (mirrored: .25), .25, .75, 1.25
  # (mirrored: .75); rows likewise.
  pair = np.broadcast_to(np.array([0.0, 1.0], np.float32)[None, None, :, None], (1, 1, 2, 3))
  found = preprocess.owlv2(pair, 4)[0, ..., 1]
  top = np.array([0.25, 0.25, 0.75, 0.75])
  near, far = 0.75 * top + 0.25 * 0.5, 0.25 * top + 0.75 * 0.5
  np.testing.assert_allclose(found, [near, near, far, far], atol=1e-6)


def test_clip_normalise_by_hand():
  image = np.full((1, 1, 1, 3), 0.5, np.float32)
  # (.5 - .48145466) / .26862954, (.5 - .4578275) / .26130258, (.5 - .40821073) / .27577711
  np.testing.assert_allclose(
    preprocess.clip_normalise(image)[0, 0, 0], [0.0690365, 0.1613933, 0.3328386], atol=1e-6
  )


def test_gradients_are_finite_and_reach_the_image():
  functions = (
    lambda x: preprocess.clip_normalise(preprocess.short_side_crop(x, 8)),
    lambda x: preprocess.long_side_pad(x, 8),
    lambda x: preprocess.square(x, 24),
    lambda x: preprocess.owlv2(x, 8),
  )
  flat = np.ones((1, 15, 15, 3), np.float32)
  for image in (noise(15, 15), flat):
    for function in functions:
      gradient = np.asarray(jax.grad(lambda x, f=function: jnp.square(f(x)).sum())(image))
      assert np.isfinite(gradient).all()
      assert np.count_nonzero(gradient) > 0.2 * gradient.size


def test_a_batch_is_its_images():
  images = np.concatenate([noise(21, 33, seed) for seed in range(2)])
  images[1] *= 0.5  # OWLv2's clipping is for each image.
  for function in (preprocess.short_side_crop, preprocess.long_side_pad, preprocess.owlv2):
    alone = np.concatenate([function(image[None], 12) for image in images])
    np.testing.assert_allclose(function(images, 12), alone, atol=1e-6)
