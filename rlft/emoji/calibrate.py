"""Fits the constants of the oracles on rendered scenes and measures their error rates on others.

    python -m rlft.emoji.calibrate            fits, writes data/oracles.json, prints the rates
    python -m rlft.emoji.calibrate --check    prints the rates of the shipped constants

About a minute on two cores.
"""

import json
import sys

import jax
import numpy as np

from rlft.emoji import art, measures, templates, world

_MAX_BLUR = 1.0  # pixels
_MAX_NOISE = 0.04  # of [0, 1]
_BATCH = 64
PRESENT = 0.6  # an object is in the picture if more than this share of it can be seen


def degrade(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
  """What a decoder does to pictures: random blur (up to 1 pixel) and noise (up to 4 %).

  Args:
    rng: consumed.
    images: `[B, 32, 32, 3]` uint8.

  Returns:
    `[B, 32, 32, 3]` float32 in [0, 1].
  """
  sigmas = rng.uniform(0, _MAX_BLUR, len(images))
  blur = np.stack([templates.gaussian_weights(world.IMAGE_SIZE, s) for s in sigmas])
  blurred = np.einsum("byi,bijc->byjc", blur, images / 255)
  blurred = np.einsum("bxj,byjc->byxc", blur, blurred)
  noise = rng.normal(size=images.shape) * rng.uniform(0, _MAX_NOISE, (len(images), 1, 1, 1))
  return np.clip(blurred + noise, 0, 1).astype(np.float32)


def presence_scenes(
  seed: int, kind: world.Kind, n: int, n_absent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Degraded scenes with questions about objects that are there and objects that are not.

  Args:
    seed: of everything.
    kind: of the scenes.
    n: number of scenes.
    n_absent: random absent objects to ask about per scene, beside its own.

  Returns:
    images `[n, 32, 32, 3]` float32 in [0, 1], object_ids `[n, 2 + n_absent]` (-1 is padding),
    present `[n, 2 + n_absent]` bool: an object that is half hidden is not.
  """
  rng = np.random.default_rng(seed)
  scenes = [world.render_scene(rng, kind) for _ in range(n)]
  ids = np.full((n, 2 + n_absent), -1, np.int32)
  present = np.zeros(ids.shape, bool)
  for row, there, scene in zip(ids, present, scenes, strict=True):
    for i, name in enumerate(scene.objects):
      row[i], there[i] = art.OBJECTS.index(name), scene.visible[i] > PRESENT
    others = [i for i, name in enumerate(art.OBJECTS) if name not in scene.objects]
    row[2:] = rng.choice(others, n_absent, replace=False)
  return degrade(rng, np.stack([scene.image for scene in scenes])), ids, present


def tone_scenes(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Degraded portraits, every tone class as often: images `[n, 32, 32, 3]` and classes `[n]`."""
  rng = np.random.default_rng(seed)
  tones = rng.integers(len(world.TONE_CLASSES), size=n)
  scenes = [world.render_scene(rng, "portrait", tone=int(tone)) for tone in tones]
  return degrade(rng, np.stack([scene.image for scene in scenes])), tones


def _in_batches(function, *arrays: np.ndarray) -> np.ndarray:
  starts = range(0, len(arrays[0]), _BATCH)
  return np.concatenate([function(*(a[i : i + _BATCH] for a in arrays)) for i in starts])


def fit_logistic(
  x: np.ndarray, group: np.ndarray, label: np.ndarray, n_groups: int, *, l2: float = 0.3
) -> tuple[float, np.ndarray]:
  """Logistic regression on one feature with one bias per group, by Newton's method.

  Positives and negatives count as if they were equally many. The biases are drawn to their mean
  by `l2`, since a group may have few examples.

  Args:
    x: `[N]`.
    group: `[N]` int in [0, n_groups).
    label: `[N]` bool.
    n_groups: number of groups.
    l2: strength of the pull.

  Returns:
    slope and biases `[n_groups]`.
  """
  design = np.concatenate([x[:, None], np.ones((len(x), 1)), np.eye(n_groups)[group]], axis=1)
  weight = np.where(label, 0.5 / label.mean(), 0.5 / (1 - label.mean()))
  penalty = np.r_[1e-3, 1e-3, np.full(n_groups, l2)]
  theta = np.zeros(design.shape[1])
  for _ in range(30):
    p = 1 / (1 + np.exp(-design @ theta))
    gradient = design.T @ (weight * (p - label)) + penalty * theta
    hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + np.diag(penalty)
    theta -= np.linalg.solve(hessian, gradient)
  return float(theta[0]), theta[1] + theta[2:]


def _fit_presence(seed: int) -> dict:
  asked = [("object", 1200), ("pair", 2000), ("portrait", 300)]
  loaded = templates.load_templates()
  match = jax.jit(templates.match)
  x, group, label = [], [], []
  for i, (kind, n) in enumerate(asked):
    images, ids, present = presence_scenes(seed + i, kind, n, n_absent=6)
    score = _in_batches(
      lambda im, o: measures.evidence(match(loaded, im, np.maximum(o, 0))), images, ids
    )
    x.append(score[ids >= 0])
    group.append(ids[ids >= 0])
    label.append(present[ids >= 0])
  slope, bias = fit_logistic(
    np.concatenate(x), np.concatenate(group), np.concatenate(label), len(art.OBJECTS)
  )
  named = {name: round(float(b), 3) for name, b in zip(art.OBJECTS, bias, strict=True)}
  return {"slope": round(slope, 4), "bias": named}


def _fit_tone(seed: int) -> dict:
  """Thresholds halfway between what neighbouring classes reach in 98 % of the portraits."""
  images, tones = tone_scenes(seed, 3000)
  ita = _in_batches(lambda im: measures.skin(im)[0], images)
  thresholds = []
  for lighter in range(len(world.TONE_CLASSES) - 1):
    low = np.nanpercentile(ita[tones == lighter], 2)
    high = np.nanpercentile(ita[tones == lighter + 1], 98)
    thresholds.append(round(float(low + high) / 2, 1))
  return {"thresholds": thresholds}


def presence_rates(seed: int, kind: world.Kind, n: int) -> tuple[float, float, float]:
  """Error rates of `object_confidence` at the threshold 0.5 on `n` fresh scenes.

  Returns:
    share of present objects that are missed; share of absent random objects that are found; share
    of half hidden ones that are found (pairs only, else NaN).
  """
  images, ids, present = presence_scenes(seed, kind, n, n_absent=4)
  found = _in_batches(measures.object_confidence, images, ids) >= 0.5
  hidden = (ids >= 0) & ~present
  hidden[:, 2:] = False
  return tuple(
    float(wrong.mean()) if wrong.size else float("nan")
    for wrong in (~found[present], found[:, 2:], found[hidden])
  )


def tone_accuracy(seed: int, n: int) -> float:
  """Share of `n` fresh portraits, classes equally often, whose tone class is found."""
  images, tones = tone_scenes(seed, n)
  return float(np.mean(_in_batches(lambda im: measures.tone_class(im)[0], images) == tones))


def skin_rate(seed: int, kind: world.Kind, n: int) -> float:
  """Share of `n` scenes without people in which skin is found."""
  images, _, _ = presence_scenes(seed, kind, n, n_absent=0)
  return float(np.mean(_in_batches(lambda im: measures.tone_class(im)[0], images) >= 0))


def main(arguments: list[str]) -> None:
  """Fits (unless `--check`) and prints the rates."""
  if "--check" not in arguments:
    fits = {"presence": _fit_presence(seed=1000), "tone": _fit_tone(seed=1010)}
    measures.CALIBRATION_FILE.write_text(json.dumps(fits, indent=1) + "\n")
    measures.calibration.cache_clear()
    measures.presence_params.cache_clear()
  for seed, kind in ((2000, "object"), (2001, "pair")):
    missed, random, hidden = presence_rates(seed, kind, 1000)
    print(
      f"presence, {kind}: false negatives {missed:.2%}, false positives {random:.2%} (random),"
      f" {hidden:.2%} (the half hidden one)"
    )
  print(f"tone: accuracy {tone_accuracy(2002, 2000):.2%}")
  for seed, kind in ((2003, "object"), (2004, "pair")):
    print(f"skin found in scenes of kind {kind}: {skin_rate(seed, kind, 1000):.2%}")


if __name__ == "__main__":
  main(sys.argv[1:])
