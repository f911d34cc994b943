"""Programs that are kept on disk: where, what JAX's own settings do, and what is damaged."""

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import pytest

from rlft.parallel import compiled
from rlft.types import UserError

_SETTINGS = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": None}


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  for name, value in _SETTINGS.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def directory():
  return jax.config.jax_compilation_cache_dir


def test_the_users_cache_is_the_default(tmp_path):
  compiled.keep("")
  assert directory() == str(tmp_path / ".cache" / "rlft" / "programs")
  compiled.keep("off")
  assert directory() is None


@pytest.mark.parametrize("told", ["", "elsewhere"])
def test_what_jax_was_told_goes_before_the_default(tmp_path, told):
  jax.config.update("jax_compilation_cache_dir", told)
  compiled.keep("")
  assert directory() == told
  compiled.keep(str(tmp_path / "given"))
  assert directory() == str(tmp_path / "given")


def test_nothing_is_made_where_jax_keeps_nothing(tmp_path):
  jax.config.update("jax_enable_compilation_cache", False)
  compiled.keep("")
  assert directory() is None and not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(tmp_path, caplog):
  (tmp_path / ".cache").write_text("a file")
  compiled.keep("")
  assert directory() is None and "are not kept" in caplog.text
  with pytest.raises(UserError, match="--compilation_cache=~/.cache/x .*give another one, or off"):
    compiled.keep("~/.cache/x")


def test_a_program_is_found_again_and_a_damaged_one_compiled_again(tmp_path):
  hits = []

  def listen(event, **_):
    hits.extend([event] * (event == "/jax/compilation_cache/cache_hits"))

  def call():
    return float(jax.jit(lambda x: jnp.sin(x) + 1)(2.0))

  jax.monitoring.register_event_listener(listen)
  try:
    compiled.keep(str(tmp_path))
    first = call()
    assert not hits
    jax.clear_caches()
    assert call() == first and hits
    hits.clear()
    for path in tmp_path.glob("*-cache"):
      path.write_bytes(path.read_bytes()[:20])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="compilation cache"):
      assert call() == first
    assert not hits
  finally:
    jax.monitoring.unregister_event_listener(listen)
