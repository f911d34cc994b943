"""Tokenizers from files: CLIP's and BERT's, in every layout in which transformers has written them.

tokenizer.json            the vocabulary and what belongs to it; all that transformers 5 writes
vocab.json  merges.txt    the same of CLIP, as earlier releases wrote it
vocab.txt                 the same of BERT, one token a line
tokenizer_config.json     which tokens begin, end and pad a text, and how long it may be; as the
special_tokens_map.json   two others optional
added_tokens.json
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import tokenizers

from rlft.models import clip, tokens
from rlft.models.files import hub, sources
from rlft.types import UserError

_WHOLE = "tokenizer.json"
_CLIP = ("vocab.json", "merges.txt")
_BERT = "vocab.txt"
_CONFIG, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# The special tokens of `tokens.Tokenizer`, as the files call them.
_NAMES = {"begin": "bos_token", "end": "eos_token", "pad": "pad_token", "unknown": "unk_token"}
_ADDED_FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Source = str | os.PathLike[str]


def open_clip(
  source: Source, config: clip.CLIPTextConfig, *, folder: str = "", pad: str | None = None
) -> tokens.Tokenizer:
  """The CLIP tokenizer of a source.

  Args:
    source: a directory, a repository, or a file beside which the tokenizer's files are; see
      `rlft.models.files.sources`.
    config: of the network that reads the tokens. It says how many of them there may be, in a text
      (the tokenizer may say less) and altogether.
    folder: where in the source the files are.
    pad: the token that pads, if not the one that the files say.

  Raises:
    UserError: there is none, it is damaged or of another kind, or has more tokens.
  """
  where = f"{source}{f': {folder}' if folder else ''}"
  if not (found := _first(source, folder, (_CLIP, (_WHOLE,)))):
    raise UserError(
      f"{where}: there is no CLIP tokenizer; put {' and '.join(_CLIP)}, or {_WHOLE} there"
    )
  try:
    words = _clip(found, source, folder, config, pad)
  except UserError:
    raise
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
      f"{where}: {found[0].name} is not of a CLIP tokenizer ({reason}); get that of a CLIP model"
    ) from error
  if len(words) > config.vocab_size:
    raise UserError(
      f"{where}: the tokenizer has {len(words)} tokens, but the network takes {config.vocab_size}; "
      "use the tokenizer of the same model"
    )
  return words


def _clip(
  files: Sequence[pathlib.Path],
  source: Source,
  folder: str,
  network: clip.CLIPTextConfig,
  pad: str | None,
) -> tokens.Tokenizer:
  added = {}
  if len(files) == 1:
    whole = sources.read_json(files[0])
    vocabulary, merges = _byte_pairs(whole["model"])
    added = {token["id"]: token for token in whole.get("added_tokens", ())}
  else:
    vocabulary, merges = sources.read_json(files[0]), _merges(files[1])
  config = _optional(source, folder, _CONFIG)
  if "added_tokens_decoder" in config:
    added |= {int(id): token for id, token in config["added_tokens_decoder"].items()}
  else:
    # Releases before 4.34 wrote two more files, of which the first goes before the config. The
    # second is rare: not looked for on a hub unless the network has tokens that are not known yet.
    config |= _optional(source, folder, _SPECIAL)
    if len(vocabulary) < network.vocab_size:
      more = _optional(source, folder, _ADDED)
      added |= {id: {"content": token} for token, id in more.items()}
  special = {ours: _text(config[name]) for ours, name in _NAMES.items() if config.get(name)}
  if pad is not None:
    # What pads is found inside words, too: '!' no longer, where it pads no longer.
    former = special.pop("pad", None)
    if former not in special.values():
      added = {id: token for id, token in added.items() if token["content"] != former}
    special["pad"] = pad
  return tokens.clip(
    vocabulary,
    merges,
    length=_length(config, network.max_position_embeddings),
    added={id: _added(token) for id, token in added.items()},
    **special,
  )


def _byte_pairs(model: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """Vocabulary and merges of the model in a tokenizer.json."""
  if model.get("end_of_word_suffix") != tokens.END_OF_WORD:
    raise ValueError(f"it holds {model.get('type')}, not byte pairs with {tokens.END_OF_WORD}")
  # Pairs of strings, which older files join.
  merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
  return model["vocab"], [(left, right) for left, right in merges]


def _merges(path: pathlib.Path) -> list[tuple[str, str]]:
  lines = path.read_text(encoding="utf-8").split("\n")
  if lines[0].startswith("#version"):
    del lines[0]
  pairs = [line.split() for line in lines if line.strip()]
  return [(left, right) for left, right in pairs]


def _added(fields: Mapping[str, Any]) -> tokenizers.AddedToken:
  given = {name: fields[name] for name in _ADDED_FIELDS if name in fields}
  return tokenizers.AddedToken(fields["content"], **given)


def _text(token: str | Mapping[str, Any]) -> str:
  """A special token in a config, which may be a string or say more."""
  return token if isinstance(token, str) else token["content"]


def _length(config: Mapping[str, Any], length: int) -> int:
  """The lower of the lengths that the tokenizer (if it says one) and the network take."""
  found = int(config.get("model_max_length") or length)
  if found < 2:
    raise ValueError(f"model_max_length is {found}")
  return min(length, found)


def read_bert(source: Source) -> tuple[dict[str, int], pathlib.Path]:
  """The vocabulary of an uncased BERT.

  Args:
    source: a vocab.txt or tokenizer.json, or a directory or repository with one, or a file beside
      which one is.

  Returns:
    `{token: id}`, and the file that it is from.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  name = pathlib.PurePath(source).name
  named = name.endswith((".txt", ".json"))
  found = _first(source, "", ((name,),) if named else ((_BERT,), (_WHOLE,)))
  if not found:
    raise UserError(
      f"{source}: there is no {_BERT} or {_WHOLE} in it or beside it; give the model's, for "
      "ImageReward that of bert-base-uncased, as tokenizer=<path>"
    )
  (path,) = found
  if path.suffix == ".json":
    model = sources.read_json(path).get("model", {})
    if model.get("type") != "WordPiece":
      raise UserError(f"{path} holds {model.get('type')}, not BERT's WordPiece; give BERT's")
    return model["vocab"], path
  try:
    # Not splitlines: a token may be a separator of lines in Unicode.
    words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}); get it again") from error
  return {word: id for id, word in enumerate(words)}, path


