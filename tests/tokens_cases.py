"""Texts that tokenizers may disagree about, and what transformers 5 makes of them.

python tests/tokens_cases.py     (needs transformers 5; writes what the tests compare with)
"""

import json
import pathlib
import tempfile

TOKENS = pathlib.Path(__file__).parent / "fixtures" / "tokens.json"
# Its vocabulary has every byte.
CLIP = pathlib.Path(__file__).parents[1] / "rlft" / "emoji" / "data" / "emoji-sd" / "tokenizer"
BERT = "[PAD] [UNK] [CLS] [SEP] [MASK] a cafe cat do don dog ' t two ! ##s ##g 12 , 3".split()

TEXTS = (
  "",
  "a dog next to an owl",
  "It's 12 DOGS,  don't 'Tis 3.14!",
  "caf\u00e9 cafe\u0301 \u00c9 \u00df \u0130 \u03a3",
  "\u72d7\u72d7 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f \u0e44\u0e17\u0e22",
  "\U0001f415 \U0001f469\u200d\U0001f467 \u00bd \u2460 \ufb01",
  "tab\tnew\nline \u00a0nbsp\u2003em \u2028sep",
  "\x00\x07 \u200b \ufeff \u00ad",
  "a cat <|endoftext|> dog <|STARTOFTEXT|> <|startoftext|>",
  "[PAD] [unk] [CLS] two cats [MASK]",
  "_under_score-dash\u2014em\u2026 &amp; #1",
  "x" * 40,
)


def theirs() -> dict[str, list[list[int]]]:
  """`{'clip': ids of each of TEXTS, 'clip_bang': the same where '!' pads, 'bert': ...}`."""
  import transformers

  words = {
    "clip": transformers.CLIPTokenizer.from_pretrained(CLIP),
    "clip_bang": transformers.CLIPTokenizer.from_pretrained(CLIP, pad_token="!"),
  }
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")
    words["bert"] = transformers.BertTokenizer.from_pretrained(folder)
  return {name: [found(text)["input_ids"] for text in TEXTS] for name, found in words.items()}


if __name__ == "__main__":
  TOKENS.write_text(json.dumps(theirs()) + "\n")
