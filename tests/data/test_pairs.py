"""Images with captions for the pretraining loss."""

import json

import numpy as np
from PIL import Image
import pytest

from rlft.data import pairs
from rlft.types import UserError


@pytest.fixture
def folder(tmp_path):
  """Four images: wide, tall, transparent and turned by its EXIF tag."""
  wide = np.zeros((4, 12, 3), np.uint8)
  wide[:, :4], wide[:, 4:8], wide[:, 8:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
  Image.fromarray(wide).save(tmp_path / "wide.png")
  (tmp_path / "more").mkdir()
  Image.fromarray(wide).rotate(90, expand=True).save(tmp_path / "more" / "tall.png")
  Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  halves = np.zeros((8, 8, 3), np.uint8)
  halves[:4] = 255
  Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
  names = ["wide.png", "more/tall.png", "clear.png", "turned.png"]
  describe(tmp_path, *({"file_name": name, "text": f"a {name}"} for name in names))
  return tmp_path


def describe(folder, *rows):
  (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def refusal(spec, size=(8, 8)) -> str:
  with pytest.raises(UserError) as caught:
    pairs.load_folder(str(spec), size=size)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_folder_is_cut_to_squares_of_the_size(folder):
  loaded = pairs.load_folder(str(folder), size=(4, 4))
  assert len(loaded) == 4
  assert loaded.captions[1] == "a more/tall.png"
  images, sources = loaded.read([0, 1, 2, 3, 0])
  assert images.shape == (5, 4, 4, 3)
  assert images.dtype == np.uint8
  # The middle third of the stripes is green.
  np.testing.assert_array_equal(images[0], np.full((4, 4, 3), (0, 255, 0)))
  np.testing.assert_array_equal(images[1], np.full((4, 4, 3), (0, 255, 0)))
  np.testing.assert_array_equal(images[2], np.full((4, 4, 3), 255))
  assert images[3, 0].max() == 0 and images[3, 3].min() == 255
  np.testing.assert_array_equal(images[4], images[0])
  # Where they are: a strip of 4 x 12 loses 4 columns on the left, one of 12 x 4 as many rows.
  assert sources.tolist()[:4] == [[4, 12, 0, 4], [12, 4, 4, 0], [8, 8, 0, 0], [8, 8, 0, 0]]
  assert sources.dtype == np.int32
  images, sources = loaded.read([])
  assert images.shape == (0, 4, 4, 3) and sources.shape == (0, 4)


def test_images_are_scaled(folder):
  images, sources = pairs.load_folder(str(folder), size=(16, 16)).read(np.array([2, 0]))
  np.testing.assert_array_equal(images[0], np.full((16, 16, 3), 255))
  # 4 x 12 pixels become 16 x 48, of which 16 are lost on the left.
  assert sources.tolist() == [[8, 8, 0, 0], [4, 12, 0, 16]]


def test_images_are_cut_to_other_shapes(folder):
  images, sources = pairs.load_folder(str(folder), size=(4, 8)).read([0, 1])
  assert images.shape == (2, 4, 8, 3)
  # Of 4 x 12, 8 columns from column 2 on; 12 x 4 becomes 24 x 8.
  np.testing.assert_array_equal(images[0, :, 2:6], np.full((4, 4, 3), (0, 255, 0)))
  assert sources.tolist() == [[4, 12, 0, 2], [12, 4, 10, 0]]


def test_images_of_more_than_8_bits(folder):
  values = np.linspace(0, 65535, 16).round().astype(np.uint16).reshape(4, 4)
  Image.fromarray(values).save(folder / "wide.png")
  images, _ = pairs.load_folder(str(folder), size=(4, 4)).read([0])
  expected = np.linspace(0, 255, 16).round().reshape(4, 4, 1)  # Pillow says 255 from 256 on.
  np.testing.assert_array_equal(images[0], np.repeat(expected, 3, axis=2))
  Image.fromarray(values.astype(np.float32)).save(folder / "wide.png", "TIFF")
  with pytest.raises(UserError, match=r"wide\.png cannot be decoded \(its pixels have 32 bits"):
    pairs.load_folder(str(folder), size=(4, 4)).read([0])


def test_a_damaged_image_is_named(folder):
  loaded = pairs.load_folder(str(folder), size=(4, 4))
  (folder / "wide.png").write_bytes((folder / "wide.png").read_bytes()[:40])
  with pytest.raises(UserError, match=r"wide\.png cannot be decoded .*: replace it or remove"):
    loaded.read([0])


def test_a_bad_folder_is_refused(folder, tmp_path):
  describe(folder, {"file_name": "wide.png", "text": "a"}, {"file_name": "x.png", "text": "b"})
  assert "names 1 of 2 images that do not exist" in refusal(folder)
  describe(folder, {"file": "wide.png", "text": "a"})
  assert 'line 1 is not of the form {"file_name": "...", "text": "...", ...}' in refusal(folder)
  (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\n")
  assert "is not UTF-8 text" in refusal(folder)
  describe(folder)
  assert "metadata.jsonl is empty" in refusal(folder)
  assert "has no metadata.jsonl" in refusal(folder / "more")
  assert "has no metadata.jsonl" in refusal(tmp_path / "none")


@pytest.mark.parametrize("name", ["../wide.png", "more/../../wide.png", "..", "/etc/passwd"])
def test_a_name_that_leaves_the_folder_is_refused(folder, name):
  (folder.parent / "wide.png").write_bytes((folder / "wide.png").read_bytes())
  describe(folder, {"file_name": "wide.png", "text": "a"}, {"file_name": name, "text": "b"})
  assert f"names '{name}', which is not in its folder: move the image there" in refusal(folder)


def test_names_within_the_folder_and_links_are_read(folder):
  (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
  (folder / "wide.png").rename(folder.parent / "elsewhere.png")
  names = ["more/../link.png", "./link.png", "..link.png"]
  (folder / "..link.png").symlink_to("link.png")
  describe(folder, *({"file_name": name, "text": name} for name in names))
  images, _ = pairs.load_folder(str(folder), size=(4, 4)).read([0, 1, 2])
  np.testing.assert_array_equal(images, np.full((3, 4, 4, 3), (0, 255, 0)))


def test_the_order_of_pairs_is_a_pure_function():
  batches = [pairs.pair_indices(7, i, count=5, size=10) for i in range(2)]
  assert sorted(np.concatenate(batches)) == list(range(10))
  np.testing.assert_array_equal(pairs.pair_indices(7, 1, count=5, size=10), batches[1])
