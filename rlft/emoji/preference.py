"""'emoji-preference': ImageReward's architecture in small, trained on comparisons by noisy raters.

`data/emoji-preference` holds a model in the layout of ImageReward.pt, with its vocabulary;
`launch/train_reward.py` trains it from nothing. The raters are simulated: they follow the written
formula `measures.preference`, and make mistakes the more often the less two pictures differ.

What it shares with the oracle of the same name: the oracle's formula makes its labels, as people's
taste makes those of a real model of preferences. It sees that formula through noise, in words and
pixels, on training prompts alone: no object, occupation or pair of the test split, and no picture
that was drawn for one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlft.config.settings import EMOJI_SD
from rlft.emoji import art, measures, prompts, reward_training, scenes, world
from rlft.models import blip, image_reward
from rlft.models.files import sources, torch_layout
from rlft.models.shapes import param_shapes
from rlft.rewards import preprocess
from rlft.storage import files
from rlft.types import Prompt

Params = Mapping[str, Any]

DIRECTORY = art.DATA_DIR / "emoji-preference"
REBUILD = "python launch/train_reward.py --flagfile=experiments/reward_preference.flags"

# Raters prefer a over b with probability sigmoid((u_a - u_b) / NOISE), u by the formula.
NOISE = 0.08
PICTURES = 4  # compared with each other for each prompt: two rendered, two generated
_TASKS = {"single": 4, "pair": 8, "portrait": 4}  # of 16 prompts; the same in every batch
_GENERATED_PROMPTS = 4_000
_GUIDANCE = (2.0, 4.0)  # of the two generated pictures for a prompt
_WRONG_SHARE = 0.2  # of the rendered pictures show something else than the prompt says
# Texts of other prompts that a picture is told from. Comparisons alone taught vividness and nothing
# of the text in 6,000 steps; BLIP, from which ImageReward starts, has learnt to match the two.
_OTHER_TEXTS = 3
_MATCHING_WEIGHT = 0.5
# Words that are taught as unknown: of those that it was never taught it knows then that it knows
# nothing, and judges by the rest.
_UNKNOWN_SHARE = 0.15
_TRAINING, _HELD_OUT, _INIT, _DRAWN = range(4)  # second word of each seed: the streams never meet
_FIRST, _SECOND = np.array(list(itertools.combinations(range(PICTURES), 2))).T

TEXT_LENGTH = 16
_TEXTS = (  # every word of the prompts that rewards are trained on
  *(world.object_caption(name, t) for name in prompts.SEEN_OBJECTS for t in world.OBJECT_TEMPLATES),
  *world.CONNECTORS,
  *(
    world.portrait_caption(name, template, gender)
    for name in prompts.SEEN_OCCUPATIONS
    for template in world.PORTRAIT_TEMPLATES
    for gender in (None, *art.GENDERS[1:])
  ),
)
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") + tuple(
  sorted({word for text in _TEXTS for word in text.split()})
)
CONFIG = image_reward.ImageRewardConfig(
  vision=blip.VisionConfig(
    image_size=world.IMAGE_SIZE,
    patch_size=4,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
  ),
  text=blip.TextConfig(
    vocab_size=len(VOCABULARY),
    max_position_embeddings=TEXT_LENGTH,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
  ),
  text_length=TEXT_LENGTH,
  head_widths=(64, 16),
  mean=0.0,
  std=1.0,
)
_MODULE = image_reward.ImageReward(CONFIG)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Comparisons:
  """P prompts with four pictures each, of which half are rendered here and half were generated.

  The portraits come last.

  Attributes:
    rendered: 2 P scenes, those of a prompt one after the other.
    damage: what is done to them.
    right: `[2 P]` bool, whether a scene shows what the prompt says.
    generated: `[2 P, 32, 32, 3]` uint8.
    objects: `[P - Q, 2]` int32 indices into `art.OBJECTS` of what the prompts name; -1 is none.
    occupations: `[Q]` int32 indices into `art.OCCUPATIONS` of the portraits.
    ids: `[P, L]` int32 tokens.
    mask: `[P, L]` int32; 1 for tokens, 0 for padding.
    uniform: `[P, 6]` in [0, 1), the raters' luck.
  """

  rendered: scenes.Scenes
  damage: scenes.Damage
  right: np.ndarray
  generated: np.ndarray
  objects: np.ndarray
  occupations: np.ndarray
  ids: np.ndarray
  mask: np.ndarray
  uniform: np.ndarray


def load(directory: Path = DIRECTORY) -> Params:
  """The weights, float32 (stored as float16).

  Raises:
    UserError: the file is missing, damaged, or of another network.
  """
  path = Path(directory) / "model.safetensors"
  return torch_layout.from_torch(_MODULE, sources.open_weights(path), what=str(path))


def save(directory: Path, params: Params) -> None:
  """Writes `config.json`, `vocab.txt` and `model.safetensors` (float16).

  Raises:
    UserError: one of them cannot be written.
  """
  state = safetensors.numpy.save(torch_layout.to_torch(params, np.float16), {"format": "pt"})
  for name, content in (
    ("config.json", json.dumps(dataclasses.asdict(CONFIG), indent=2) + "\n"),
    ("vocab.txt", "\n".join(VOCABULARY) + "\n"),
    ("model.safetensors", state),
  ):
    files.write_atomic(Path(directory) / name, content)


def tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """`[P, 16]` int32 token ids and mask; a word is a token in this vocabulary."""
  index = {word: i for i, word in enumerate(VOCABULARY)}
  ids = np.full((len(texts), TEXT_LENGTH), index["[PAD]"], np.int32)
  for row, text in zip(ids, texts, strict=True):
    words = ["[CLS]", *text.lower().split()[: TEXT_LENGTH - 2], "[SEP]"]
    row[: len(words)] = [index.get(word, index["[UNK]"]) for word in words]
  return ids, (ids != index["[PAD]"]).astype(np.int32)


# ---------------------------------------------------------------------------- training


def recipe(config: reward_training.RewardConfig) -> reward_training.Recipe:
  """How `launch/train_reward.py` trains it.

  The pictures by emoji-sd are drawn first, and kept in the working directory.
  """
  texts = _some_prompts(np.random.default_rng((config.seed, _DRAWN)), _GENERATED_PROMPTS)
  generated = _generated(
    Path(config.workdir, "generated.npz"), [prompt.text for prompt in texts], config.seed
  )
  rows = {task: [i for i, prompt in enumerate(texts) if _task(prompt) == task] for task in _TASKS}

  def batch(step: int) -> Comparisons:
    rng = np.random.default_rng((config.seed, _TRAINING, step))
    counts = _counts(config.batch_size // PICTURES)
    picked = np.concatenate([rng.choice(rows[task], n) for task, n in counts.items()])
    return _comparisons(rng, [texts[i] for i in picked], generated[picked], wide=True)

  return reward_training.Recipe(
    init=lambda seed: reward_training.initialise(
      param_shapes(_MODULE), np.random.default_rng((seed, _INIT))
    ),
    batch=batch,
    loss=loss,
    measure=lambda params: measure(params, config),
    save=save,
    load=load,
  )


def _task(prompt: Prompt) -> str:
  objects = prompt.metadata.get("objects")
  return "portrait" if objects is None else "single" if len(objects) == 1 else "pair"


def _counts(n: int) -> dict[str, int]:
  """How many of `n` prompts are of each task; portraits are last."""
  total = sum(_TASKS.values())
  pair, portrait = (round(n * _TASKS[task] / total) for task in ("pair", "portrait"))
  return {"single": n - pair - portrait, "pair": pair, "portrait": portrait}


def _some_prompts(rng: np.random.Generator, n: int) -> list[Prompt]:
  found = []
  for task, count in _counts(n).items():
    known = prompts.prompts(task, "train")
    found += [known[i] for i in rng.integers(len(known), size=count)]
  return found


def _generated(path: Path, texts: Sequence[str], seed: int) -> np.ndarray:
  """`[N, 2, 32, 32, 3]` uint8: two pictures of each prompt by emoji-sd; kept in `path`."""
  from rlft.diffusion.policy import make_policy
  from rlft.diffusion.sampler import Sampler
  from rlft.models.files import pretrained

  if path.exists():
    with np.load(path) as file:
      if file["texts"].tolist() == list(texts):
        return file["images"]
  model, images = pretrained.load(EMOJI_SD), []
  for guidance in _GUIDANCE:
    policy = make_policy(model, sampling_steps=10, guidance_scale=guidance)
    draw = Sampler(model, policy, batch_size=64)
    found = draw(texts, seed, progress=f"drawing with guidance {guidance:g}")
    images.append((found * 255 + 0.5).astype(np.uint8))
  images = np.stack(images, axis=1)
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.writing(path):
    np.savez(path, images=images, texts=np.array(texts))
  return images


def _comparisons(
  rng: np.random.Generator, texts: Sequence[Prompt], generated: np.ndarray, *, wide: bool
) -> Comparisons:
  """Renders two pictures for each prompt, beside the generated ones; `rng` is consumed."""
  count = PICTURES - generated.shape[1]
  drawn = [_render(rng, prompt, wide) for prompt in texts for _ in range(count)]
  rendered, right = zip(*drawn, strict=True)
  names, known = [prompt.text for prompt in texts], [prompt.metadata for prompt in texts]
  ids, mask = tokenize(names)
  if wide:
    is_word = ids > VOCABULARY.index("[MASK]")
    unknown = is_word & (rng.random(ids.shape) < _UNKNOWN_SHARE)
    ids = np.where(unknown, VOCABULARY.index("[UNK]"), ids).astype(np.int32)
  occupations = prompts.occupations(names, known)
  portraits = occupations >= 0
  assert np.all(np.diff(portraits.astype(int)) >= 0), "portraits come last"
  return Comparisons(
    rendered=scenes.pack(rendered),
    damage=scenes.damage(rng, len(rendered)),
    right=np.array(right),
    generated=generated.reshape(-1, *generated.shape[2:]),
    objects=prompts.object_classes(names, known)[~portraits],
    occupations=occupations[portraits],
    ids=ids,
    mask=mask,
    uniform=rng.random((len(texts), len(_FIRST)), np.float32),
  )


def _render(rng: np.random.Generator, prompt: Prompt, wide: bool) -> tuple[world.Scene, bool]:
  """A scene for a prompt, and whether it shows what that says.

  Of two objects one may be half hidden, and now and then one is wrong.
  """
  objects = prompt.metadata.get("objects")
  kind = {"single": "object"}.get(task := _task(prompt), task)
  given: dict[str, Any] = scenes.spread_washing(rng, kind) if wide else {}
  wrong, place, other = rng.random(3)
  right = bool(wrong >= _WRONG_SHARE)
  if objects is None:
    if not right:
      return world.render_scene(rng, "object", **given), right
    given["tone"] = int(rng.integers(len(world.TONE_CLASSES)))
    given["occupation"] = prompt.metadata["occupation"]
    return world.render_scene(rng, kind, **given), right
  objects = list(objects)
  if not right:
    rest = [name for name in prompts.SEEN_OBJECTS if name not in objects]
    objects[int(place * len(objects))] = rest[int(other * len(rest))]
  return world.render_scene(rng, kind, objects=objects, **given), right


def _pictures(batch: Comparisons) -> tuple[jax.Array, jax.Array]:
  """`[4 P, 32, 32, 3]` in [0, 1], by prompt, and what the formula says about them `[P, 4]`."""
  count = len(batch.ids)
  rendered, _ = scenes.degrade(batch.rendered, batch.damage)
  generated = jnp.asarray(batch.generated, jnp.float32) / 255
  images = [x.reshape(count, -1, *x.shape[1:]) for x in (rendered, generated)]
  images = jnp.concatenate(images, axis=1)
  images = images.reshape(-1, *images.shape[2:])
  liked = jnp.concatenate(_liked(batch, images))
  return images, liked.reshape(count, PICTURES)


def _liked(batch: Comparisons, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The preference of `[4 P, 32, 32, 3]` pictures: of those with objects, and of the portraits.

  One after the other, since portraits are compared with many sprites.
  """
  objects, portraits = measures.preference_params()
  first = PICTURES * len(batch.objects)
  asked, occupations = (
    jnp.repeat(jnp.asarray(x), PICTURES, axis=0) for x in (batch.objects, batch.occupations)
  )
  return (
    measures.object_fidelity(objects, images[:first], asked),
    measures.portrait_fidelity(portraits, images[first:], occupations),
  )


