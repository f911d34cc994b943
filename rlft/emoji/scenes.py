"""What the reward models learn from: rendered scenes, spoiled as generated pictures are.

Scenes come from the renderer with their truth. `degrade` then blurs them, moves them, adds noise
and blends them with other scenes or with their own background, and softens the labels accordingly:
what is half there is labelled as half there. Without this a confidence would be 0 or 1 on clean
scenes and anything at all on a generated picture.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlft.emoji import art, world

PERSON = len(art.OBJECTS)  # the index of a portrait's class, after those of `art.OBJECTS`
KIND_SHARES = {"object": 0.30, "pair": 0.50, "portrait": 0.20}

_INDEX = {name: i for i, name in enumerate(art.OBJECTS)}
_SIZE = world.IMAGE_SIZE
_SHOWN = 0.5  # a pixel of which a thing has this much belongs to it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scenes:
  """B rendered scenes and their truth.

  Attributes:
    images: `[B, 32, 32, 3]` uint8.
    backgrounds: `[B, 3]` uint8, the colour behind the objects.
    regions: `[B, 2, 32, 32]` bool, the pixels of each thing drawn: objects from left to right, or
      the person first.
    visible: `[B, 2]` float32 in [0, 1], the share of each thing that is on the canvas and not
      behind another.
    boxes: `[B, 2, 4]` float32, around the regions: left, top, right, bottom edge in pixels; 0 where
      there is nothing.
    classes: `[B, 2]` int32, indices into `art.OBJECTS`, or `PERSON`; -1 where there is nothing.
    tones: `[B]` int32 indices into `world.TONE_CLASSES`; -1 where there is no person.
  """

  images: np.ndarray
  backgrounds: np.ndarray
  regions: np.ndarray
  visible: np.ndarray
  boxes: np.ndarray
  classes: np.ndarray
  tones: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truth:
  """What is to be seen in B pictures; float32.

  A picture has up to four things: its own two, and those of the scene that shows through.

  Attributes:
    classes: `[B, 4]` int32, as in `Scenes`.
    presence: `[B, 4]` in [0, 1], how much of each thing can be seen, and how well.
    boxes: `[B, 4, 4]` left, top, right, bottom edge in [0, 1] of the canvas.
    tones: `[B]` int32 index into `world.TONE_CLASSES`; any value where `tone_known` is 0.
    tone_known: `[B]`; 1 where one person, and no other, is plain to see.
    person: `[B]` in [0, 1], how much of a person is there.
  """

  classes: jax.Array
  presence: jax.Array
  boxes: jax.Array
  tones: jax.Array
  tone_known: jax.Array
  person: jax.Array


def scenes(
  rng: np.random.Generator,
  n: int,
  *,
  wide: bool,
  objects: Sequence[str] = art.OBJECTS,
  kinds: Mapping[str, float] = KIND_SHARES,
  style: str = "twemoji",
) -> Scenes:
  """Renders `n` scenes with uniform tones; about 0.4 ms each.

  Args:
    rng: consumed.
    n: how many.
    wide: draw washing evenly, and a little beyond the world's range at both ends (to train), rather
      than as the world does (to measure).
    objects: what is drawn; at least two.
    kinds: share of each kind of scene.
    style: one of `art.STYLES`.
  """
  found = []
  drawn = rng.choice(list(kinds), size=n, p=list(kinds.values()))
  for kind in drawn.tolist():
    given = spread_washing(rng, kind) if wide else {}
    if kind != "portrait":
      picked = rng.choice(len(objects), size=1 if kind == "object" else 2, replace=False)
      given["objects"] = [objects[k] for k in picked]
    tone = int(rng.integers(len(world.TONE_CLASSES)))
    found.append(world.render_scene(rng, kind, tone=tone, style=style, **given))
  return pack(found)


def spread_washing(rng: np.random.Generator, kind: world.Kind) -> dict[str, float]:
  """Saturation and contrast for `world.render_scene`, even and a little beyond its own range."""
  least = world.washing(kind, 0.0, 0.0)
  u, v = rng.random(2)
  return {
    "saturation": least[0] - 0.05 + (1.20 - least[0]) * u,
    "contrast": least[1] - 0.05 + (1.10 - least[1]) * (u + v) / 2,
  }


def pack(rendered: Sequence[world.Scene]) -> Scenes:
  """Rendered scenes as arrays, with the place of each thing."""
  images = np.stack([scene.image for scene in rendered])
  classes = np.full((len(rendered), 2), -1, np.int32)
  for i, scene in enumerate(rendered):
    classes[i, : len(scene.objects)] = [_INDEX[name] for name in scene.objects]
    if scene.tone is not None:
      classes[i, 0] = PERSON
  tones = np.array([-1 if scene.tone is None else scene.tone for scene in rendered], np.int32)
  border = np.concatenate(
    [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], axis=1
  )
  backgrounds = np.median(border, axis=1).astype(np.uint8)
  masks = np.zeros((len(rendered), 2, _SIZE, _SIZE), np.float32)
  visible = np.zeros((len(rendered), 2), np.float32)
  for i, scene in enumerate(rendered):
    masks[i, : len(scene.masks)] = scene.masks
    visible[i, : len(scene.visible)] = scene.visible
  regions = masks >= _SHOWN
  return Scenes(images, backgrounds, regions, visible, _boxes(regions), classes, tones)


def _boxes(regions: np.ndarray) -> np.ndarray:
  """`[..., H, W]` bool -> `[..., 4]` float32 edges of the smallest box around what is True."""
  sides = []
  for axis in (-2, -1):  # columns, then rows
    seen = regions.any(axis)
    first = seen.argmax(-1)
    sides.append((first, np.where(seen.any(-1), _SIZE - seen[..., ::-1].argmax(-1), first)))
  (left, right), (top, bottom) = sides
  return np.stack([left, top, right, bottom], -1).astype(np.float32)


def clean(batch: Scenes) -> tuple[jax.Array, Truth]:
  """Pictures `[B, 32, 32, 3]` in [0, 1] as rendered; only what is half hidden has a soft label."""
  person = (jnp.asarray(batch.tones) >= 0).astype(jnp.float32)
  nothing = jnp.full_like(batch.classes, -1)
  classes = jnp.concatenate([jnp.asarray(batch.classes), nothing], axis=1)
  boxes = jnp.asarray(batch.boxes) / _SIZE
  truth = Truth(
    classes=classes,
    presence=jnp.pad(_presence(jnp.asarray(batch.visible)), ((0, 0), (0, 2))),
    boxes=jnp.concatenate([boxes, jnp.zeros_like(boxes)], axis=1),
    tones=jnp.maximum(batch.tones, 0),
    tone_known=person,
    person=person,
  )
  return jnp.asarray(batch.images, jnp.float32) / 255, truth


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Damage:
  """The random numbers that `degrade` uses; float32.

  Drawn by NumPy: compiling JAX's generators would take longer than the tests of this module may.

  Attributes:
    uniform: `[B, 12]` in [0, 1).
    patches: `[B, 4, 4, 1]` normal, where a scene is blended with another.
    blotches: `[B, 8, 8, 4]` normal, noise of the colours and (last) of the brightness.
  """

  uniform: np.ndarray
  patches: np.ndarray
  blotches: np.ndarray


def damage(rng: np.random.Generator, n: int) -> Damage:
  """Draws the damage to `n` scenes; `rng` is consumed."""
  return Damage(
    uniform=rng.random((n, 12), np.float32),
    patches=rng.standard_normal((n, 4, 4, 1), np.float32),
    blotches=rng.standard_normal((n, 8, 8, 4), np.float32),
  )


def degrade(batch: Scenes, damage: Damage) -> tuple[jax.Array, Truth]:
  """Spoils scenes as a generative model does; pure and jit-able.

  Args:
    batch: the scenes; each is blended at most with the one at the other end of the batch.
    damage: what is done to each.

  Returns:
    pictures `[B, 32, 32, 3]` float32 in [0, 1] and their labels.
  """
  u = iter(jnp.asarray(damage.uniform).T)
  images, truth = clean(batch)

  # Half-formed: faded towards the background, or towards another scene, evenly or in patches.
  what = next(u)
  is_blended, is_other = what < 0.45, what < 0.20
  share = 1.15 * next(u)[:, None, None] - 0.15  # empty now and then
  field = _enlarged(damage.patches)[..., 0]
  patches = jax.nn.sigmoid(6 * (field + 3 * next(u)[:, None, None] - 1.5))
  kept = jnp.where((next(u) < 0.5)[:, None, None], jnp.maximum(share, 0), patches)
  kept = jnp.where(is_blended[:, None, None], kept, 1.0)
  plain = jnp.asarray(batch.backgrounds, jnp.float32)[:, None, None] / 255
  behind = jnp.where(is_other[:, None, None, None], images[::-1], plain)
  images = kept[..., None] * images + (1 - kept[..., None]) * behind
  regions = jnp.asarray(batch.regions, jnp.float32)
  visible = jnp.asarray(batch.visible) / (regions.sum((2, 3)) + 1e-6)
  seen = (regions * kept[:, None]).sum((2, 3)) * visible
  other = (regions[::-1] * (1 - kept[:, None])).sum((2, 3)) * visible[::-1] * is_other[:, None]

  # Moved, scaled and blurred, all in one linear map; a single thing may be much smaller.
  single = jnp.asarray(batch.classes)[:, 1] < 0
  scale = jnp.where(single & (next(u) < 0.25), 1.2, 1.0) + 0.2 * (2 * next(u) - 1)
  scale = jnp.where(single, scale, 0.6 + 0.4 * scale)
  blur = 1.0 + 1.6 * next(u) ** 2
  down, across = (3 * next(u) - 1.5 for _ in range(2))
  rows, columns = (_resampling(scale, shift, blur) for shift in (down, across))
  images = jnp.einsum("byi,bxj,bijc->byxc", rows, columns, images, optimize=True)
  boxes = jnp.concatenate([jnp.asarray(batch.boxes), jnp.asarray(batch.boxes)[::-1]], axis=1)
  shift = jnp.stack([across, down, across, down], axis=-1)[:, None]
  boxes = _SIZE / 2 + (boxes - _SIZE / 2 - shift) / scale[:, None, None]
  boxes = jnp.clip(boxes / _SIZE, 0, 1)

  # Soft like a decoder's output, and blotchy.
  step = 0.6 * next(u) - 0.3
  images = _quantised(images, jnp.where(step > 0, step, 0.0))
  noise = 0.06 * next(u) ** 2
  blotches = _enlarged(damage.blotches)
  blotches = blotches[..., 3:] + 0.5 * blotches[..., :3]
  images = jnp.clip(images + noise[:, None, None, None] * blotches, 0, 1)

  quality = 1 - 0.25 * (blur - 1) / 1.6 - 0.15 * noise / 0.06
  classes = jnp.concatenate([jnp.asarray(batch.classes), jnp.asarray(batch.classes)[::-1]], axis=1)
  presence = jnp.concatenate([_presence(seen), _presence(other)], axis=1) * (classes >= 0)
  other_person = truth.person[::-1]
  alone = (seen[:, 0] > 0.7) & (other[:, 0] * other_person < 0.2)
  return images, Truth(
    classes=classes,
    presence=presence * quality[:, None],
    boxes=boxes,
    tones=truth.tones,
    tone_known=truth.person * alone,
    person=jnp.max(presence * (classes == PERSON), axis=1),
  )


def _presence(visible: jax.Array) -> jax.Array:
  """Label of a thing of which this share can be seen: 0 below a quarter, 1 from three quarters."""
  return jnp.clip(2 * visible - 0.5, 0, 1)


def _tent(centres: jax.Array, n: int, width: jax.Array) -> jax.Array:
  """`[..., n]`: weights of n pixels around each centre, a tent of half-width `width`; sum 1."""
  distance = jnp.abs(jnp.clip(centres, 0, n - 1)[..., None] - jnp.arange(n))
  weights = jnp.maximum(0.0, 1 - distance / width)
  return weights / weights.sum(-1, keepdims=True)


def _resampling(scale: jax.Array, shift: jax.Array, blur: jax.Array) -> jax.Array:
  """`[B, 32, 32]`: output pixel i reads input around `16 + (i - 16) * scale + shift`."""
  middle = (_SIZE - 1) / 2
  centres = middle + (jnp.arange(_SIZE) - middle) * scale[:, None] + shift[:, None]
  return _tent(centres, _SIZE, blur[:, None, None])


def _enlarged(coarse: jax.Array) -> jax.Array:
  """`[B, n, n, C]` -> `[B, 32, 32, C]`, interpolated."""
  n = coarse.shape[1]
  up = _tent((jnp.arange(_SIZE) + 0.5) * n / _SIZE - 0.5, n, jnp.float32(1))
  return jnp.einsum("yi,xj,bijc->byxc", up, up, coarse, optimize=True)


def _quantised(images: jax.Array, step: jax.Array) -> jax.Array:
  """Rounds the DCT coefficients of 8x8 blocks, as JPEG does, coarser for higher frequencies.

  Args:
    images: `[B, 32, 32, 3]`.
    step: `[B]`, of the lowest frequency (a flat block of 1 has the coefficient 8); 0 leaves the
      picture as it is.
  """
  k = np.arange(8)
  dct = (
    np.cos(np.pi * k[:, None] * (2 * k + 1) / 16) * np.where(k[:, None] == 0, 0.125, 0.25) ** 0.5
  )
  blocks = images.reshape(len(images), _SIZE // 8, 8, _SIZE // 8, 8, 3)
  steps = step[:, None, None, None, None, None] * (1 + (k[:, None, None, None] + k[:, None]) / 4)
  spectrum = jnp.einsum("ui,vj,bpiqjc->bpuqvc", dct, dct, blocks, optimize=True)
  rounded = jnp.round(spectrum / jnp.maximum(steps, 1e-6)) * steps
  spectrum = jnp.where(steps > 0, rounded, spectrum)
  return jnp.einsum("ui,vj,bpuqvc->bpiqjc", dct, dct, spectrum, optimize=True).reshape(images.shape)
