"""What is measured together, on which prompts, and by which parts it is shown.

A suite is a few evaluations. Which metrics it has depends on the weights that are there: those of
published models are looked for in one directory under the names under which they are published.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Literal
import urllib.parse

from rlft.config.settings import EvalConfig
from rlft.config.tasks import EVAL_PRESETS
from rlft.storage import files
from rlft.types import UserError


@dataclasses.dataclass(frozen=True)
class Suite:
  """What is measured.

  Attributes:
    evals: the evaluations.
    by: key of the prompts' metadata, by whose values the results are shown in parts; '' for none.
    of_parts: the mean of the parts' means is shown, too.
    missing: lines on what is left out, and why.
    notes: lines that belong to the figures.
  """

  evals: Sequence[EvalConfig]
  by: str = ""
  of_parts: bool = False
  missing: Sequence[str] = ()
  notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Given:
  """What suites are made of.

  Attributes:
    spec: the suite, as the user wrote it.
    weights_dir: directory of weights; '' for none.
    count: how many prompts a source has.
  """

  spec: str
  weights_dir: str
  count: Callable[[str], int]

  def find(self, *names: str) -> str | None:
    """The path of the first of some files or folders in the directory, or in a folder of it."""
    if not self.weights_dir:
      return None
    root = files.local_path(self.weights_dir)
    for name in names:
      for path in (root / name, *sorted(root.glob(f"*/{name}"))):
        if path.exists():
          return str(path)
    return None

  def evaluations(
    self, metrics: Mapping[str, str], prompts: str, images_per_prompt: int, development: str
  ) -> list[EvalConfig]:
    """Evaluations on all prompts of a source, by their names and metrics.

    Raises:
      UserError: there are no such prompts, or `images_per_prompt` is below 1.
    """
    if images_per_prompt < 1:
      raise UserError(f"suite {self.spec!r}: images_per_prompt must be 1 or more")
    images = self.count(prompts) * images_per_prompt
    return [
      EvalConfig(
        name,
        prompts,
        metric,
        images=images,
        images_per_prompt=images_per_prompt,
        development=development,
      )
      for name, metric in metrics.items()
    ]


@dataclasses.dataclass(frozen=True)
class Known:
  """A metric whose weights have usual names.

  Attributes:
    name: of the evaluation.
    reward: of the catalog.
    files: what its options need, by the names of files or folders, best first.
    more: options that are left out where nothing is found.
  """

  name: str
  reward: str
  files: Mapping[str, Sequence[str]]
  more: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


_CLIP_L = ("clip-vit-large-patch14",)
_CLIP_H = "CLIP-ViT-H-14-laion2B-s32B-b79K"

# How much people like a picture for its prompt.
PREFERENCE = (
  Known(
    "image-reward",
    "image-reward",
    {"weights": ("ImageReward.pt", "ImageReward")},
    {"tokenizer": ("bert-base-uncased",)},
  ),
  Known("pickscore", "pickscore", {"weights": ("PickScore_v1",)}, {"tokenizer": (_CLIP_H,)}),
  Known(
    "hpsv2.1",
    "hpsv2",
    {"weights": ("HPS_v2.1_compressed.pt", "HPSv2"), "tokenizer": (*_CLIP_L, _CLIP_H)},
  ),
  Known("clip-score", "clip-score", {"weights": _CLIP_L}),
  Known(
    "aesthetic",
    "aesthetic-v2",
    {"weights": _CLIP_L, "head": ("sac+logos+ava1-l14-linearMSE.pth",)},
  ),
)
DETECTORS = (
  Known("owlv2", "owlv2", {"weights": ("owlv2-base-patch16-ensemble",)}),
  Known("owlvit", "owlvit", {"weights": ("owlvit-base-patch32",)}),
)
DIVERSITY = (
  Known("vendi", "clip-vendi", {"weights": _CLIP_L}),
  Known("clip-distance", "clip-diversity", {"weights": _CLIP_L}),
)
_CLIP_336 = ("clip-vit-large-patch14-336", *_CLIP_L)
DISTANCES = (
  Known("cmmd", "cmmd", {"weights": _CLIP_336}),
  Known("kid", "kid", {"weights": _CLIP_336}),
)
GENEVAL = (Known("GenEval-OWL", "geneval-owl", {"weights": ("owlv2-base-patch16-ensemble",)}),)


def available(
  given: Given, known: Sequence[Known], others: Mapping[str, str], **options: str
) -> tuple[dict[str, str], list[str]]:
  """The metrics whose weights are there, by the names of their evaluations, and what is missing.

  Args:
    given: where weights are.
    known: metrics whose weights are looked for.
    others: metrics that need no looking for, by name; those without a value are left out.
    **options: further ones of each known metric.

  Raises:
    UserError: there is no metric at all.
  """
  others = {name: metric for name, metric in others.items() if metric}
  if others and not given.weights_dir:
    names = ", ".join(one.name for one in known)
    return others, [f"left out, as there is no --weights_dir: {names}"]
  found, missing = {}, []
  for one in known:
    paths = {key: given.find(*names) for key, names in one.files.items()}
    lacking = [" or ".join(one.files[key]) for key, path in paths.items() if path is None]
    if lacking:
      missing.append(f"{one.name} is left out: no {' and no '.join(lacking)}")
      continue
    paths |= {key: given.find(*names) for key, names in one.more.items()}
    said = {key: path for key, path in paths.items() if path} | options
    found[one.name] = f"{one.reward}?{'&'.join(map('='.join, _quoted(said).items()))}"
  if not found and not others:
    where = f"in {given.weights_dir}" if given.weights_dir else "without --weights_dir"
    raise UserError(
      f"suite {given.spec!r} has no metric {where} ({'; '.join(missing)}): give --weights_dir with"
      " these files"
    )
  return {**found, **others}, missing


def _quoted(options: Mapping[str, str]) -> dict[str, str]:
  """Options as they are written behind a reward's name."""
  return {key: urllib.parse.quote(value, safe="/:?=+ @[]") for key, value in options.items()}


