"""Reward models scoring a batch: the suite, and our side of it."""

from collections.abc import Iterator
import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlft.performance.benchmark import ports, torch_ports
from rlft.performance.benchmark.contest import OURS, BenchmarkConfig, Contest, Side, Suite
from rlft.performance.benchmark.ports import PORTS, Scorer

_BATCH_SIZE = 2
# Of a side: its parameters in float32, and as much again for what is computed.
_BYTES_PER_PARAMETER = 2 * 4


def suite() -> Suite:
  """All of `PORTS`."""
  return Suite(
    flag="port",
    names=tuple(PORTS),
    sides=(OURS, "torch"),
    unit="images",
    contest=contest,
  )


@contextlib.contextmanager
def contest(name: str, config: BenchmarkConfig) -> Iterator[Contest]:
  """The contest of one of `PORTS`."""
  port, dtype = PORTS[name], jnp.dtype(config.dtype)
  count = config.batch_size or _BATCH_SIZE
  shape = (count, config.image_size, config.image_size, 3)
  images = np.random.RandomState(0).uniform(size=shape).astype(np.float32)
  scorer = port.scorer(port.config, dtype, count)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(scorer.shapes))
  yield Contest(
    name=name,
    about=f"{count} images of {config.image_size} x {config.image_size} pixels, {config.dtype}",
    count=count,
    parameters=parameters,
    side_bytes=parameters * _BYTES_PER_PARAMETER,
    sides={
      OURS: lambda: ours(scorer, images),
      "torch": torch_ports.side(port.kind, port.config, dtype, images, scorer.features),
    },
  )


def ours(scorer: Scorer, images: np.ndarray) -> Side:
  """Makes random weights and compiles."""
  params = ports.random_params(scorer.shapes)
  given = jax.device_put((images, scorer.features))
  start = time.perf_counter()
  score = jax.jit(scorer.score).lower(params, *given).compile()
  seconds = time.perf_counter() - start
  return Side(lambda: jax.block_until_ready(score(params, *given)), seconds)
