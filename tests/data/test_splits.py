"""Parts and mixtures of sources, as they are written in a flag."""

import re

import pytest

from rlft.data import splits
from rlft.types import Prompt, UserError

# Of 'prompt 0' to 'prompt 999'.
HELD_OUT = [f"prompt {i}" for i in (85, 159, 187, 224, 329, 330, 425, 433, 467, 486, 978)]


def listed(count: int) -> list[Prompt]:
  return [Prompt(f"prompt {i}") for i in range(count)]


@pytest.mark.parametrize(
  ("part", "rows"),
  [
    (":-3", range(7)),
    ("-3:", range(7, 10)),
    ("2:4", range(2, 4)),
    (":", range(10)),
    (":25%", range(2)),  # 2.5, rounded to an even number as in TFDS.
    ("-30%:", range(7, 10)),
    (":2000", range(10)),
  ],
)
def test_parts_by_places(part, rows):
  taken = splits.take_part(f"p.txt[{part}]", listed(10), part)
  assert [prompt.text for prompt in taken] == [f"prompt {i}" for i in rows]


def test_held_out_prompts_are_those_of_their_text_on_every_machine():
  held_out = splits.take_part("p[heldout]", listed(1_000), "heldout")
  assert [prompt.text for prompt in held_out] == HELD_OUT
  rest = splits.take_part("p[rest]", listed(1_000), "rest")
  both = {prompt.text for prompt in held_out} | {prompt.text for prompt in rest}
  assert len(held_out) + len(rest) == len(both) == 1_000
  # Neither their places nor their spelling matter.
  reversed_part = splits.take_part("p[heldout]", listed(1_000)[::-1], "heldout")
  assert [prompt.text for prompt in reversed_part] == HELD_OUT[::-1]
  assert splits.is_held_out(HELD_OUT[0].upper().replace(" ", "  "))


@pytest.mark.parametrize(
  ("part", "message"),
  [
    ("train", "p[train]: [train] is no part of a source: write e.g. [:-2000], [2000:], [:10%], [h"),
    ("1", "[1] is no part of a source"),
    ("1:2:3", "[1:2:3] is no part of a source"),
    ("50:", "prompts p[50:] are none of its 10 prompts: give another part"),
    ("heldout", "prompts p[heldout] are none of its 10 prompts"),
  ],
)
def test_a_part_that_is_none_is_refused(part, message):
  with pytest.raises(UserError, match=re.escape(message)):
    splits.take_part(f"p[{part}]", listed(10), part)


def test_brackets():
  assert splits.split_part("a[1].parquet[:-5]") == ("a[1].parquet", ":-5")
  assert splits.split_part("a[1].parquet") == ("a[1].parquet", "")
  assert splits.split_part("a.txt[]") == ("a.txt[]", "")


def test_mixtures():
  assert splits.split_mixture("0.7*a.txt + 3 * emoji:pair/train[:5]") == [
    (0.7, "a.txt"),
    (3.0, "emoji:pair/train[:5]"),
  ]
  assert splits.split_mixture("a+b.txt") == splits.split_mixture("2*a.txt") == []
  for spec in ("a.txt + 2*b.txt", "0*a.txt + 1*b.txt", "-1*a.txt + 1*b.txt"):
    with pytest.raises(UserError, match=r"' has no weight above 0: write NUMBER\*SOURCE"):
      splits.split_mixture(spec)
