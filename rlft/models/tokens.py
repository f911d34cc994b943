"""Texts to token ids: CLIP's byte pairs and BERT's word pieces, as transformers 5 cuts them.

The library `tokenizers` does it, from a vocabulary; `rlft.models.files.vocabulary` reads one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging

import numpy as np
import tokenizers

_log = logging.getLogger(__name__)

# CLIP's words: its own tokens, English endings, letters, single digits, and runs of anything else.
_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
END_OF_WORD = "</w>"
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Cuts texts into tokens, and knows what a network takes of them.

  Attributes:
    core: the library's tokenizer; puts `begin` and `end` around each text, and neither pads nor
      cuts it off.
    length: L, how many tokens the network takes.
    begin, end, pad, unknown: tokens of the vocabulary.
  """

  core: tokenizers.Tokenizer
  length: int
  begin: str
  end: str
  pad: str
  unknown: str

  def __len__(self) -> int:
    """Number of tokens in the vocabulary."""
    return self.core.get_vocab_size()

  @property
  def begin_id(self) -> int:
    """The id of `begin`."""
    return self.core.token_to_id(self.begin)

  @property
  def end_id(self) -> int:
    """The id of `end`."""
    return self.core.token_to_id(self.end)

  @property
  def pad_id(self) -> int:
    """The id of `pad`."""
    return self.core.token_to_id(self.pad)

  def encode(self, text: str) -> list[int]:
    """The ids of a whole text, `begin` first and `end` last."""
    # One by one: the library encodes batches in threads, which a later fork would not survive.
    return self.core.encode(text).ids

  def __call__(
    self, texts: Sequence[str], *, length: int | None = None, pad_id: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of fixed length.

    Args:
      texts: N texts; of longer ones the last words are cut off, `end` is not.
      length: L, if it is to be another than `self.length`.
      pad_id: what follows `end`, if it is to be another than `pad`.

    Returns:
      ids `[N, L]` int32, and how many tokens each whole text has, `[N]` int32.
    """
    length = self.length if length is None else length
    pad_id = self.pad_id if pad_id is None else pad_id
    ids = np.full((len(texts), length), pad_id, np.int32)
    sizes = np.zeros(len(texts), np.int32)
    for i, text in enumerate(texts):
      found = self.encode(text)
      sizes[i] = len(found)
      if len(found) > length:
        found = [*found[: length - 1], found[-1]]
      ids[i, : len(found)] = found
    return ids, sizes


def clip(
  vocabulary: Mapping[str, int],
  merges: Sequence[tuple[str, str]],
  *,
  length: int,
  begin: str = CLIP_BEGIN,
  end: str = CLIP_END,
  pad: str | None = None,
  unknown: str | None = None,
  added: Mapping[int, tokenizers.AddedToken] | None = None,
) -> Tokenizer:
  """CLIP's tokenizer: lower case, words, byte pairs.

  Args:
    vocabulary: `{token: id}`.
    merges: pairs of tokens that become one, most frequent first.
    length: see `Tokenizer`.
    begin, end, pad, unknown: see `Tokenizer`; the last two are `end` where they are None.
    added: `{id: token}`, found in a text before it is cut into words; those that the vocabulary
      lacks go on where it ends.

  Raises:
    ValueError: a merge makes no token of the vocabulary, or the ids of `added` do not go on where
      it ends.
  """
  pad, unknown = (end if token is None else token for token in (pad, unknown))
  try:
    pairs = tokenizers.models.BPE(
      vocab=dict(vocabulary),
      merges=list(merges),
      end_of_word_suffix=END_OF_WORD,
      unk_token=unknown,
    )
  except Exception as error:  # the library raises no other class
    raise ValueError(str(error)) from error
  core = tokenizers.Tokenizer(pairs)
  core.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.NFC(),
      tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
      tokenizers.normalizers.Lowercase(),
    ]
  )
  core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  core.decoder = tokenizers.decoders.ByteLevel()
  for id, token in sorted((added or {}).items()):
    core.add_tokens([token])
    if core.token_to_id(token.content) != id:
      raise ValueError(f"{token.content!r} should have id {id}, but the vocabulary ends elsewhere")
  known = {token.content for token in core.get_added_tokens_decoder().values()}
  core.add_special_tokens([t for t in (begin, end, unknown, pad) if t not in known])
  # By place: the second's name is another in each release of the library.
  core.post_processor = tokenizers.processors.RobertaProcessing(
    (end, core.token_to_id(end)),
    (begin, core.token_to_id(begin)),
    trim_offsets=False,
    add_prefix_space=False,
  )
  return Tokenizer(core, length, begin, end, pad, unknown)


def bert(vocabulary: Mapping[str, int], *, length: int) -> Tokenizer:
  """The tokenizer of uncased BERTs: lower case without accents, words, pieces of words.

  Args:
    vocabulary: `{token: id}`, with `BERT_SPECIAL` in it.
    length: see `Tokenizer`.
  """
  pad, unknown, begin, end = BERT_SPECIAL
  core = tokenizers.Tokenizer(tokenizers.models.WordPiece(dict(vocabulary), unk_token=unknown))
  core.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  core.post_processor = tokenizers.processors.BertProcessing(
    (end, vocabulary[end]), (begin, vocabulary[begin])
  )
  core.add_special_tokens([t for t in (*BERT_SPECIAL, "[MASK]") if t in vocabulary])
  return Tokenizer(core, length, begin, end, pad, unknown)


def tokenize(
  tokenizer: Tokenizer, texts: Sequence[str], *, source: str = ""
) -> tuple[np.ndarray, int]:
  """Token ids of fixed length; longer texts are cut off and counted.

  Args:
    tokenizer: its `length` is L.
    texts: N prompts.
    source: where they come from; if given, texts that are cut off are logged in one warning.

  Returns:
    ids `[N, L]` int32, padded, and how many of the N texts had more than L tokens.
  """
  ids, sizes = tokenizer(texts)
  truncated = int((sizes > tokenizer.length).sum())
  if truncated and source:
    _log.warning(
      "%d of %d prompts of %s have more than %d tokens and were cut off",
      truncated,
      len(texts),
      source,
      tokenizer.length,
    )
  return ids, truncated
