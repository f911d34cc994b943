"""Makes data sets of prompts for the paper's three tasks, as `rlft.data.records` keeps them."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import heapq
import json
import os
from typing import Any

import tqdm

from rlft.config.fields import option
from rlft.data import captions, compose, records, splits
from rlft.data.sources import Source
from rlft.storage import files
from rlft.types import Prompt, UserError

_TRAIN = "train"
# Why a row is not in the data set.
_NO_PROMPT = "no prompt"
_DUPLICATE = "duplicate"
_NO_PEOPLE = "nobody in it"
_ETHNIC = "a term of race, ethnicity or skin colour"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """What `launch/prepare_prompts.py` takes; each field is a flag of the same name."""

  kind: str = option(
    "composition: pairs of the paper's objects; people: captions of people that name no race,"
    " ethnicity or skin colour, and portraits of the paper's occupations; preference: any prompts",
    choices=("composition", "people", "preference"),
  )
  output: str = option("directory of the data set", path=True)
  source: str = option(
    "--kind=people and preference: the prompts to start from, a source as for a task, e.g."
    " captions.jsonl?column=text",
    "",
  )
  held_out: int = option(
    "--kind=people and preference: how many prompts become the split heldout; which ones depends on"
    " their text alone",
    2000,
    least=0,
  )


def run(config: PrepareConfig, load: Callable[[str], Sequence[Prompt]]) -> str:
  """Makes a data set.

  Args:
    config: of what, and where.
    load: opens a source of prompts.

  Returns:
    What was made, in lines for the console.

  Raises:
    UserError: the source cannot be read, or has too few prompts for this; two prompts have the same
      id; or the data set cannot be written. Nothing of it is left then.
  """
  if config.source and config.kind == "composition":
    raise UserError(f"--kind=composition has words of its own: leave --source={config.source} out")
  if not config.source and config.kind != "composition":
    raise UserError(f"--kind={config.kind} needs prompts: give a file with --source")
  manifest = os.path.join(config.output, records.MANIFEST)
  if os.path.exists(manifest):
    raise UserError(f"{config.output} has a data set already: give another --output, or remove it")
  source = load(config.source) if config.source else ()
  files.check_writable(config.output)

  dropped: collections.Counter[str] = collections.Counter()
  bytes_of: collections.Counter[str] = collections.Counter()
  writers: dict[str, records.Writer] = {}
  with contextlib.ExitStack() as unfinished:
    for split, prompt in _sorted(config, source, dropped, bytes_of):
      if split not in writers:
        writers[split] = records.Writer(config.output, split)
        unfinished.callback(writers[split].discard)
      writers[split].add(prompt)
    made = {split: writer.close() for split, writer in writers.items()}
    kept = sum(told["rows"] for split, told in made.items() if split != compose.OCCUPATIONS)
    told = {
      "kind": config.kind,
      "source": config.source,
      "rows": {"read": kept + dropped.total(), "kept": kept, "dropped": dict(dropped)},
      "splits": made,
    }
    if bytes_of:
      told["left_out"] = dict(bytes_of)
    files.write_atomic(manifest, json.dumps(told, indent=2) + "\n")
    unfinished.pop_all()
  return _summary(config.output, told)


def _sorted(
  config: PrepareConfig,
  source: Sequence[Prompt],
  dropped: collections.Counter[str],
  bytes_of: collections.Counter[str],
) -> Iterator[tuple[str, Prompt]]:
  """All prompts of the data set, each with its split; what is dropped and left out is counted."""
  if config.kind == "composition":
    for split in compose.SPLITS["composition"]:
      for prompt in _watched(compose.load("composition", split), split):
        yield split, prompt
    return
  if isinstance(source, Source) and source.left_out:
    dropped[_NO_PROMPT] += source.left_out
  prompts = _without_bytes(_watched(source, config.kind), bytes_of)
  chosen = _chosen(prompts, config.kind, dropped)
  yield from _put_aside(chosen, config.held_out)
  if config.kind == "people":
    for prompt in compose.load(compose.OCCUPATIONS, "test"):
      yield compose.OCCUPATIONS, prompt


def _watched(prompts: Sequence[Prompt], what: str) -> Iterable[Prompt]:
  return tqdm.tqdm(prompts, desc=what, unit=" prompts", unit_scale=True, mininterval=1.0)


def _chosen(
  prompts: Iterable[Prompt], kind: str, dropped: collections.Counter[str]
) -> Iterator[tuple[bytes, Prompt]]:
  """The prompts to keep, each text once, with the key of their text."""
  seen: set[bytes] = set()
  ids: set[bytes] = set()
  for prompt in prompts:
    if reason := _reason(prompt.text) if kind == "people" else "":
      dropped[reason] += 1
      continue
    key = splits.text_key(prompt.text)
    if key in seen:
      dropped[_DUPLICATE] += 1
      continue
    _check_metadata(prompt, ids)
    seen.add(key)
    yield key, prompt


def _check_metadata(prompt: Prompt, ids: set[bytes]) -> None:
  """Refuses what cannot be kept beside the prompt, or an id that another prompt has."""
  where = f"the prompt {prompt.text[:60]!r}"
  if "prompt" in prompt.metadata:
    raise UserError(f"{where} has a column prompt beside the one that is used: rename one of them")
  if (known := prompt.metadata.get("id")) is not None:
    if (key := splits.text_key(str(known))) in ids:
      raise UserError(
        f"{where} has the id {known}, and so has another: correct one of them, or rename the column"
        " if it stands for something else"
      )
    ids.add(key)


def _without_bytes(
  prompts: Iterable[Prompt], bytes_of: collections.Counter[str]
) -> Iterator[Prompt]:
  """The prompts without metadata that hold bytes, pictures say, which JSON cannot."""
  for prompt in prompts:
    if found := [name for name, value in prompt.metadata.items() if _holds_bytes(value)]:
      bytes_of.update(found)
      kept = {name: value for name, value in prompt.metadata.items() if name not in found}
      prompt = Prompt(prompt.text, kept)
    yield prompt


def _holds_bytes(value: Any) -> bool:
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    return any(map(_holds_bytes, value))
  return isinstance(value, (bytes, bytearray))


def _reason(caption: str) -> str:
  """Why a caption is not for training on people; empty if it is."""
  if captions.ethnic_term(caption):
    return _ETHNIC
  return "" if captions.has_people(caption) else _NO_PEOPLE


def _put_aside(chosen: Iterable[tuple[bytes, Prompt]], count: int) -> Iterator[tuple[str, Prompt]]:
  """The prompts, the `count` of the least keys as `heldout`, whatever their order, others as train.

  Raises:
    UserError: there are no more than `count`.
  """
  aside: list[tuple[int, int, Prompt]] = []  # A heap with the greatest key first.
  place = trained = 0
  for place, (key, prompt) in enumerate(chosen, 1):
    if count:
      # No two keys are equal, but prompts cannot be compared.
      entry = -int.from_bytes(key, "big"), place, prompt
      if place <= count:
        heapq.heappush(aside, entry)
        continue
      prompt = heapq.heappushpop(aside, entry)[2]
    trained += 1
    yield _TRAIN, prompt
  if not trained:
    raise UserError(
      f"of {place:,} prompts to keep, --held_out={count} leave none to train on: give a source with"
      " more, or fewer to hold out, e.g. --held_out=0"
      if place
      else "there are no prompts to keep in this source: give another, or another --kind"
    )
  for _, _, prompt in sorted(aside, reverse=True):
    yield splits.HELD_OUT, prompt


def _summary(output: str, told: Mapping[str, Any]) -> str:
  rows = told["rows"]
  dropped = "".join(f", {count:,} dropped ({why})" for why, count in rows["dropped"].items())
  lines = [f"{output}: {rows['read']:,} rows read, {rows['kept']:,} kept{dropped}"]
  for name, count in told.get("left_out", {}).items():
    lines.append(f"  without {name}, which holds bytes in {count:,} rows")
  lines += [
    f"  records:{output}/{split}: {made['rows']:,} prompts"
    for split, made in told["splits"].items()
  ]
  return "\n".join(lines)
