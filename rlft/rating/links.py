"""Links that nobody can guess: whoever has one is a rater, or looks at the results."""

import hashlib
import hmac
import os
import secrets

from rlft.storage import files

_KEY = "key"
_DIGITS = 32  # of 4 bits


class Links:
  """The links of a comparison. They are the same whenever it is opened, and are stored nowhere."""

  def __init__(self, directory: files.Path):
    """Reads the secret key, which is made where it is missing.

    Raises:
      UserError: it can neither be read nor written.
    """
    path = directory / _KEY
    with files.writing(path):
      try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
          file.write(secrets.token_hex(32))
      except FileExistsError:
        pass
    with files.reading(path):
      self._key = path.read_bytes()

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


def _same(token: str, expected: str) -> bool:
  """Compares in a time that tells nothing."""
  return hmac.compare_digest(token.encode("utf-8", "replace"), expected.encode())
