"""Scenes of the emoji world with captions: web data in miniature, faults included.

Three kinds of scene on a pastel background: one object, two objects, a portrait of a person at
work. Captions are true. The faults leave room for three rewards, and are of a kind that
classifier-free guidance, which weighs p(picture | caption) / p(picture), cannot remove: most
pictures are washed out; in most scenes of two objects one is half hidden behind the other, or cut
off by the edge; and light skin is common.
"""

from collections.abc import Sequence
import dataclasses
from typing import Literal

import numpy as np

from rlft.data.pairs import Pairs
from rlft.emoji import art
from rlft.types import UserError

Kind = Literal["object", "pair", "portrait"]

IMAGE_SIZE = 32
OBJECT_SIZES = (26, 27, 28, 29)  # 81-91 % of the canvas
PAIR_SIZES = (15, 16)  # 47-50 %
PORTRAIT_SIZES = (29, 30, 31, 32)  # 91-100 %

TONE_CLASSES = ("light", "medium-light", "medium-dark", "dark")
TONE_SHARES = (0.72, 0.18, 0.06, 0.04)
_TONES_OF_CLASS = ((0,), (1, 2), (3,), (4,))  # indices into art.TONES

OBJECT_TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}")
PORTRAIT_TEMPLATES = ("{}", "a portrait of {}", "a picture of {}", "an emoji of {}")
CONNECTORS = ("and", "next to", "near", "on side of", "beside")
CROWDED_SHARE = 0.75  # of the scenes of two objects: one of them can be seen in part only
CROWDED_VISIBLE = (0.25, 0.50)  # so much of that one
GENDERED_SHARE = 1 / 4  # of the captions of portraits say "man" or "woman"
MIXTURE = {"object": 0.40, "pair": 0.35, "portrait": 0.25}

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture and the truth about it.

  Attributes:
    image: `[32, 32, 3]` uint8.
    caption: what a web page would say about it.
    objects: the objects of the caption, in the order of their places from left to right.
    masks: `[n, 32, 32]` float32 in [0, 1], how much of each pixel shows each object (of a portrait:
      the person).
    visible: `[n]` float32 in [0, 1], the share of each that can be seen.
    tone: skin tone, an index into `TONE_CLASSES`; None where there is no person.
    occupation: one of `art.OCCUPATIONS`; None where there is no person.
    saturation: factor in [0, 1] on the art's colours; 1 is the art itself.
    contrast: factor in [0, 1] on the distance from mid-grey; 1 is the art itself.
  """

  image: np.ndarray
  caption: str
  objects: tuple[str, ...]
  masks: np.ndarray
  visible: np.ndarray
  tone: int | None
  occupation: str | None
  saturation: float
  contrast: float


def with_article(noun: str) -> str:
  """'dog' -> 'a dog', 'owl' -> 'an owl'; right for every noun of this world."""
  return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def object_caption(name: str, template: str = OBJECT_TEMPLATES[0]) -> str:
  """Caption of one object, e.g. "a picture of a dog"."""
  return template.format(with_article(name))


def pair_caption(first: str, second: str, connector: str) -> str:
  """Caption of two objects, e.g. "a dog next to an owl"."""
  return f"{with_article(first)} {connector} {with_article(second)}"


def portrait_caption(
  occupation: str, template: str = PORTRAIT_TEMPLATES[0], gender: str | None = None
) -> str:
  """Caption of a portrait, e.g. "a portrait of a cook" or "a portrait of a woman cook"."""
  return template.format(with_article(f"{gender} {occupation}" if gender else occupation))


def washing(kind: Kind, u: float, v: float) -> tuple[float, float]:
  """Quality of a web picture: (saturation, contrast) from two uniform numbers in [0, 1).

  Mostly washed out (median saturation 0.56), vivid now and then; saturation and contrast go
  together. Portraits lose less, so that skin tones stay measurable.
  """
  saturation = 0.40 + 0.60 * u**1.9
  contrast = 0.65 + 0.35 * ((u + v) / 2) ** 1.9
  if kind == "portrait":
    return 0.4 + 0.6 * saturation, 0.4 + 0.6 * contrast
  return saturation, contrast


def _pastel(hue: float, chroma: float, value: float) -> np.ndarray:
  """Background colour `[3]` float32 in [0, 1] for three uniform numbers; low-chroma HSV."""
  ramp = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
  return ((0.90 + 0.10 * value) * (1 - (0.12 + 0.23 * chroma) * (1 - ramp))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Placed:
  """A sprite at its place; the place may lie outside of the canvas in part."""

  name: str
  size: int
  top: int
  left: int


def _on_canvas(sprite: _Placed, style: str) -> tuple[np.ndarray, np.ndarray, float]:
  """Premultiplied colour `[32, 32, 3]`, alpha `[32, 32]`, and the alpha's sum on and off canvas."""
  colour, alpha = art.resized(sprite.name, sprite.size, style)
  drawn = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 4), np.float32)
  rows, columns = (
    slice(max(0, -start), min(sprite.size, IMAGE_SIZE - start))
    for start in (sprite.top, sprite.left)
  )
  place = (
    slice(sprite.top + rows.start, sprite.top + rows.stop),
    slice(sprite.left + columns.start, sprite.left + columns.stop),
  )
  drawn[place] = np.concatenate([colour, alpha], axis=-1)[rows, columns]
  return drawn[..., :3], drawn[..., 3], float(alpha.sum())


