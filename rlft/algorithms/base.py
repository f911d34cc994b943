"""What an algorithm is: how a model learns from a task's images once they are drawn and scored.

To add one, write a file with a frozen dataclass that has what `Algorithm` says, and name it in
`ALGORITHMS` of rlft/catalog.py. Its fields are the options behind its name (`--algorithm=
NAME?key=value`); a field with the name of a flag gets the flag's value. Everything else (prompts,
rewards, the pretraining loss, evaluations, checkpoints, devices) is the same for all algorithms.

    collects    what of the way to an image it learns from
    draws_with  whose weights draw
    slopes      whether it needs the gradient of the reward
    bind        makes its jitted programs, once in a run
    learn       scored images -> another state
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any, Literal, Protocol

import jax
from jax.sharding import Mesh
import optax

from rlft.config.settings import PolicySettings, TaskConfig
from rlft.diffusion.policy import Policy
from rlft.models.lora import Weights
from rlft.models.precision import cast
from rlft.parallel import gradients
from rlft.types import Collect, Drawn, Moment, Prompt, Slope, TrainState


class Memory(Protocol):
  """What an algorithm remembers of a task from one iteration to the next, on the host."""

  def state(self) -> Any:
    """For a checkpoint, as JSON can hold it exactly."""

  def restore(self, state: Any) -> None:
    """Goes on from `state()`."""


@dataclasses.dataclass(frozen=True)
class Batch:
  """A task's images of an iteration, scored.

  Attributes:
    prompts: of the B images; the images of a prompt follow each other.
    images_per_prompt: G.
    drawn: the images, and what was collected of them.
    scores: `[B]` float32, sharded like the images; NaN where an image could not be scored.
    moment: makes what is random.
    slope: scores other final latents `[B, H, W, C]` of these prompts, with the gradient with
      respect to the latents. An algorithm that calls it says so by `slopes`, and does it before it
      gives the state up, as the reward may fail.
  """

  prompts: Sequence[Prompt]
  images_per_prompt: int
  drawn: Drawn
  scores: jax.Array
  moment: Moment
  slope: Callable[[jax.Array], Slope]


@dataclasses.dataclass(frozen=True)
class Call:
  """A jitted program with shapes for arguments, to be compiled ahead of time.

  Attributes:
    program: it.
    args: trees of `jax.ShapeDtypeStruct` with shardings.
    times: calls for a task in an iteration.
    name: of the program.
    is_update: whether it makes a gradient of the trained parameters.
    moved: bytes that devices tell each other of images in a call.
  """

  program: Any
  args: tuple[Any, ...]
  times: int
  name: str = "update"
  is_update: bool = True
  moved: int = 0


@dataclasses.dataclass(frozen=True)
class Learner:
  """What every algorithm learns with: gradients over all devices, and the optimizer's step.

  Attributes:
    policy: what draws, with its process and guidance.
    optimizer: of the trained tree.
    mesh: all devices.
    trains_adapter: whether the trained tree is a LoRA adapter beside the base's weights.
    microbatch: images of a device in a part, see `microbatch.size`.
  """

  policy: Policy
  optimizer: optax.GradientTransformation
  mesh: Mesh
  trains_adapter: bool = False
  microbatch: int = 0

  def weights(self, trained: Any, base: Any) -> Weights:
    """The current policy's weights, from the trained tree and the base's ({} if not kept)."""
    return Weights(base, trained) if self.trains_adapter else Weights(trained)

  def gradient(
    self, loss: gradients.Loss, state: TrainState, frozen: Any, rows: Any
  ) -> tuple[Any, Any]:
    """The gradient of a loss with respect to `state.params`, and what it says of each row.

    Args:
      loss: `(trained, base, rows [n, ...]) -> (sum over the rows, outputs [n, ...])`.
      state: sharded.
      frozen: parameters that do not change; 'unet' is the base, if it is kept.
      rows: a tree of `[K, B, ...]`: K steps of B images.
    """
    return gradients.over_devices(
      loss, state.params, frozen.get("unet", {}), rows, **self._over_devices
    )

  def values(self, function: Callable[..., Any], state: TrainState, frozen: Any, rows: Any) -> Any:
    """What `(trained, base, rows [n, ...]) -> outputs [n, ...]` returns for each row.

    Other arguments are as of `gradient`.
    """
    return gradients.values_over_devices(
      function, state.params, frozen.get("unet", {}), rows, **self._over_devices
    )

  @property
  def _over_devices(self) -> dict[str, Any]:
    """How the devices share the rows of a batch."""
    return {
      "mesh": self.mesh,
      "cast": cast,
      "dtype": self.policy.unet.dtype,
      "microbatch": self.microbatch,
    }

  def step(self, state: TrainState, gradient: Any) -> TrainState:
    """One step of the optimizer."""
    updates, opt = self.optimizer.update(gradient, state.opt, state.params)
    return dataclasses.replace(state, params=optax.apply_updates(state.params, updates), opt=opt)


# Numbers by name, once the devices have them. Raises UserError if what was learnt cannot be right.
Numbers = Callable[[], dict[str, float]]


class Learning(Protocol):
  """An algorithm with its programs."""

  def learn(
    self, state: TrainState, frozen: Any, batch: Batch, memory: Memory | None
  ) -> tuple[TrainState, Numbers]:
    """Updates the state from a scored batch; does not wait for the last of its programs.

    Args:
      state: donated.
      frozen: parameters that do not change: 'vae', text encoders, and 'unet' (the base's weights)
        where they are kept.
      batch: with the images of `Algorithm.collects`.
      memory: of the batch's task, see `Algorithm.memory`.

    Returns:
      The new state, and what waits for its numbers, `grad_norm` among them, and checks them:
      nothing may be kept of the state before that.
    """

  def calls(self, state: Any, frozen: Any, drawn: Drawn) -> Iterable[Call]:
    """The large programs that `learn` calls, for arguments of which only the shapes are known."""


class Algorithm(Protocol):
  """How a model learns from scored images.

  Attributes:
    collects: what of the way to an image `learn` is given.
    draws_with: whose weights draw the images: the 'current' ones, or the 'base' model's.
    needs_base: whether `learn` needs the base model's weights.
    slopes: how often `learn` asks for the reward's gradient, see `Batch.slope`; if at all, rewards
      must have one.
  """

  collects: Collect
  draws_with: Literal["current", "base"]
  needs_base: bool
  slopes: int

  def check(self, policy: PolicySettings, tasks: Sequence[TaskConfig]) -> None:
    """Raises UserError where settings contradict the algorithm's."""

  def check_task(
    self, task: TaskConfig, *, prompts: int, iterations: int, same_in_set: bool
  ) -> None:
    """Raises UserError where a task cannot be learnt from.

    Args:
      task: its settings.
      prompts: how many it has.
      iterations: of the run.
      same_in_set: whether all images of a prompt have the same score.
    """

  def compared(self, images_per_prompt: int) -> int | None:
    """How many images that follow each other are compared by their scores; None: all; 0: none."""

  def memory(self) -> Memory | None:
    """A new memory of a task; None if the algorithm needs none."""

  def bind(self, learner: Learner) -> Learning:
    """Makes the programs, each compiled once for each batch shape.

    Raises:
      UserError: the policy's process cannot be learnt from.
    """