def write_clip(folder: pathlib.Path, tokenizer: tokens.Tokenizer) -> None:
  """Writes a CLIP tokenizer so that every release of transformers reads it."""
  folder.mkdir(parents=True, exist_ok=True)
  text = tokenizer.core.to_str(pretty=True)
  model = json.loads(text)["model"]
  vocabulary, merges = _byte_pairs(model)
  added = {
    id: {"content": token.content, **{name: getattr(token, name) for name in _ADDED_FIELDS}}
    for id, token in tokenizer.core.get_added_tokens_decoder().items()
  }
  special = {name: getattr(tokenizer, ours) for ours, name in _NAMES.items()}
  config = {
    "added_tokens_decoder": added,
    "model_max_length": tokenizer.length,
    "tokenizer_class": "CLIPTokenizer",
    **special,
  }
  for name, content in (
    (_WHOLE, text),
    (_CLIP[0], json.dumps(vocabulary, ensure_ascii=False, indent=2)),
    (_CLIP[1], "\n".join(["#version: 0.2", *map(" ".join, merges)])),
    (_CONFIG, json.dumps(config, ensure_ascii=False, indent=2)),
    (_SPECIAL, json.dumps(special, ensure_ascii=False, indent=2)),
  ):
    (folder / name).write_text(content + "\n", encoding="utf-8")


def _first(
  source: Source, folder: str, groups: Sequence[tuple[str, ...]]
) -> list[pathlib.Path] | None:
  """The first group of files that is there as a whole."""
  unreachable = None
  for names in groups:
    try:
      found = [sources.find_file(source, str(pathlib.PurePath(folder, name))) for name in names]
    except hub.UnreachableError as error:
      # Of a repository that cannot be reached, another group may be in the cache.
      unreachable = unreachable or error
      continue
    if None not in found:
      return found
  if unreachable:
    raise unreachable
  return None


def _optional(source: Source, folder: str, name: str) -> dict[str, Any]:
  try:
    path = sources.find_file(source, str(pathlib.PurePath(folder, name)))
  except hub.UnreachableError:
    # Not where the network only fails for a moment: padding might be another without the file.
    if not hub.offline():
      raise
    path = None
  return sources.read_json(path) if path else {}