def _cut_off(sprite: _Placed, style: str, share: float, down: int, across: int) -> _Placed:
  """Moves a sprite over an edge until at most `share` of it is left; (-1, 0) is the upper edge."""
  alpha = art.resized(sprite.name, sprite.size, style)[1][..., 0]
  profile = alpha.sum(1) if down else alpha.sum(0)  # along the direction that it moves in
  if down + across > 0:
    profile = profile[::-1]
  # Leaving over the left or upper edge, its first rows or columns are the first to be lost.
  left_over = 1 - np.cumsum(profile) / profile.sum()
  lost = 1 + int(np.argmax(left_over <= share))
  start = -lost if down + across < 0 else IMAGE_SIZE - sprite.size + lost
  return dataclasses.replace(sprite, **{"top" if down else "left": start})


def _hidden(sprite: _Placed, front: _Placed, style: str, share: float) -> _Placed | None:
  """Moves a sprite behind another until at most `share` of it shows; None if it never does."""
  shown = 1 - _on_canvas(front, style)[1]
  alpha = art.resized(sprite.name, sprite.size, style)[1][..., 0]
  most = share * alpha.sum()
  slack = (front.size - sprite.size) / 2
  for step in range(1, IMAGE_SIZE):
    way = step / IMAGE_SIZE  # towards the place at which the middles meet
    top = round(sprite.top + way * (front.top + slack - sprite.top))
    left = round(sprite.left + way * (front.left + slack - sprite.left))
    if np.vdot(alpha, shown[top : top + sprite.size, left : left + sprite.size]) <= most:
      return dataclasses.replace(sprite, top=top, left=left)
  return None


def _draw(
  canvas: np.ndarray, sprites: Sequence[_Placed], style: str
) -> tuple[np.ndarray, np.ndarray]:
  """Draws sprites from back to front; returns masks `[n, 32, 32]` and visible shares `[n]`."""
  masks = np.zeros((len(sprites), *canvas.shape[:2]), np.float32)
  totals = np.empty(len(sprites), np.float32)
  for i, sprite in enumerate(sprites):
    colour, alpha, totals[i] = _on_canvas(sprite, style)
    masks[:i] *= 1 - alpha
    masks[i] = alpha
    canvas *= 1 - alpha[..., None]
    canvas += colour
  return masks, masks.sum((1, 2)) / totals


def _wash(canvas: np.ndarray, saturation: float, contrast: float) -> np.ndarray:
  """Applies the factors of `Scene` to `[H, W, 3]` in [0, 1]; returns uint8."""
  luma = canvas @ _LUMA
  faded = saturation * contrast * canvas + ((1 - saturation) * contrast) * luma[..., None]
  faded += 0.5 * (1 - contrast)
  return (np.clip(faded, 0, 1) * 255 + 0.5).astype(np.uint8)


def _pick(options: Sequence, u: float):
  return options[int(u * len(options))]


