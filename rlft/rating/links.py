"""Links that nobody can guess: whoever has one is a rater, or looks at the results."""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile

from rlft.storage import files
from rlft.types import UserError

_KEY = "key"
_BYTES = 32  # of the key, two digits each
_DIGITS = 32  # of 4 bits


class Links:
  """The links of a comparison. They are the same whenever it is opened, and are stored nowhere."""

  def __init__(self, directory: files.Path):
    """Reads the secret key, which is made where it is missing.

    Raises:
      UserError: it can neither be read nor written, or is none.
    """
    path = directory / _KEY
    if not path.exists():
      _make_key(path)
    with files.reading(path):
      self._key = path.read_bytes()
    if len(self._key) != 2 * _BYTES:  # Of a shorter one links could be guessed.
      raise UserError(f"{path} holds no key: remove it; links that were handed out become others")

  def rater(self, number: int) -> str:
    """The token of a rater, numbered from 1."""
    return f"{number}-{self._code(f'rater {number}')}"

  def organizer(self) -> str:
    """The token of whoever looks at the results."""
    return self._code("organizer")

  def find_rater(self, token: str) -> int | None:
    """The rater's number; None if the token is nobody's."""
    number = token.partition("-")[0]
    if not (number.isascii() and number.isdecimal() and len(number) < 6):
      return None
    return int(number) if _same(token, self.rater(int(number))) else None

  def is_organizer(self, token: str) -> bool:
    """Whether this is the organizer's token."""
    return _same(token, self.organizer())

  def _code(self, role: str) -> str:
    return hmac.new(self._key, role.encode(), hashlib.sha256).hexdigest()[:_DIGITS]


def _make_key(path: files.Path) -> None:
  """Writes a new key, of which nobody sees a part; one that another process has made stays."""
  with files.writing(path):
    handle, name = tempfile.mkstemp(prefix=f".{_KEY}.", dir=path.parent)  # For this user alone.
    try:
      with open(handle, "w") as file:
        file.write(secrets.token_hex(_BYTES))
        file.flush()
        os.fsync(handle)
      try:
        os.link(name, path)
      except FileExistsError:
        pass
      except OSError:  # A file system without links, such as a mounted drive.
        os.replace(name, path)
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(name)


def _same(token: str, expected: str) -> bool:
  """Compares in a time that tells nothing."""
  return hmac.compare_digest(token.encode("utf-8", "replace"), expected.encode())
