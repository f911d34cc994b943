"""The page of a suite."""

import base64
import io

from evaluation_cases import result
import numpy as np
import PIL.Image

from rlft.config.settings import EvalConfig
from rlft.evaluation import side_by_side
from rlft.evaluation.evaluate import EvalSpec
from rlft.evaluation.tables import Table
from rlft.report import samples, suite
from rlft.types import JaxReward, Prompt

HOSTILE = "<script>alert(1)</script>"


def page(galleries=(), **given):
  models = [
    side_by_side.Model(name, {"a": result(scores)}, {"a": 3.0})
    for name, scores in (("base", np.zeros(16)), (HOSTILE, np.ones(16)))
  ]
  spec = EvalSpec("a", JaxReward("m", lambda *_: None), [Prompt(str(i)) for i in range(16)], 16)
  rows = side_by_side.rows([EvalConfig("a", "p", "m", images=16)], [spec], models)
  nothing = {"models": [], "sweeps": {}, "missing": [], "notes": []}
  return suite.page("standard", rows=rows, galleries=galleries, **{**nothing, **given})


def test_what_is_given_is_shown_and_escaped():
  sweep = Table(("evaluation", "1", "3"), [("a", "0", "1")])
  text = page(
    models=[("base", HOSTILE)], sweeps={"base": sweep}, missing=["x is left out"], notes=["a note"]
  )
  assert HOSTILE not in text and text.count("&lt;script&gt;") >= 2
  for words in ("x is left out.", "a note", "base by guidance", "+1.0000 [+1.0000, +1.0000]"):
    assert words in text
  # Only the second model's line says what became of it.
  assert text.count('class="better"') == 1 and "data:image" not in text


def test_pictures_of_models_stand_side_by_side():
  def sheet(level, size):
    cells = tuple(np.full((size, 2 * size, 3), level + k, np.uint8) for k in range(2))
    return samples.Sheet(0, ("a dog", HOSTILE), cells, size, 2)

  small = suite.gallery("a", {"base": sheet(10, 8), "ours": sheet(20, 8)})
  assert (small.width, small.pixelated, list(small.models)) == (128, True, ["base", "ours"])
  prompt, pictures = small.rows[1]
  assert prompt == HOSTILE
  for picture, level in zip(pictures, (11, 21), strict=True):
    data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    assert (np.asarray(PIL.Image.open(io.BytesIO(data))) == level).all()
  large = suite.gallery("a", {"base": sheet(10, 512)})
  data = base64.b64decode(large.rows[0][1][0].removeprefix("data:image/jpeg;base64,"))
  assert PIL.Image.open(io.BytesIO(data)).size == (512, 256) and not large.pixelated
  text = page([small])
  assert text.count("data:image/png;base64,") == 4
  assert 'alt="a dog, ours"' in text and HOSTILE not in text
