"""What was written is told from anything else, by one bit."""

import shutil
import subprocess

import pytest

from rlft.storage import checksums
from rlft.storage.checksums import DamagedError


@pytest.fixture
def folder(tmp_path):
  """Three files, one of them beside what may change and what nobody wrote."""
  folder = tmp_path / "folder"
  (folder / "state" / "d").mkdir(parents=True)
  (folder / "state" / "d" / "a b").write_bytes(bytes(range(256)) * 8200)  # more than a chunk
  (folder / "state" / "empty").touch()
  (folder / "meta").write_text("{}")
  (folder / "late").write_text("1")
  written = checksums.write(folder, apart_from=["late"])
  assert written == (folder / "SHA256SUMS").read_text()
  return folder


def check(folder, **options):
  checksums.check(folder, apart_from=["late"], **options)


def flip(path, bit):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def test_what_was_written(folder):
  (folder / "late").write_text("2")
  (folder / "state" / ".nfs0001").touch()
  check(folder)
  names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
  assert names == ["meta", "state/d/a b", "state/empty"]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="sha256sum is not here")
def test_the_file_is_what_sha256sum_reads(folder):
  subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)


@pytest.mark.parametrize("bit", [0, 8 * (1 << 20) + 3, 8 * 256 * 8200 - 1])
def test_one_bit(folder, bit):
  flip(folder / "state" / "d" / "a b", bit)
  with pytest.raises(DamagedError, match="state/d/a b is not as it was written"):
    check(folder)


@pytest.mark.parametrize("byte", [0, 30, 64, 66, 70, 75, -1])
def test_one_bit_of_the_sums(folder, byte):
  path = folder / "SHA256SUMS"
  flip(path, 8 * (byte % path.stat().st_size) + 1)
  with pytest.raises(DamagedError):
    check(folder)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda folder: (folder / "meta").unlink(), "meta is missing"),
    (lambda folder: (folder / "state" / "more").touch(), "state/more is not in SHA256SUMS"),
    (lambda folder: (folder / "SHA256SUMS").write_text(""), "meta is not in SHA256SUMS"),
    (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    (lambda folder: (folder / "meta").write_text(""), "meta is not as it was written"),
  ],
)
def test_what_is_missing_or_added(folder, damage, message):
  damage(folder)
  with pytest.raises(DamagedError, match=message):
    check(folder)


def test_processes_share_the_work(folder):
  flip(folder / "meta", 0)  # the first of three
  for part in ((1, 3), (2, 3), (1, 2)):
    check(folder, part=part)
  for part in ((0, 3), (0, 2)):
    with pytest.raises(DamagedError, match="meta"):
      check(folder, part=part)
