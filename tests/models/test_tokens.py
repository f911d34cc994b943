"""Tokens of prompts: padding, and what is said of those that are cut off."""

import json
import logging

import numpy as np
import pytest

from rlft.models import tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A CLIPTokenizer of letters with L = 8: start, six letters, end."""
  from transformers import CLIPTokenizer

  folder = tmp_path_factory.mktemp("tokenizer")
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
  (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


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