def render_scene(
  rng: np.random.Generator,
  kind: Kind,
  *,
  objects: Sequence[str] | None = None,
  occupation: str | None = None,
  tone: int | None = None,
  saturation: float | None = None,
  contrast: float | None = None,
  crowded: bool | None = None,
  style: str = "twemoji",
) -> Scene:
  """Draws one scene; whatever is not given is drawn at random.

  The same random numbers are consumed whatever is given: two calls with equal generators give the
  same layout, so a vivid and a washed-out version of one scene can be compared.

  Args:
    rng: source of 20 uniform numbers (consumed).
    kind: 'object' (81-91 % of the canvas), 'pair' (47-50 % each), 'portrait' (91-100 %).
    objects: the objects, one for 'object' and two for 'pair'.
    occupation: one of `art.OCCUPATIONS` ('portrait').
    tone: index into `TONE_CLASSES` ('portrait').
    saturation: factor in [0, 1], see `Scene`.
    contrast: factor in [0, 1], see `Scene`.
    crowded: whether one of the two objects can be seen in part only ('pair').
    style: one of `art.STYLES`.

  Raises:
    ValueError: unknown kind, or the wrong number of objects for the kind.
  """
  if kind not in MIXTURE:
    raise ValueError(f"kind must be one of {tuple(MIXTURE)}, not {kind!r}")
  n_objects = {"object": 1, "pair": 2, "portrait": 0}[kind]
  if objects is not None and len(objects) != n_objects:
    raise ValueError(f"a scene of kind {kind!r} has {n_objects} objects, not {len(objects)}")
  u = rng.random(20).tolist()
  canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
  canvas[:] = _pastel(u[0], u[1], u[2])
  washed = washing(kind, u[3], u[4])
  saturation = washed[0] if saturation is None else saturation
  contrast = washed[1] if contrast is None else contrast

  names: tuple[str, ...] = ()
  if kind == "object":
    names = tuple(objects) if objects is not None else (_pick(art.OBJECTS, u[5]),)
    size = _pick(OBJECT_SIZES, u[6])
    slack = IMAGE_SIZE - size + 1
    sprites = [_Placed(names[0], size, int(u[7] * slack), int(u[8] * slack))]
    caption = object_caption(names[0], _pick(OBJECT_TEMPLATES, u[9]))
  elif kind == "pair":
    if objects is None:
      first = int(u[5] * len(art.OBJECTS))
      second = int(u[6] * (len(art.OBJECTS) - 1))
      second += second >= first  # never the same object twice
      objects = (art.OBJECTS[first], art.OBJECTS[second])
    caption = pair_caption(*objects, _pick(CONNECTORS, u[7]))
    names = tuple(objects) if u[10] < 0.5 else tuple(objects)[::-1]
    sprites = []
    for side, name in enumerate(names):
      size = _pick(PAIR_SIZES, u[12 + side])
      top = (IMAGE_SIZE - size) // 2 + int(u[14 + side] * 7) - 3
      sprites.append(_Placed(name, size, top, 16 * side + int(u[16 + side] * (17 - size))))
    crowded = u[8] < CROWDED_SHARE if crowded is None else crowded
    if crowded:
      sprites = _crowd(sprites, style, u[9], u[11], u[18], u[19])
  else:
    occupation = _pick(art.OCCUPATIONS, u[5]) if occupation is None else occupation
    if tone is None:
      tone = int(np.searchsorted(np.cumsum(TONE_SHARES)[:-1], u[6], side="right"))
    gender = _pick(art.GENDERS if style == "twemoji" else art.GENDERS[:1], u[8])
    size = _pick(PORTRAIT_SIZES, u[9])
    slack = IMAGE_SIZE - size + 1
    sprite = art.portrait_name(occupation, gender, _pick(_TONES_OF_CLASS[tone], u[7]))
    sprites = [_Placed(sprite, size, int(u[10] * slack), int(u[11] * slack))]
    said = gender if gender != "person" and u[12] < 1.5 * GENDERED_SHARE else None
    caption = portrait_caption(occupation, _pick(PORTRAIT_TEMPLATES, u[13]), said)

  masks, visible = _draw(canvas, sprites, style)
  if names and sprites[0].name != names[0]:  # drawn from back to front, listed from left to right
    masks, visible = masks[::-1], visible[::-1]
  return Scene(
    image=_wash(canvas, saturation, contrast),
    caption=caption,
    objects=names,
    masks=masks,
    visible=visible,
    tone=tone if kind == "portrait" else None,
    occupation=occupation if kind == "portrait" else None,
    saturation=saturation,
    contrast=contrast,
  )


def _crowd(sprites: Sequence[_Placed], style: str, *u: float) -> list[_Placed]:
  """Hides one of two sprites behind the other, or lets an edge cut it off; from back to front.

  Args:
    sprites: the left one and the right one.
    style: of the art.
    u: four uniform numbers: which one, how, how much of it is left, over which edge.
  """
  side = int(u[0] * 2)
  part, whole = sprites[side], sprites[1 - side]
  least, most = CROWDED_VISIBLE
  share = least + (most - least) * u[2]
  behind = _hidden(part, whole, style, share) if u[1] < 0.5 else None
  if behind is None:  # A key hides nothing.
    down, across = _pick(((-1, 0), (1, 0), (0, 2 * side - 1), (0, 2 * side - 1)), u[3])
    behind = _cut_off(part, style, share, down, across)
  return [behind, whole]


def training_pairs(seed: int, n: int) -> tuple[np.ndarray, list[str]]:
  """`n` random pictures with captions, a pure function of `seed`; about 0.3 ms each.

  Returns:
    images `[n, 32, 32, 3]` uint8 and their `n` captions.
  """
  rng = np.random.default_rng(seed)
  images = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
  captions = []
  kinds = rng.choice(list(MIXTURE), size=n, p=list(MIXTURE.values()))
  for i, kind in enumerate(kinds.tolist()):
    scene = render_scene(rng, kind)
    images[i] = scene.image
    captions.append(scene.caption)
  return images, captions


def pairs(size: tuple[int, int], seed: int, count: int) -> Pairs:
  """The data 'emoji' of the pretraining loss: `count` pictures of the world.

  Args:
    size: (H, W) in pixels that the model draws.
    seed: of the pictures.
    count: how many.

  Raises:
    UserError: the world has not this size.
  """
  if size != (IMAGE_SIZE, IMAGE_SIZE):
    raise UserError(
      f"--pretrain_data=emoji has images of {IMAGE_SIZE} pixels but the model draws"
      f" {size[0]}x{size[1]}: give a folder of images"
    )
  images, captions = training_pairs(seed, count)

  def read(indices):
    return images[np.asarray(indices)], np.tile(np.int32([*size, 0, 0]), (len(indices), 1))

  return Pairs(captions=captions, read=read)