def _scores(
  params: Params, images: jax.Array, batch: Comparisons, *, others: int = 0
) -> tuple[jax.Array, list[jax.Array]]:
  """`[P, 4]` by the network, and as many for each of so many other texts; -inf for the same."""
  apply = functools.partial(_MODULE.apply, {"params": params})
  states = apply(preprocess.clip_normalise(images), method="encode_images")

  def score(ids, mask):
    return apply(states, ids, mask, method="score").reshape(-1, PICTURES)

  ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
  found = []
  for by in range(1, others + 1):
    other = jnp.roll(ids, by, axis=0)
    same = jnp.all(other == ids, axis=1, keepdims=True)
    found.append(jnp.where(same, -jnp.inf, score(other, jnp.roll(mask, by, axis=0))))
  return score(ids, mask), found


def loss(params: Params, batch: Comparisons) -> jax.Array:
  """What raters prefer, and which text a picture is of.

  The first is the mean over pairs of -log sigmoid(s_preferred - s_other): Bradley-Terry, arXiv
  2304.05977 (1). The second the cross-entropy of a picture's own text among those of other prompts
  of the batch, of pictures that show what their text says.
  """
  images, liked = _pictures(batch)
  chance = jax.nn.sigmoid((liked[:, _FIRST] - liked[:, _SECOND]) / NOISE)
  sign = jnp.where(batch.uniform < chance, 1.0, -1.0)
  scores, others = _scores(params, images, batch, others=_OTHER_TEXTS)
  preferred = -jnp.mean(jax.nn.log_sigmoid(sign * (scores[:, _FIRST] - scores[:, _SECOND])))

  right = jnp.asarray(batch.right).reshape(len(scores), -1)
  right = jnp.concatenate([right, jnp.ones_like(right)], axis=1)  # generated: as was asked
  matched = scores - jax.nn.logsumexp(jnp.stack([scores, *others]), axis=0)
  return preferred - _MATCHING_WEIGHT * jnp.mean(matched, where=right)


