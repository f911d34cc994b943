"""Tokenizers from every layout in which transformers has written them, and back."""

import json

import numpy as np
import pytest

from rlft.models import clip, tokens
from rlft.models.files import hub, sources, vocabulary
from rlft.types import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz!"
WORDS = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "ca", "cat</w>"]
WORDS += ["<|startoftext|>", "<|endoftext|>"]
BEGIN, END = len(WORDS) - 2, len(WORDS) - 1
ID = {word: i for i, word in enumerate(WORDS)}
MERGES = [["c", "a"], ["ca", "t</w>"]]


def one_line(function, *arguments, match, **keywords):
  with pytest.raises(UserError, match=match) as error:
    function(*arguments, **keywords)
  assert "\n" not in str(error.value)


def network(length, vocab_size=99):
  """The config of a text tower."""
  return clip.CLIPTextConfig(vocab_size=vocab_size, max_position_embeddings=length)


def put(folder, **files):
  """Writes JSON, or lines, under the names of files without their suffixes."""
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    if name in ("merges", "vocab_txt"):
      (folder / f"{name.removesuffix('_txt')}.txt").write_text(content)
    else:
      (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


MERGES_TXT = "#version: 0.2\nc a\nca t</w>\n\n"
WHOLE = {
  "truncation": {"max_length": 3},
  "padding": {"strategy": "BatchLongest"},
  "added_tokens": [
    {"id": BEGIN, "content": "<|startoftext|>", "special": True, "normalized": False},
    {"id": END, "content": "<|endoftext|>", "special": True, "normalized": False},
  ],
  "model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": ID, "merges": MERGES},
}
JOINED = {**WHOLE, "model": {**WHOLE["model"], "merges": ["c a", "ca t</w>"]}}


@pytest.mark.parametrize(
  "files",
  [
    {"vocab": ID, "merges": MERGES_TXT},
    {"vocab": ID, "merges": MERGES_TXT.replace("\n", "\r\n")},
    {"tokenizer": WHOLE},
    {"tokenizer": JOINED, "vocab": {}},
    # transformers' number for "no limit".
    {"tokenizer": WHOLE, "tokenizer_config": {"model_max_length": int(1e30)}},
  ],
)
def test_a_vocabulary_is_enough(tmp_path, files):
  words = vocabulary.open_clip(put(tmp_path, **files), network(6))
  ids, sizes = words(["A cat", "", "a b c d e f"])
  a, b, c, d = (ID[f"{letter}</w>"] for letter in "abcd")
  expected = [
    [BEGIN, a, ID["cat</w>"], END, END, END],
    [BEGIN, END, END, END, END, END],
    [BEGIN, a, b, c, d, END],
  ]
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_array_equal(sizes, [4, 2, 8])
  assert (len(words), words.length, ids.dtype) == (len(WORDS), 6, np.int32)


def test_a_vocabulary_that_the_network_does_not_have(tmp_path):
  put(tmp_path, tokenizer=WHOLE)
  message = f"has {len(WORDS)} tokens, but the network takes 50; use the tokenizer of the same"
  one_line(vocabulary.open_clip, tmp_path, network(6, vocab_size=50), match=message)


BANG = {"content": "!", "special": True, "normalized": False, "__type": "AddedToken"}


@pytest.mark.parametrize(
  "files",
  [
    {"tokenizer_config": {"pad_token": "!", "model_max_length": 5}},
    {"tokenizer_config": {"pad_token": BANG, "model_max_length": 5}},
    # As in the published SD 2, whose config says otherwise.
    {
      "tokenizer_config": {"pad_token": "<|endoftext|>", "model_max_length": 5},
      "special_tokens_map": {"pad_token": "!"},
    },
    {
      "tokenizer_config": {
        "pad_token": "!",
        "model_max_length": 5,
        "added_tokens_decoder": {str(ID["!"]): BANG},
      },
      "special_tokens_map": {"pad_token": "<|endoftext|>"},
    },
  ],
)
def test_what_pads_is_found_inside_words(tmp_path, files):
  put(tmp_path, vocab=ID, merges=MERGES_TXT, **files)
  words = vocabulary.open_clip(tmp_path, network(9))
  (ids,), _ = words(["cat!"])
  np.testing.assert_array_equal(ids, [BEGIN, ID["cat</w>"], ID["!"], END, ID["!"]])
  words = vocabulary.open_clip(tmp_path, network(5), pad="<|endoftext|>")
  (ids,), _ = words(["cat!"])
  np.testing.assert_array_equal(ids, [BEGIN, ID["cat</w>"], ID["!</w>"], END, END])


