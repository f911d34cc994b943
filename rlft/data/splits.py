"""Parts and mixtures of prompt sources, as they are written in a flag.

SOURCE[:-2000]        a part by places, as in Python
SOURCE[:10%]          or by hundredths of the source
SOURCE[heldout]       one prompt in a hundred, by its text
SOURCE[rest]          the others
0.7*SOURCE + 0.3*SOURCE    draws from several
"""

from collections.abc import Sequence
import hashlib
import re

import numpy as np

from rlft.data import sources
from rlft.types import Prompt, UserError

HELD_OUT, REST = "heldout", "rest"
_SHARE = 100  # one prompt in so many is held out
_PART = re.compile(r"(.+)\[([^\[\]]+)\]")
_BOUND = r"(-?\d+%?)?"
_SLICE = re.compile(f"{_BOUND}:{_BOUND}")
_WEIGHED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(.+)")


def split_part(spec: str) -> tuple[str, str]:
  """'SOURCE[PART]' -> (SOURCE, PART); PART is empty where there is none."""
  match = _PART.fullmatch(spec)
  return (match[1], match[2]) if match else (spec, "")


def is_slice(part: str) -> bool:
  """Whether a part is one by places."""
  return bool(_SLICE.fullmatch(part))


def check_part(spec: str, part: str) -> None:
  """Checks how a part is written.

  Raises:
    UserError: it is none.
  """
  if part not in (HELD_OUT, REST) and not is_slice(part):
    raise UserError(
      f"prompts {spec}: [{part}] is no part of a source: write e.g. [:-2000], [2000:], [:10%],"
      f" [{HELD_OUT}] or [{REST}]"
    )


def take_part(spec: str, whole: Sequence[Prompt], part: str) -> Sequence[Prompt]:
  """A part of a source.

  Args:
    spec: as the user wrote it, for messages.
    whole: the source.
    part: what stands in the brackets.

  Raises:
    UserError: it is no part, or has no prompts.
  """
  check_part(spec, part)
  count = len(whole)
  if match := _SLICE.fullmatch(part):
    rows = range(count)[slice(*(_bound(text, count) for text in match.groups()))]
  else:
    held_out = np.fromiter((is_held_out(prompt.text) for prompt in whole), bool, count)
    rows = np.flatnonzero(held_out == (part == HELD_OUT))
  if not len(rows):
    raise UserError(f"prompts {spec} are none of its {count:,} prompts: give another part")
  return sources.Part(whole, rows)


def _bound(text: str | None, count: int) -> int | None:
  """A bound of a slice in places; hundredths are rounded as TFDS rounds them."""
  if text and text.endswith("%"):
    return round(int(text[:-1]) * count / 100)
  return int(text) if text else None


def text_key(text: str) -> bytes:
  """16 bytes that stand for a text; case and the width of spaces do not count, as CLIP has it."""
  return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def is_held_out(text: str) -> bool:
  """Whether a prompt is held out: by its text alone, on every machine and in every source."""
  return int.from_bytes(text_key(text)[:8], "little") % _SHARE == 0


def split_mixture(spec: str) -> list[tuple[float, str]]:
  """'0.7*A + 0.3*B' -> [(0.7, 'A'), (0.3, 'B')]; empty where it is no mixture.

  Raises:
    UserError: a source has no weight, or none above 0.
  """
  terms = re.split(r"\s\+\s", spec)
  if len(terms) == 1:
    return []
  found = [_WEIGHED.fullmatch(term.strip()) for term in terms]
  for term, match in zip(terms, found, strict=True):
    if not match or float(match[1]) <= 0:
      raise UserError(
        f"prompts {spec}: '{term.strip()}' has no weight above 0: write NUMBER*SOURCE +"
        " NUMBER*SOURCE"
      )
  return [(float(match[1]), match[2]) for match in found if match]
