"""Even shares of skin tones among the images of a prompt, by a written rule instead of a network.

Skin is found by its colour, and its class is where its individual typology angle (ITA) lies:

    ITA = atan((L* - 50) / b*) in degrees     (Chardon, Cretois, Hourseau 1991; CIELAB, D65)

Dermatologists cut it at 55, 41, 28, 10 and -30 into very light, light, intermediate, tan, brown and
dark. The paper (arXiv 2401.12244) has four ranges; here neighbours are merged:

    very light  > 55 >=  light, intermediate  > 28 >=  tan, brown  > -30 >=  dark

The rule measures the picture, light and all: the same person in shadow has a lower angle.
"""

import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.rewards import classifiers, color, parity, preprocess, sets
from rlft.storage import images as images_lib
from rlft.types import HostReward, JaxReward, Reward, UserError

CUTS = "55/28/-30"

# What has the colour of skin, in CIELAB. Lightness hardly counts, as it tells tones apart: the ten
# colours of the Monk scale have hues of 49 to 89 degrees and chromas of 3.8 to 28.
_HUE = (25.0, 92.0)  # degrees from a* to b*
_CHROMA = (3.0, 45.0)
_MIN_LIGHTNESS = 10.0
# What is this near, in CIELAB, to the median of an upper corner is the background.
_BACKGROUND_DISTANCE = 6.0
_CORNER = 8  # pixels
# Only what is this near, in CIELAB, to the median of such pixels counts: one skin, not also a wall.
_SPREAD = 15.0
# Less than this share of the picture, or of the face, is no skin.
_MIN_SHARE, _MIN_SHARE_OF_FACE = 0.05, 0.15
# Pictures are averaged down to this many pixels a side: enough for a mean colour.
_SIZE = 64

# Share of a face's box, from its upper left corner, that has neither hair nor background in it.
_INNER = ((0.25, 0.85), (0.2, 0.8))  # rows, columns
_CASCADE = "haarcascade_frontalface_default.xml"
_MIN_FACE = 0.1  # of the picture's shorter side


def skin_tone_parity(
  *,
  finder: Literal["skin", "face"] = "skin",
  cuts: str = CUTS,
  credit: sets.Credit = "set",
) -> Reward:
  """'skin-tone-parity': minus the statistical parity of skin tones, on sets of images.

  An image in which no skin is found is left out; a set in which less than half of the images have
  skin has no score.

  Args:
    finder: where skin is looked for. 'skin': in the whole picture, by colour only, so for portraits
      in front of something that is not beige or brown. 'face': in the largest frontal face that
      OpenCV's Haar cascade finds; on the host, needs opencv-python-headless.
    cuts: angles in degrees, falling, between slashes; one more class than cuts.
    credit: who gets the score, see `rlft.rewards.sets`.

  Raises:
    UserError: cuts that do not fall, or no OpenCV.
  """
  angles = _parse(cuts)
  if finder == "face":
    find = FaceFinder()

    def classify_faces(images, prompts, metadata):
      del prompts, metadata
      with classifiers.on_cpu():
        return np.asarray(_face_probs(find(images), angles))

    return classifiers.host_parity(classify_faces, "skin-tone-parity", credit=credit)

  def classify(params, images):
    del params
    return tone_probs(images, angles)

  return parity.parity_reward(classify, "skin-tone-parity", credit=credit)


def skin_found(*, finder: Literal["skin", "face"] = "skin") -> Reward:
  """'skin-found': 1 where skin is found in an image and 0 where none is.

  What 'skin-tone-parity' leaves out: an even parity of few images is worth less.

  Args:
    finder: as for `skin_tone_parity`.
  """
  angles = _parse(CUTS)
  if finder == "face":
    find = FaceFinder()

    def score_faces(images, prompts, metadata):
      del prompts, metadata
      with classifiers.on_cpu():
        return np.isfinite(np.asarray(_face_probs(find(images), angles))[:, 0]).astype(np.float32)

    return HostReward("skin-found", score_faces)

  def score(params, images, features):
    del params, features
    return jnp.isfinite(tone_probs(images, angles)[:, 0]).astype(jnp.float32)

  return JaxReward("skin-found", score)


