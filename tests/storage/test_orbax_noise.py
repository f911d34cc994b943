"""What Orbax prints beside its exceptions is dropped, and nothing else."""

import logging
import sys
import types

from rlft.storage import orbax_noise


def test_what_threads_raise_after_a_failure(monkeypatch):
  seen = []
  monkeypatch.setattr(sys, "unraisablehook", seen.append)
  for _ in range(2):
    orbax_noise.silence()
  errors = [RuntimeError("Event loop is closed"), RuntimeError("another"), None]
  raised = [types.SimpleNamespace(exc_value=error) for error in errors]
  for one in raised:
    sys.unraisablehook(one)
  assert seen == raised[1:]


def test_what_asyncio_logs(caplog):
  orbax_noise.silence()
  logging.getLogger("asyncio").error("never retrieved: <Task defined at orbax/checkpoint/a.py>")
  logging.getLogger("asyncio").error("never retrieved: <Task defined at reward.py>")
  assert ["reward.py" in record.getMessage() for record in caplog.records] == [True]
