"""Two processes with two devices each, on loopback, make the run that one with four makes."""

import pathlib
import signal

import forked_cases
import jax
import numpy as np
import pytest
import train_cases as cases

from rlft.config import fields
from rlft.config.settings import Config, EvalConfig

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return cases.folder(tmp_path_factory)


def settings(folder: pathlib.Path, workdir: pathlib.Path) -> Config:
  """A reward in JAX, one on the host, one on sets; shards of parameters on both processes."""
  return cases.config(
    folder,
    workdir,
    task=(
      cases.task(folder),
      cases.task(folder, "green", "host:green"),
      cases.task(folder, "spread", "host:spread", images_per_prompt=2),
    ),
    eval=(
      EvalConfig(
        "green", str(folder / "prompts.txt"), f"host:{folder / 'rewards.py'}:green", images=8
      ),
    ),
    iterations=3,
    fsdp=4,
    max_nan_share=1.0,
    checkpoint_every=1,
  )


@pytest.fixture(scope="module")
def nursery():
  made = forked_cases.Nursery(cases.environment_of_runs())
  yield made
  made.close()


def launch(
  nursery: forked_cases.Nursery, config: Config, said: pathlib.Path, broken: str
) -> list[tuple[int, str]]:
  """(exit status, stderr) of two processes, of which the second has a mistake in its reward."""
  both = [f"--coordinator=127.0.0.1:{forked_cases.free_port()}", "--num_processes=2"]
  both += ["--cpu_devices=2", f"--process_timeout_s={TIMEOUT_S}"]
  command = [cases.ROOT / "launch" / "train.py", *cases.flags(config), *both]
  started = [
    nursery.start(
      [*command, f"--process_id={i}"],
      said.with_name(f"{said.name}_{i}"),
      BROKEN=broken if i else "",
    )
    for i in range(2)
  ]
  try:
    return [(process.wait(timeout=600), process.errors()) for process in started]
  finally:
    for process in started:
      process.kill()


def names(workdir: pathlib.Path) -> list[str]:
  return [path.name for path in (workdir / "checkpoints").glob("iteration_*")]


def assert_close(name, found, expected):
  """Up to the order of float32 sums, which a gradient shows most.

  Rewards here are some 50 times their standard deviation, by which they are divided, and a
  gradient is a sum that nearly cancels: Adam's moments differ by up to 3e-5 of their largest value
  where the parameters differ by 5e-6.
  """
  part = 1e-4 if name[0].key == "opt" else 1e-5
  largest = np.abs(expected).max(initial=0)
  where = jax.tree_util.keystr(name)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=part * largest, err_msg=where)


def test_a_run_is_the_same_on_any_number_of_processes_and_survives_them(folder, nursery, tmp_path):
  config = settings(folder, tmp_path / "run")
  workdir = tmp_path / "run"

  # Its fourth call, after one of the evaluation, is in the last iteration.
  first, second = launch(nursery, config, tmp_path / "first", broken="dies@4")
  assert second[0] == -signal.SIGKILL, second
  assert first[0] == 1 and "Traceback" not in first[1], first
  said = [line for line in first[1].splitlines() if line.startswith("error: ")]
  assert len(said) == 1 and said[0].startswith("error: process 1 ("), first
  assert "iteration_1" in names(workdir) or "iteration_2" in names(workdir)

  # A signal that one of them gets stops both after the task of which it is the reward.
  for status, said in launch(nursery, config, tmp_path / "second", broken="stops@1"):
    assert status == 0, said
  stopped = sorted(names(workdir))[-1]
  assert stopped in ("iteration_1_task_1", "iteration_2_task_1")

  cases.run(config, devices=4)
  alone = tmp_path / "alone"
  cases.run(fields.replace(config, workdir=str(alone)), devices=4)

  jax.tree_util.tree_map_with_path(
    assert_close, cases.final_state(workdir), cases.final_state(alone)
  )
  found, expected = (cases.reproducible(cases.metrics(w)) for w in (workdir, alone))
  assert len(found) == 3
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name, value in other.items():
      if name.startswith("ratio/"):  # is rounding, and nothing else
        assert one[name] < 1e-5, name
        continue
      np.testing.assert_allclose(one[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
