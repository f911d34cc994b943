"""Every test sees 8 CPU devices. Runs before anything imports jax."""

import os

# A launch waits for a thread per device: with 2 cores and 8 devices jax's own pool deadlocks.
os.environ["PJRT_NPROC"] = "16"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests count compilations and compare programs; what an earlier run left must not matter.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
