import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from rlft.storage import images


def test_to_uint8_rounds_and_clips():
  values = np.array([[[-1.0, 0.0, 0.5], [1.0, 2.0, np.nan]]], np.float32)
  # 0.5 * 255 = 127.5 rounds to the even 128.
  np.testing.assert_array_equal(images.to_uint8(values), [[[0, 0, 128], [255, 255, 0]]])
  assert images.to_uint8(np.ones((1, 1, 3), jnp.bfloat16)).tolist() == [[[255, 255, 255]]]
  unchanged = np.full((2, 2, 3), 7, np.uint8)
  assert images.to_uint8(unchanged) is unchanged


@pytest.mark.parametrize(
  "bad", [np.zeros((4, 4)), np.zeros((4, 4, 4)), np.zeros((2, 2, 3), np.int32)]
)
def test_to_uint8_refuses_other_arrays(bad):
  with pytest.raises(ValueError, match="expected images"):
    images.to_uint8(bad)


def test_grid_places_images_in_reading_order():
  three = np.stack([np.full((1, 2, 3), value, np.uint8) for value in (10, 20, 30)])
  w = 255
  expected = [
    [w, w, w, w, w, w, w],
    [w, 10, 10, w, 20, 20, w],
    [w, w, w, w, w, w, w],
    [w, 30, 30, w, w, w, w],
    [w, w, w, w, w, w, w],
  ]
  np.testing.assert_array_equal(images.grid(three, 2, pad=1)[..., 0], expected)


def test_grid_scales_by_squares():
  image = np.array([[[[0] * 3, [9] * 3]]], np.uint8)
  got = images.grid(image, 1, scale=2, pad=0)
  np.testing.assert_array_equal(got[..., 0], [[0, 0, 9, 9], [0, 0, 9, 9]])


def test_grid_refuses_bad_sizes():
  with pytest.raises(ValueError, match="N >= 1"):
    images.grid(np.zeros((0, 2, 2, 3)), 2)
  with pytest.raises(ValueError, match="columns, scale >= 1"):
    images.grid(np.zeros((1, 2, 2, 3)), 0)


def test_png_gives_back_the_pixels(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
  images.save_png(tmp_path / "new" / "a.png", pixels)
  np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "new" / "a.png")), pixels)


def test_pictures_of_any_kind_are_upright_with_8_bits_on_white(tmp_path):
  ramp = np.arange(4, dtype=np.uint16).reshape(1, 4) * 17 * 257
  PIL.Image.fromarray(ramp).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(
    np.asarray(images.upright(tmp_path / "deep.png"))[0, :, 0], [0, 17, 34, 51]
  )
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # Turned by a quarter.
  wide = PIL.Image.fromarray(np.zeros((2, 5, 3), np.uint8))
  wide.save(tmp_path / "turned.jpg", exif=exif)
  assert images.upright(tmp_path / "turned.jpg").size == (2, 5)
  PIL.Image.fromarray(np.zeros((2, 2, 4), np.uint8)).save(tmp_path / "clear.png")
  assert (np.asarray(images.upright(tmp_path / "clear.png")) == 255).all()
  PIL.Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tiff")
  with pytest.raises(ValueError, match="32 bits"):
    images.upright(tmp_path / "float.tiff")
