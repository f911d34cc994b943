"""Kept measurements are of the files that are there now."""

import os

import pytest

from rlft.inference import kept
from rlft.models.files import pretrained
from rlft.models.files.single_file import Source


@pytest.mark.parametrize("single", [False, True])
def test_a_model_that_was_replaced_is_another(tmp_path, monkeypatch, single):
  file = tmp_path / "model.safetensors"
  file.write_bytes(b"one")
  found = Source(str(file)) if single else tmp_path
  monkeypatch.setattr(pretrained, "find", lambda model: found)
  before = kept.stamp("m")
  assert kept.stamp("m") == before
  file.write_bytes(b"two")
  os.utime(file, (1, 1))
  assert kept.stamp("m") != before


def test_a_revision_stays_as_it_is(monkeypatch):
  monkeypatch.setattr(pretrained, "find", lambda model: Source("org/name@abc/model.safetensors"))
  assert kept.stamp("m") == kept.stamp("m")
  monkeypatch.setattr(pretrained, "find", lambda model: "org/name@abc")
  assert kept.stamp("m") == "org/name@abc"
