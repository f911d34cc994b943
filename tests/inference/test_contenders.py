"""What stands behind --models."""

import pytest

from rlft.inference import contenders
from rlft.types import UserError


def test_options_keep_their_characters():
  (found,) = contenders.parse(["runs/a?lora=/x/a+b%26c.safetensors&guidance_scale=3"])
  assert (found.source, found.drawing) == (
    "runs/a",
    {"lora": "/x/a+b&c.safetensors", "guidance_scale": 3.0},
  )


def test_options_of_the_source_stay_with_it():
  (found,) = contenders.parse(["model.safetensors?tokenizer=vocab.txt"])
  assert (found.source, found.drawing) == ("model.safetensors?tokenizer=vocab.txt", {})


def test_mistakes():
  with pytest.raises(UserError, match="unknown option scale"):
    contenders.parse(["a?lora=x&scale=2"])
  with pytest.raises(UserError, match="there are two of the name a: add"):
    contenders.parse(["x/a", "y/a"])