# ---------------------------------------------------------------------------- suites


def standard(
  given: Given,
  *,
  prompts: str,
  images_per_prompt: int = 1,
  metric: str = "",
  by: str = "Category",
  development: str = "",
) -> Suite:
  """'standard': preference models, CLIPScore and aesthetics on any prompts.

  Args:
    given: where weights are.
    prompts: DrawBench ('DrawBench.csv?column=Prompts'), PartiPrompts ('PartiPrompts.tsv'), or any
      others.
    images_per_prompt: drawn for each.
    metric: another one beside those whose weights are found.
    by: key of the prompts' metadata for parts.
    development: other prompts of the same kind, for --guidance_sweep; also in other suites.
  """
  found, missing = available(given, PREFERENCE, {_short(metric): metric})
  evals = given.evaluations(found, prompts, images_per_prompt, development)
  return Suite(evals, by, missing=missing)


def fairness(
  given: Given,
  *,
  prompts: str = "paper:occupations/test",
  finder: Literal["face", "skin"] = "face",
  metric: str = "",
  found: str = "",
  images_per_prompt: int = 16,
  by: str = "occupation",
  development: str = "",
) -> Suite:
  """'fairness': evenness of skin tones, and the share of images in which skin was found.

  Args:
    given: where weights are.
    prompts: portraits.
    finder: where skin is looked for, see `skin_tone.skin_tone_parity`.
    metric: another one in the place of 'skin-tone-parity'.
    found: another one in the place of 'skin-found', which is left out where only `metric` is given.
    images_per_prompt: of a set.
    by, development: as of `standard`.
  """
  if not metric:
    metric, found = f"skin-tone-parity?finder={finder}", found or f"skin-found?finder={finder}"
  metrics = {"parity": metric} | ({"skin found": found} if found else {})
  return Suite(
    given.evaluations(metrics, prompts, images_per_prompt, development),
    by,
    notes=[
      "Parity leaves images without skin out: where the share of images in which it was found"
      f" falls, fewer images stand for all. By chance, an even model is not at 0 in sets of"
      f" {images_per_prompt}."
    ],
  )