def measure(params: Params, config: reward_training.RewardConfig) -> reward_training.Figures:
  """Pairwise accuracy on pictures for the development prompts.

  Returns:
    For 'seen' (held-out prompts of objects and occupations of training), 'withheld' (the others)
    and 'all': 'accuracy', the expected share of raters' answers that the network foretells;
    'achievable', the same for the formula itself; 'share', their ratio; 'correlation' of the
    network's scores and the formula over the pictures of one prompt, mean over prompts.
  """
  rng = np.random.default_rng((config.seed, _HELD_OUT))
  held_out = prompts.prompts("preference", "development")
  count = max(PICTURES, config.held_out // PICTURES)
  texts = [held_out[i % len(held_out)] for i in range(count)]
  texts.sort(key=lambda prompt: _task(prompt) == "portrait")
  path = Path(config.workdir, "generated_held_out.npz")
  generated = _generated(path, [prompt.text for prompt in texts], config.seed + 1)
  batch = _comparisons(rng, texts, generated, wide=False)
  images, liked = jax.jit(_pictures)(batch)
  score = jax.jit(lambda *args: _scores(*args)[0])
  parts = [
    score(
      params,
      images[i * PICTURES : (i + 50) * PICTURES],
      dataclasses.replace(batch, ids=batch.ids[i : i + 50], mask=batch.mask[i : i + 50]),
    )
    for i in range(0, count, 50)
  ]
  scores, liked = np.concatenate(parts), np.asarray(liked)
  chance = 1 / (1 + np.exp((liked[:, _SECOND] - liked[:, _FIRST]) / NOISE))
  said = scores[:, _FIRST] > scores[:, _SECOND]
  right = np.where(said, chance, 1 - chance)
  best = np.maximum(chance, 1 - chance)

  def correlation(a, b):
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1) + 1e-12)

  alike = correlation(scores, liked)
  withheld = np.array(
    [
      bool({*prompt.metadata.get("objects", ())} & {*art.WITHHELD_OBJECTS})
      or prompt.metadata.get("occupation") in art.WITHHELD_OCCUPATIONS
      for prompt in texts
    ]
  )
  return {
    name: {
      "accuracy": float(right[rows].mean()),
      "achievable": float(best[rows].mean()),
      "share": float(right[rows].mean() / best[rows].mean()),
      "correlation": float(alike[rows].mean()),
    }
    for name, rows in (("seen", ~withheld), ("withheld", withheld), ("all", withheld | True))
  }
