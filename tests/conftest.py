"""Every test sees 8 CPU devices. Runs before anything imports jax."""

import gc
import importlib.metadata
import os
import pathlib
import platform
import shutil
import tempfile

# As few threads as `cpu.split_host` makes do with; JAX's own two are too few for 8 devices.
os.environ["PJRT_NPROC"] = "8"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs are kept from one test to the next, in all processes of a run of pytest: nearly all the
# time of the tests is compilation, of few different programs.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# JAX makes many objects while it traces: a quarter of that time would go into looking for garbage.
gc.set_threshold(50_000)
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # Nobody asks where an operation was written.
# Compiled in a quarter of the time: XLA optimises little, makes loops without MLIR, which later
# releases cannot, and machine code in one piece, as the other core has a test of its own.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
flags = []
if importlib.metadata.version("jaxlib").startswith("0.10."):
  flags.append("--xla_cpu_use_fusion_emitters=false")
  flags.append("--xla_cpu_parallel_codegen_split_count=1")
if platform.machine().lower() in ("x86_64", "amd64"):
  # One set of instructions for all such machines, in a little less time than with AVX-512.
  flags.append("--xla_cpu_max_isa=AVX2")
os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_collection_modifyitems(items):
  """Whole runs first: they take longest, and the last one to end would leave a core idle."""
  root = pathlib.Path(__file__).parent
  folders = root, root / "faults"
  items.sort(key=lambda item: item.path.parent not in folders and item.path.stem != "test_notebook")


def pytest_configure(config):
  if hasattr(config.option, "loadscopereorder"):
    config.option.loadscopereorder = False  # Files with most tests are not those that take longest.
  if not hasattr(config, "workerinput"):  # The one process that starts those of pytest-xdist.
    # Of this run alone: what an earlier one left must not matter.
    config.programs = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")


def pytest_unconfigure(config):
  shutil.rmtree(getattr(config, "programs", ""), ignore_errors=True)
