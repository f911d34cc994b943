"""What crosses module boundaries: dimension letters, data classes and the reward protocol.

Dimension letters used throughout the library:
    B  images in a batch                  T  denoising steps
    P  prompts in a batch                 K  timesteps trained per iteration
    G  images per prompt (B = P * G)      L  text tokens
    H, W, C  latent height, width, channels
    A  attribute classes (set rewards)    E  text encoders (SD 1; SDXL 2)
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, Protocol

import jax
import numpy as np


class UserError(Exception):
  """A mistake in what the user gave. The message is one line that says what to do."""

  def __init__(self, message: str):
    """Joins the lines of the message: it may quote what has several."""
    super().__init__(" ".join(message.splitlines()))


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt and what its author knows about it, e.g. `{'objects': ['dog', 'car']}`."""

  text: str
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
  """What a UNet is told beside the noisy latents and the timestep; float32.

  Attributes:
    text: `[..., B, L, D]`, states of the text encoders.
    pooled: `[..., B, F]`, one embedding for each whole text; None but for SDXL.
    sizes: `[..., B, 6]`, height and width of the original, top and left of the crop, height and
      width of the target, in pixels; None but for SDXL.
  """

  text: jax.Array
  pooled: jax.Array | None = None
  sizes: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
  """What a policy is conditioned on; leaves `[B, ...]`.

  Attributes:
    prompt: the prompts.
    empty: the empty prompt, for classifier-free guidance; None without guidance.
  """

  prompt: Conditioning
  empty: Conditioning | None = None


# (x_t [n, H, W, C], timesteps [n] int32, conditioning [N, ...]) -> output [N, H, W, C] float32,
# with N a multiple of n: the maps are repeated as often as needed, all of them each time.
Denoiser = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
  """Reverse diffusion of B images over T steps; all float32, sharded over B.

  Attributes:
    latents: `[T+1, B, H, W, C]`; `latents[0]` is noise, `latents[T]` the final latent.
    log_probs: `[T, B]`; mean over latent dimensions of log p(x_{t-1} | x_t, prompt).
  """

  latents: jax.Array
  log_probs: jax.Array