def skin(images: jax.Array, *, is_face: bool = False) -> tuple[jax.Array, jax.Array]:
  """Finds skin by its colour.

  Args:
    images: `[B, H, W, 3]` in [0, 1].
    is_face: the images show a face from edge to edge. If not, what has the colour of one of the
      upper corners is taken for the background, and not for skin.

  Returns:
    Mean CIELAB colour of the skin `[B, 3]`, NaN where no pixel is skin; share of the pixels that
    are skin `[B]` in [0, 1].
  """
  images = preprocess.resize(images, (_SIZE, _SIZE), "linear")
  lab = color.cielab(images).reshape(len(images), -1, 3)
  lightness, a, b = lab[..., 0], lab[..., 1], lab[..., 2]
  hue, chroma = jnp.degrees(jnp.arctan2(b, a)), jnp.hypot(a, b)
  found = (_HUE[0] < hue) & (hue < _HUE[1]) & (_CHROMA[0] < chroma) & (chroma < _CHROMA[1])
  found &= lightness > _MIN_LIGHTNESS
  if not is_face:
    for columns in (slice(_CORNER), slice(-_CORNER, None)):
      corner = lab.reshape(len(images), _SIZE, _SIZE, 3)[:, :_CORNER, columns]
      background = jnp.median(corner, axis=(1, 2))[:, None]
      found &= jnp.linalg.norm(lab - background, axis=-1) > _BACKGROUND_DISTANCE
  median = jnp.nanmedian(jnp.where(found[..., None], lab, jnp.nan), axis=1, keepdims=True)
  found &= jnp.linalg.norm(lab - median, axis=-1) < _SPREAD
  return jnp.mean(lab, axis=1, where=found[..., None]), jnp.mean(found, axis=1)


def tone_probs(images: jax.Array, angles: tuple[float, ...], *, is_face: bool = False) -> jax.Array:
  """Classes of skin tone, lightest first.

  Args:
    images: `[B, H, W, 3]` in [0, 1].
    angles: the A - 1 cuts in degrees, falling; an angle equal to a cut is in the darker class.
    is_face: see `skin`.

  Returns:
    `[B, A]` float32, 1 for the class and 0 for the others; NaN where there is no skin.
  """
  colour, share = skin(images, is_face=is_face)
  tone = jnp.sum(color.typology_angle(colour)[:, None] <= jnp.array(angles), axis=1)
  probs = jax.nn.one_hot(tone, len(angles) + 1, dtype=jnp.float32)
  found = share >= (_MIN_SHARE_OF_FACE if is_face else _MIN_SHARE)
  return jnp.where(found[:, None], probs, jnp.nan)


_face_probs = jax.jit(functools.partial(tone_probs, is_face=True), static_argnums=1)


class FaceFinder:
  """Cuts the inner part of the largest frontal face out of each picture."""

  def __init__(self):
    """Loads OpenCV's cascade. Raises `UserError` if there is no OpenCV."""
    try:
      import cv2
    except ImportError as error:
      raise UserError(
        "finder=face needs OpenCV: pip install opencv-python-headless, or use finder=skin"
      ) from error
    self._cv2 = cv2

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """`[B, H, W, 3]` in [0, 1] -> `[B, 64, 64, 3]`, black (which is no skin) where no face is."""
    # One cascade a call: calls come from several threads, and a cascade keeps its pyramid in it.
    cascade = self._cv2.CascadeClassifier(self._cv2.data.haarcascades + _CASCADE)
    faces = np.zeros((len(images), _SIZE, _SIZE, 3), np.float32)
    for face, image in zip(faces, images, strict=True):
      if np.isfinite(image).all():
        self._cut(cascade, image, face)
    return faces

  def _cut(self, cascade: Any, image: np.ndarray, face: np.ndarray) -> None:
    """Writes the face in `image` into `face`, if there is one."""
    grey = self._cv2.cvtColor(images_lib.to_uint8(image), self._cv2.COLOR_RGB2GRAY)
    least = max(int(_MIN_FACE * min(grey.shape)), 24)
    boxes = cascade.detectMultiScale(grey, minNeighbors=5, minSize=(least, least))
    if len(boxes):
      x, y, width, height = max(boxes, key=lambda box: box[2] * box[3])
      (top, bottom), (left, right) = _INNER
      rows = slice(y + int(top * height), y + int(bottom * height))
      columns = slice(x + int(left * width), x + int(right * width))
      size, method = (_SIZE, _SIZE), self._cv2.INTER_AREA
      face[:] = self._cv2.resize(np.ascontiguousarray(image[rows, columns]), size, method)


def _parse(cuts: str) -> tuple[float, ...]:
  try:
    angles = tuple(float(part) for part in cuts.split("/"))
  except ValueError:
    angles = ()
  falling = all(a > b for a, b in itertools.pairwise((90.0, *angles, -90.0)))
  if not angles or not falling:
    raise UserError(f"cuts={cuts} are not falling angles between 90 and -90: write them as {CUTS}")
  return angles
