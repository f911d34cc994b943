import base64
import io

import numpy as np
import PIL.Image

from rlft.report import samples
from rlft.types import Prompt


def prompts(texts):
  return [Prompt(text) for text in texts]


def flat(values, size=4):
  """One image of a single grey for each value."""
  return (
    np.array(values, np.uint8)[:, None, None, None].repeat(size, 1).repeat(size, 2).repeat(3, 3)
  )


def save(workdir, name, iteration, images, prompts, **settings):
  """Keeps what a keeper chooses of the images."""
  keeper = samples.Keeper(workdir, iteration, **settings)
  keeper.save(name, [images[place] for place in keeper.choose(prompts)], prompts)


def test_sets_share_a_cell(tmp_path):
  save(tmp_path, "parity", 3, flat([10, 20, 30, 40, 50, 60]), prompts("aaabbb"))
  (sheet,) = samples.read_samples(tmp_path)["parity"]
  assert (sheet.iteration, sheet.prompts, sheet.image_size, sheet.across) == (3, ("a", "b"), 4, 3)
  assert [int(cell[2, 2, 0]) for cell in sheet.cells] == [10, 40]
  assert [int(cell[2, -3, 0]) for cell in sheet.cells] == [30, 60]
  assert (tmp_path / "grids" / "parity" / "000003.png").exists()


def test_prompts_are_spread_over_the_list(tmp_path):
  values = list(range(0, 200, 10))
  save(tmp_path, "a", 0, flat(values), prompts(map(str, values)), max_prompts=3)
  (sheet,) = samples.read_samples(tmp_path)["a"]
  assert sheet.prompts == ("0", "90", "190")
  assert [int(cell[2, 2, 0]) for cell in sheet.cells] == [0, 90, 190]


def test_nothing_is_kept_if_so_wished(tmp_path):
  save(tmp_path, "a", 0, flat([1]), prompts("a"), max_prompts=0)
  assert samples.read_samples(tmp_path) == {}
  assert samples.galleries(tmp_path, budget=8_000_000) == []


def test_what_cannot_be_read_is_left_out(tmp_path):
  for iteration in (0, 5, 10, 15):
    save(tmp_path, "a", iteration, flat([1, 2]), prompts("ab"))
  grids = tmp_path / "grids" / "a"
  (grids / "000005.png").write_bytes(b"half")
  (grids / "000010.json").write_text('{"prompts": ')
  (grids / "notes.png").write_bytes(b"")
  assert [sheet.iteration for sheet in samples.read_samples(tmp_path)["a"]] == [0, 15]


def test_only_the_newest_prompts_are_compared(tmp_path):
  save(tmp_path, "a", 0, flat([1]), prompts("x"))
  save(tmp_path, "a", 5, flat([1]), prompts("y"))
  assert [sheet.prompts for sheet in samples.read_samples(tmp_path)["a"]] == [("y",)]


def test_galleries(tmp_path):
  for iteration in range(0, 100, 10):
    save(tmp_path, "a", iteration, flat([1, 2]), prompts(["x", "y"]))
    save(tmp_path, "sets", iteration, flat([1, 2, 3, 4]), prompts("xxyy"))
  single, sets = samples.galleries(tmp_path, budget=8_000_000)
  assert (single.name, sets.name) == ("a", "sets")
  for one in (single, sets):
    assert one.iterations == tuple(range(0, 100, 10))
    assert [prompt for prompt, _ in one.rows] == ["x", "y"]
    assert all(tuple(p.iteration for p in row) == one.iterations for _, row in one.rows)
  _, pictures = single.rows[0]
  assert (pictures[0].time, pictures[-1].time) == ("at the start", "after 90 iterations")
  assert (single.width, sets.width, single.pixelated) == (128, 2 * 56, True)
  # The pictures of a row are those of its prompt.
  first, second = (pictures[0].data for _, pictures in single.rows)
  assert first.startswith("data:image/png;base64,") and first != second


def test_large_pictures_are_reduced_until_the_page_is_small(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (2, 600, 600, 3), np.uint8)
  save(tmp_path, "a", 0, noise, prompts("ab"))
  heights = {}
  for budget in (8_000_000, 60_000):
    (gallery,) = samples.galleries(tmp_path, budget=budget)
    assert not gallery.pixelated
    data = [picture.data for _, (picture,) in gallery.rows]
    assert sum(map(len, data)) <= budget
    with PIL.Image.open(io.BytesIO(base64.b64decode(data[0].partition(",")[2]))) as picture:
      assert picture.format == "JPEG"
      heights[budget] = picture.height
  assert heights == {8_000_000: 512, 60_000: 128}
  with PIL.Image.open(tmp_path / "grids" / "a" / "000000.png") as kept:
    assert kept.size == (602, 1204)  # the file keeps every pixel
    np.testing.assert_array_equal(np.asarray(kept)[1:601, 1:601], noise[0])


def test_fewer_times_where_pictures_would_be_too_heavy(tmp_path):
  for iteration in range(16):
    save(tmp_path, "a", iteration, flat([1]), prompts("a"))
  one = len(samples._encode(samples.read_samples(tmp_path)["a"][0], 512)[0])
  shown = [samples.galleries(tmp_path, budget=times * one)[0].iterations for times in (16, 7, 1)]
  assert [len(iterations) for iterations in shown] == [12, 6, 2]
  assert all((iterations[0], iterations[-1]) == (0, 15) for iterations in shown)


def test_sheets_of_one_iteration(tmp_path):
  for iteration in (0, 5):
    save(tmp_path, "a", iteration, flat([iteration]), prompts("x"))
  save(tmp_path, "b", 0, flat([1]), prompts("y"))
  found = samples.read_sheets(tmp_path, 5)
  assert list(found) == ["a"] and found["a"].iteration == 5
  assert samples.read_sheets(tmp_path / "nowhere", 5) == {}
