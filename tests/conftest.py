"""Every test sees 8 CPU devices. Runs before anything imports jax."""

import os

# As few threads as `cpu.split_host` makes do with; JAX's own two are too few for 8 devices.
os.environ["PJRT_NPROC"] = "8"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests count compilations and compare programs; what an earlier run left must not matter.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
