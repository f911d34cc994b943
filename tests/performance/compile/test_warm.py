"""Programs that are compiled before a run are those that the run calls."""

import contextlib
import logging

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest
import train_cases

from rlft.config import fields
from rlft.config.settings import Config
from rlft.performance.compile import abstract_run, ahead, warm
from rlft.types import UserError

_PROGRAMS = ("encode", "sample", "update")


@contextlib.contextmanager
def no_other_programs():
  """A run's --compilation_cache is one of its own."""
  before = jax.config.jax_compilation_cache_dir
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_run_compiles_nothing_that_was_warmed(tmp_path_factory, tmp_path, monkeypatch, caplog):
  folder = train_cases.folder(tmp_path_factory)
  config = train_cases.config(
    folder,
    tmp_path / "run",
    task=(train_cases.task(folder),),
    iterations=1,
    train_timesteps=1,
    pretrain_weight=0.0,
    compilation_cache=str(tmp_path / "kept"),
  )
  with no_other_programs():
    with monkeypatch.context() as one_device:
      devices = jax.devices()[:1]
      one_device.setattr(jax, "devices", lambda *_: devices)
      warm.warm(config, "")
    with caplog.at_level(logging.DEBUG, logger="jax._src.compiler"):
      train_cases.run(config)
  said = [record.getMessage() for record in caplog.records]
  missed = [text for text in said if "CACHE MISS" in text.upper()]
  assert missed  # Of small programs.
  for name in _PROGRAMS:
    assert not any(f"'jit_{name}'" in text for text in missed), name
    assert any(f"'jit_{name}'" in text and "hit" in text.lower() for text in said), name


def test_nowhere_to_keep_programs(monkeypatch):
  monkeypatch.setattr(ahead, "check", lambda *_: None)
  monkeypatch.setattr(abstract_run, "open_model", lambda *_: None)
  config = fields.make(Config, compilation_cache="off")
  with pytest.raises(UserError, match="--warm has nowhere .*give --compilation_cache=DIRECTORY"):
    warm.warm(config, "")