class Process(Protocol):
  """T reverse steps of a diffusion, each a Gaussian N(mean, std^2 I), and its forward process.

  Attributes:
    timesteps: `[T]`, the network's time input, in the order of the steps.
    std: `[T]` float32; 0 where a step is deterministic.
    train_timesteps: N, the timesteps that the network was trained on.
  """

  timesteps: jax.Array
  std: jax.Array
  train_timesteps: int

  def mean(self, index: jax.Array, sample: jax.Array, output: jax.Array) -> jax.Array:
    """Mean of step `index` (scalar or `[B]`) from x_t `[B, H, W, C]` and the network's output."""

  def clean(self, index: jax.Array, sample: jax.Array, output: jax.Array) -> jax.Array:
    """Prediction of x_0 `[B, H, W, C]`; arguments as of `mean`."""

  def corrupt(self, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """The forward process: x_t from x_0 `[B, H, W, C]` at `[B]` timesteps in [0, N)."""

  def target(self, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """What the network should put out at that x_t."""


# What is kept of the way to an image: the whole way, or its end alone.
Collect = Literal["trajectory", "latents"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """Images that a policy drew, with what an algorithm asked to be collected; sharded over B.

  Attributes:
    images: `[B, H, W, 3]` float32 in [0, 1].
    text: what the policy was conditioned on.
    collected: the `Trajectory`, or the final latents `[B, H, W, C]` alone.
  """

  images: jax.Array
  text: Guidance
  collected: Trajectory | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What an update changes, sharded over 'fsdp'.

  Attributes:
    params: the trained tree: the UNet's parameters, or the LoRA adapter.
    opt: state of the optimizer.
    ema: averaged `params`, or None.
  """

  params: Any
  opt: Any
  ema: Any

  @property
  def averaged(self) -> Any:
    """The parameters to evaluate: averaged where they are."""
    return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class Moment:
  """A task's turn in an iteration. All that is random in it is a pure function of these numbers.

  Attributes:
    seed: of the run.
    iteration: from 0.
    task: its place in the run; the number of tasks stands for the pretraining step.
  """

  seed: int
  iteration: int
  task: int

  def key(self) -> jax.Array:
    """A random key of its own."""
    key = jax.random.fold_in(jax.random.key(self.seed), self.iteration)
    return jax.random.fold_in(key, self.task)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """What a reward returns that has more to tell than the scores; arrays as `score` returns them.

  Attributes:
    values: what is trained on.
    whole: `[P]`, how good each set is, where `values` are the credits of its images; else None.
    found: 1 where an image shows what is measured (a face, say) and 0 where there is nothing to
      measure, `[B]` or of sets `[P, G]`; None where that is not known.
  """

  values: Any
  whole: Any = None
  found: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slope:
  """Scores, and the way in which they rise.

  Attributes:
    scores: `[B]` float32; NaN where an image could not be scored.
    gradient: `[B, ...]` float32, of the sum of the scores with respect to what was scored: images,
      or the latents that they are decoded from. 0 where the score is NaN. The score of a set counts
      once for each of its images.
  """

  scores: jax.Array
  gradient: jax.Array


@dataclasses.dataclass(frozen=True)
class JaxReward:
  """Scores images where they are: a pure function, jitted, on the sharded global batch.

  Whether its score has a gradient with respect to the images, which some algorithms follow, is
  found by tracing it (rlft/rewards/scoring/gradient.py).

  Attributes:
    name: what the user wrote.
    score: `(params, images, features) -> scores`, where `images` are `[B, H, W, 3]` float32 in
      [0, 1] and `features` is what `prepare` returned. Scores are `[B]`, or `Scores`; NaN says
      "could not be scored".
    prepare: `(prompts, metadata) -> pytree of numpy arrays [B, ...]`, the numbers that the score
      needs about each prompt (class indices, token ids); None if it needs none.
    params: weights, given to `score` as its first argument.
    is_set: the reward is defined on the G images of one prompt: `score` gets `[P, G, H, W, 3]` (and
      features `[P, G, ...]`) and returns `[P]`, which each image of the set gets, or `[P, G]`, the
      credit of each image.
    is_measure: a score says how good an image or a set is, so that it can be compared between
      batches and serve as an evaluation metric. Credit relative to a set does not.
    lower_is_better: less is better; else more is.
    needs: keys of which a prompt's metadata must have one, or its images cannot be scored.
  """

  name: str
  score: Callable[[Any, jax.Array, Any], Any]
  _: dataclasses.KW_ONLY
  prepare: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Any] | None = None
  params: Any = None
  is_set: bool = False
  is_measure: bool = True
  lower_is_better: bool = False
  needs: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class HostReward:
  """Scores images on the host: a Python function, in threads, on each process's own images.

  Attributes:
    name: what the user wrote.
    score: `(images, prompts, metadata) -> scores` on numpy arrays and lists; images
      `[B, H, W, 3]` float32 in [0, 1]. Scores are `[B]`, or `Scores`; NaN says "could not be
      scored".
    threads: how many calls of `score` run at once on a process, each with its part of the images;
      0 leaves that to the flag --reward_threads. 1 where only one may, or where the batch is best
      scored whole (a PyTorch model).
    is_set: as of `JaxReward`; `score` gets images `[P, G, H, W, 3]`, P prompts and metadata.
    is_measure: as of `JaxReward`.
    lower_is_better: as of `JaxReward`.
    needs: as of `JaxReward`.
  """

  name: str
  score: Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], Any]
  _: dataclasses.KW_ONLY
  threads: int = 0
  is_set: bool = False
  is_measure: bool = True
  lower_is_better: bool = False
  needs: Sequence[str] = ()


Reward = JaxReward | HostReward  # Also the type of every evaluation metric.
