"""Links that nobody can guess."""

import os

import pytest

from rlft.rating.links import Links
from rlft.types import UserError


def test_links_stay_the_same_and_are_those_of_their_key(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  one, again, other = (Links(tmp_path / name) for name in "aab")
  assert one.rater(1) == again.rater(1) != other.rater(1)
  assert one.find_rater(again.rater(3)) == 3 and one.find_rater(other.rater(3)) is None
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["key"]  # Nothing else is left.
  assert (tmp_path / "a" / "key").stat().st_mode & 0o777 == 0o600


def test_a_file_system_without_links(tmp_path, monkeypatch):
  def refused(*_):
    raise PermissionError("no links")

  monkeypatch.setattr(os, "link", refused)
  assert Links(tmp_path).rater(1) == Links(tmp_path).rater(1)
  assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("content", ["", "abc"])
def test_a_key_that_is_none_is_refused(tmp_path, content):
  """Of an empty one, which a full disk may leave, anybody could make the links."""
  (tmp_path / "key").write_text(content)
  with pytest.raises(UserError, match="key holds no key: remove it"):
    Links(tmp_path)
