"""Tokens of prompts: padding, and what is said of those that are cut off."""

import json
import logging

import numpy as np
import pytest
import tokens_cases as cases

from rlft.models import clip, tokens
from rlft.models.files import vocabulary


@pytest.fixture(scope="module")
def tokenizer():
  """A CLIP tokenizer of letters with L = 8: start, six letters, end."""
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
  return tokens.clip({word: i for i, word in enumerate(words)}, [], length=8)


def test_tokens_are_padded_and_cut_off(tokenizer, caplog):
  texts = ["ab", "a b c d e f", "a b c d e f g", "a b c d e f g h"]
  with caplog.at_level(logging.WARNING):
    ids, truncated = tokens.tokenize(tokenizer, texts, source="p.txt")
  start, end = 52, 53
  assert ids.dtype == np.int32
  # 'b' at the end of a word is letter number 1 of the second alphabet: 26 + 1.
  assert ids.tolist() == [
    [start, 0, 27, end, end, end, end, end],
    [start, 26, 27, 28, 29, 30, 31, end],
    [start, 26, 27, 28, 29, 30, 31, end],
    [start, 26, 27, 28, 29, 30, 31, end],
  ]
  assert truncated == 2
  assert caplog.messages == ["2 of 4 prompts of p.txt have more than 8 tokens and were cut off"]


def test_tokens_that_fit_give_no_warning(tokenizer, caplog):
  ids, truncated = tokens.tokenize(tokenizer, ["", "a b c d e f"], source="p.txt")
  assert ids.shape == (2, 8)
  assert truncated == 0
  assert not caplog.messages


def test_tokenizing_says_nothing_without_a_source(tokenizer, caplog):
  _, truncated = tokens.tokenize(tokenizer, ["abcdefgh"])
  assert truncated == 1
  assert not caplog.messages


@pytest.mark.parametrize("kind", ["clip", "clip_bang", "bert"])
def test_ids_are_those_of_transformers_5(kind):
  config = clip.CLIPTextConfig(vocab_size=942, max_position_embeddings=77)
  if kind == "bert":
    words = tokens.bert({word: id for id, word in enumerate(cases.BERT)}, length=77)
  else:
    words = vocabulary.open_clip(cases.CLIP, config)
  if kind == "clip_bang":
    words.core.add_special_tokens(["!"])
  expected = json.loads(cases.TOKENS.read_text())[kind]
  for text, ids in zip(cases.TEXTS, expected, strict=True):
    assert words.encode(text) == ids, text


def test_transformers_still_makes_these_ids():
  pytest.importorskip("transformers", minversion="5")
  assert cases.theirs() == json.loads(cases.TOKENS.read_text())
