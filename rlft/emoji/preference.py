"""'emoji-preference': ImageReward's architecture in small, trained on comparisons by noisy raters.

`data/emoji-preference` holds a model in the layout of ImageReward.pt, with its vocabulary;
`launch/train_reward.py` trains it from nothing. The raters are simulated: they follow the written
formula `measures.preference`, and make mistakes the more often the less two pictures differ.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

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
_TASKS = {"single": 0.3, "pair": 0.5, "portrait": 0.2}  # where the prompts come from
_GENERATED_PROMPTS = 4_000
_GUIDANCE = (1.0, 2.0)  # of the two generated pictures for a prompt
_WRONG_SHARE = 0.15  # of the rendered pictures show something else than the prompt says
_TRAINING, _HELD_OUT, _INIT, _DRAWN = range(4)  # second word of each seed: the streams never meet
_FIRST, _SECOND = np.array(list(itertools.combinations(range(PICTURES), 2))).T

TEXT_LENGTH = 16
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") + tuple(
  sorted(
    {
      word
      for task in prompts.TASKS
      for split in prompts.SPLITS
      for prompt in prompts.prompts(task, split)
      for word in prompt.text.split()
    }
  )
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

  Attributes:
    rendered: 2 P scenes, those of a prompt one after the other.
    damage: what is done to them.
    generated: `[2 P, 32, 32, 3]` uint8.
    objects: `[P, 2]` int32 indices into `art.OBJECTS` of what the prompt names; -1 is none.
    ids: `[P, L]` int32 tokens.
    mask: `[P, L]` int32; 1 for tokens, 0 for padding.
    uniform: `[P, 6]` in [0, 1), the raters' luck.
  """

  rendered: scenes.Scenes
  damage: scenes.Damage
  generated: np.ndarray
  objects: np.ndarray
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

  def batch(step: int) -> Comparisons:
    rng = np.random.default_rng((config.seed, _TRAINING, step))
    picked = rng.integers(len(texts), size=config.batch_size // PICTURES)
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


def _some_prompts(rng: np.random.Generator, n: int) -> list[Prompt]:
  tasks = rng.choice(list(_TASKS), size=n, p=list(_TASKS.values())).tolist()
  known = {task: prompts.prompts(task, "train") for task in _TASKS}
  return [known[task][rng.integers(len(known[task]))] for task in tasks]


def _generated(path: Path, texts: Sequence[str], seed: int) -> np.ndarray:
  """`[N, 2, 32, 32, 3]` uint8: two pictures of each prompt by emoji-sd; kept in `path`."""
  from rlft.diffusion.policy import make_policy
  from rlft.diffusion.sampler import Sampler
  from rlft.models.files import pretrained

  if path.exists():
    with np.load(path) as file:
      if file["texts"].tolist() == list(texts):
        return file["images"]
  model, images = pretrained.load(pretrained.EMOJI_SD), []
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
  rendered = []
  for prompt in texts:
    for _ in range(PICTURES - generated.shape[1]):
      rendered.append(_render(rng, prompt, wide))
  ids, mask = tokenize([prompt.text for prompt in texts])
  return Comparisons(
    rendered=scenes.pack(rendered),
    damage=scenes.damage(rng, len(rendered)),
    generated=generated.reshape(-1, *generated.shape[2:]),
    objects=prompts.object_classes([p.text for p in texts], [p.metadata for p in texts]),
    ids=ids,
    mask=mask,
    uniform=rng.random((len(texts), len(_FIRST)), np.float32),
  )


def _render(rng: np.random.Generator, prompt: Prompt, wide: bool) -> world.Scene:
  """A scene for a prompt; of two objects one may be missing, and now and then one is wrong."""
  objects = prompt.metadata.get("objects")
  kind = "portrait" if objects is None else "object" if len(objects) == 1 else "pair"
  washing = scenes.spread_washing(rng, kind) if wide else {}
  wrong, place, other = rng.random(3)
  if objects is None:
    if wrong < _WRONG_SHARE:
      return world.render_scene(rng, "object", **washing)
    tone = int(rng.integers(len(world.TONE_CLASSES)))
    occupation = prompt.metadata["occupation"]
    return world.render_scene(rng, kind, occupation=occupation, tone=tone, **washing)
  objects = list(objects)
  if wrong < _WRONG_SHARE:
    rest = [name for name in prompts.SEEN_OBJECTS if name not in objects]
    objects[int(place * len(objects))] = rest[int(other * len(rest))]
  return world.render_scene(rng, kind, objects=objects, **washing)


def _pictures(batch: Comparisons) -> tuple[jax.Array, jax.Array]:
  """`[4 P, 32, 32, 3]` in [0, 1], by prompt, and what the formula says about them `[P, 4]`."""
  count = len(batch.ids)
  rendered, _ = scenes.degrade(batch.rendered, batch.damage)
  generated = jnp.asarray(batch.generated, jnp.float32) / 255
  images = [x.reshape(count, -1, *x.shape[1:]) for x in (rendered, generated)]
  images = jnp.concatenate(images, axis=1)
  images = images.reshape(-1, *images.shape[2:])
  objects = jnp.repeat(jnp.asarray(batch.objects), PICTURES, axis=0)
  liked = measures.preference(images, objects, measures.presence_params())
  return images, liked.reshape(count, PICTURES)


def _scores(params: Params, images: jax.Array, batch: Comparisons) -> jax.Array:
  """`[P, 4]` by the network."""
  pixels = preprocess.clip_normalise(images)
  scores = _MODULE.apply({"params": params}, pixels, batch.ids, batch.mask)
  return scores.reshape(-1, PICTURES)


def loss(params: Params, batch: Comparisons) -> jax.Array:
  """Mean over pairs of -log sigmoid(s_preferred - s_other): Bradley-Terry, arXiv 2304.05977 (1)."""
  images, liked = _pictures(batch)
  chance = jax.nn.sigmoid((liked[:, _FIRST] - liked[:, _SECOND]) / NOISE)
  sign = jnp.where(batch.uniform < chance, 1.0, -1.0)
  scores = _scores(params, images, batch)
  return -jnp.mean(jax.nn.log_sigmoid(sign * (scores[:, _FIRST] - scores[:, _SECOND])))


def measure(params: Params, config: reward_training.RewardConfig) -> reward_training.Figures:
  """Pairwise accuracy on pictures for held-out prompts.

  Returns:
    For 'seen' (held-out prompts of objects and occupations of training), 'withheld' (the others)
    and 'all': 'accuracy', the expected share of raters' answers that the network foretells;
    'achievable', the same for the formula itself; 'share', their ratio; 'correlation' of the
    network's scores and the formula over the pictures of one prompt, mean over prompts.
  """
  rng = np.random.default_rng((config.seed, _HELD_OUT))
  held_out = prompts.prompts("preference", "test")
  count = max(PICTURES, config.held_out // PICTURES)
  texts = [held_out[i % len(held_out)] for i in range(count)]
  path = Path(config.workdir, "generated_held_out.npz")
  generated = _generated(path, [prompt.text for prompt in texts], config.seed + 1)
  batch = _comparisons(rng, texts, generated, wide=False)
  images, liked = jax.jit(_pictures)(batch)
  score = jax.jit(_scores)
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