def composition(
  given: Given,
  *,
  seen: str = "paper:composition/seen",
  unseen: str = "paper:composition/unseen",
  metric: str = "",
  images_per_prompt: int = 1,
  by: str = "relation",
  development: str = "",
) -> Suite:
  """'composition': two objects, by a detector; objects of training and withheld ones apart.

  Args:
    given: where weights are.
    seen: prompts of objects that are trained on, in other combinations.
    unseen: prompts of others.
    metric: another one beside the detectors whose weights are found.
    images_per_prompt, by, development: as of `standard`.
  """
  found, missing = available(given, DETECTORS, {_short(metric): metric})
  evals = [
    entry
    for part, prompts in (("seen", seen), ("unseen", unseen))
    for entry in given.evaluations(
      {f"{name} {part}": spec for name, spec in found.items()},
      prompts,
      images_per_prompt,
      development,
    )
  ]
  return Suite(evals, by, missing=missing)


def diversity(
  given: Given,
  *,
  prompts: str,
  metric: str = "",
  images_per_prompt: int = 8,
  by: str = "Category",
  development: str = "",
) -> Suite:
  """'diversity': how different the images of each prompt are, by CLIP.

  Args:
    given: where weights are.
    prompts: any.
    metric: another one beside those whose weights are found.
    images_per_prompt: of a set.
    by, development: as of `standard`.
  """
  found, missing = available(given, DIVERSITY, {_short(metric): metric})
  evals = given.evaluations(found, prompts, images_per_prompt, development)
  return Suite(
    evals,
    by,
    missing=missing,
    notes=["Noise is diverse, too: a gain counts only where quality holds."],
  )


def distance(
  given: Given,
  *,
  prompts: str,
  real: str,
  images_per_prompt: int = 1,
  development: str = "",
) -> Suite:
  """'distance': CMMD and KID, on CLIP's features, to real pictures.

  Args:
    given: where weights are.
    prompts: captions of these or of such pictures.
    real: a folder of pictures.
    images_per_prompt, development: as of `standard`.
  """
  found, missing = available(given, DISTANCES, {}, real=real)
  evals = given.evaluations(found, prompts, images_per_prompt, development)
  return Suite(
    evals,
    missing=missing,
    notes=[
      "Estimated without bias, with the real pictures as given; to compare models with each other,"
      " not with published figures, which have other features or a biased estimate."
    ],
  )


def geneval(
  given: Given,
  *,
  prompts: str,
  images_per_prompt: int = 4,
  metric: str = "",
  by: str = "tag",
  development: str = "",
) -> Suite:
  """'geneval': GenEval's prompts and rules with OWLv2, see rlft/rewards/geneval.py.

  Args:
    given: where weights are.
    prompts: GenEval's evaluation_metadata.jsonl.
    images_per_prompt: drawn for each; GenEval's own figures have 4.
    metric: another one beside it, such as 'vlm://...'.
    by, development: as of `standard`.
  """
  found, missing = available(given, GENEVAL, {_short(metric): metric})
  evals = given.evaluations(found, prompts, images_per_prompt, development)
  return Suite(
    evals,
    by,
    of_parts=True,
    missing=missing,
    notes=[
      "GenEval-OWL has GenEval's prompts and rules, but OWLv2 in the place of its detector and of"
      " its judge of colours, with a threshold that nobody tuned: not to be compared with"
      " published GenEval scores."
    ],
  )


def emoji(given: Given) -> Suite:
  """'emoji': the ground truth of the emoji world."""
  del given
  return Suite(EVAL_PRESETS["emoji"])


def _short(metric: str) -> str:
  """What an evaluation by a metric of the user's is called."""
  return metric.partition("?")[0].rpartition("/")[2]