@pytest.mark.parametrize(
  "files",
  [
    {"added_tokens": {"<cat-toy>": len(WORDS)}},
    {"tokenizer_config": {"added_tokens_decoder": {len(WORDS): {"content": "<cat-toy>"}}}},
  ],
)
def test_a_token_of_textual_inversion(tmp_path, files):
  put(tmp_path, vocab=ID, merges=MERGES_TXT, **files)
  words = vocabulary.open_clip(tmp_path, network(9))
  assert words.encode("a <cat-toy>") == [BEGIN, ID["a</w>"], len(WORDS), END]
  assert len(words) == len(WORDS) + 1


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, "there is no CLIP tokenizer; put vocab.json and merges.txt, or tokenizer.json there"),
    ({"vocab": ID}, "there is no CLIP tokenizer"),
    ({"vocab": ID, "merges": "a"}, "vocab.json is not of a CLIP tokenizer"),
    ({"vocab": ID, "merges": "z z"}, "vocab.json is not of a CLIP tokenizer .*`zz` out of vocab"),
    ({"vocab": [1], "merges": ""}, "vocab.json cannot be read as JSON .it holds no object"),
    ({"tokenizer": {}}, "tokenizer.json is not of a CLIP tokenizer"),
    (
      {"tokenizer": {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}},
      "tokenizer.json is not of a CLIP tokenizer .it holds Unigram, not byte pairs",
    ),
    (
      {"vocab": ID, "merges": "", "added_tokens": {"<a>": 99}},
      "'<a>' should have id 99, but the vocabulary ends elsewhere",
    ),
    (
      {"tokenizer": WHOLE, "tokenizer_config": {"model_max_length": 0.5}},
      "model_max_length is 0",
    ),
    ({"tokenizer": WHOLE, "tokenizer_config": {"model_max_length": "long"}}, "invalid literal"),
  ],
)
def test_what_is_no_clip_tokenizer(tmp_path, files, message):
  put(tmp_path, **files)
  one_line(vocabulary.open_clip, tmp_path.parent, network(9), folder=tmp_path.name, match=message)


def test_what_is_written_is_read_from_each_of_its_files(tmp_path):
  put(tmp_path, vocab=ID, merges=MERGES_TXT, added_tokens={"<cat-toy>": len(WORDS)})
  words = vocabulary.open_clip(tmp_path, network(5))
  vocabulary.write_clip(tmp_path / "new", words)
  texts = ["a cat!", "<cat-toy> <|endoftext|> b"]
  for dropped in ((), ("tokenizer.json",), ("vocab.json", "merges.txt")):
    for name in dropped:
      (tmp_path / "new" / name).unlink()
    found = vocabulary.open_clip(tmp_path / "new", network(77))
    assert found.length == 5 and len(found) == len(words)
    np.testing.assert_array_equal(found(texts)[0], words(texts)[0])
    vocabulary.write_clip(tmp_path / "new", words)


def test_files_in_the_cache_count_where_a_hub_cannot_be_reached(tmp_path, monkeypatch):
  put(tmp_path, tokenizer=WHOLE)

  def find(source, name):
    if not (tmp_path / name).exists() and not name.startswith(("special", "added", "tokenizer_")):
      raise hub.UnreachableError(f"{source}: {name} is not in the cache")
    return tmp_path / name if (tmp_path / name).exists() else None

  monkeypatch.setattr(sources, "find_file", find)
  assert len(vocabulary.open_clip("org/name@main", network(5))) == len(WORDS)
  (tmp_path / "tokenizer.json").unlink()
  one_line(vocabulary.open_clip, "org/name@main", network(5), match="vocab.json is not in the")


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "cat", "##s", "\u72d7"]


def test_berts_vocabulary(tmp_path):
  put(tmp_path, vocab_txt="\n".join(BERT) + "\n")
  expected = {word: i for i, word in enumerate(BERT)}
  found, path = vocabulary.read_bert(str(tmp_path))
  assert found == expected and path == tmp_path / "vocab.txt"
  model = {"type": "WordPiece", "vocab": expected}
  new = put(tmp_path / "new", tokenizer={"model": model})
  for source in (new, new / "tokenizer.json"):
    assert vocabulary.read_bert(str(source)) == (expected, new / "tokenizer.json")
  words = tokens.bert(found, length=6)
  ids, sizes = words(["Caf\u00e9 CATS [MASK]", "\u72d7\u72d7 zebra"])
  np.testing.assert_array_equal(ids, [[2, 5, 6, 7, 4, 3], [2, 8, 8, 1, 3, 0]])
  np.testing.assert_array_equal(sizes, [6, 5])
  put(new, tokenizer=WHOLE)
  one_line(vocabulary.read_bert, str(new), match="holds BPE, not BERT's WordPiece")
  one_line(vocabulary.read_bert, str(tmp_path / "a"), match="does not exist")
