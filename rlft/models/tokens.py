"""Token ids of prompts."""

from collections.abc import Sequence
import logging
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)


def tokenize(tokenizer: Any, texts: Sequence[str], *, source: str = "") -> tuple[np.ndarray, int]:
  """Token ids of fixed length; longer texts are cut off and counted.

  Args:
    tokenizer: a transformers CLIPTokenizer; its `model_max_length` is L.
    texts: N prompts.
    source: where they come from; if given, texts that are cut off are logged in one warning.

  Returns:
    ids `[N, L]` int32, padded, and how many of the N texts had more than L tokens.
  """
  length = tokenizer.model_max_length
  encoded = tokenizer(
    list(texts),
    padding="max_length",
    truncation=True,
    max_length=length,
    return_attention_mask=True,
    return_tensors="np",
  )
  # Only a row without padding can have been cut off; these are counted by encoding them in full.
  full = [texts[i] for i in np.flatnonzero(encoded["attention_mask"].all(axis=1))]
  whole = tokenizer(full, truncation=False, verbose=False)["input_ids"] if full else []
  truncated = sum(len(ids) > length for ids in whole)
  if truncated and source:
    _log.warning(
      "%d of %d prompts of %s have more than %d tokens and were cut off",
      truncated,
      len(texts),
      source,
      length,
    )
  return encoded["input_ids"].astype(np.int32), truncated
