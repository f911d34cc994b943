"""Traces of the profiler: kinds of kernels by their names, shares, idle time."""

import types

import jax
import jax.numpy as jnp
import pytest

from rlft.performance.accelerator import profile
from rlft.performance.accelerator.profile import Event, Trace

# Names as cuDNN, cuBLAS, NCCL and XLA give them.
KERNELS = {
  "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob": "attention",
  "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention",
  "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128": "convolutions",
  "cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized>": "convolutions",
  "void cudnn::ops::nchwToNhwcKernel<float, float, float, false>": "copies and layouts",
  "MemcpyD2D": "copies and layouts",
  "loop_transpose_fusion_12": "copies and layouts",
  "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT": "matrix products",
  "gemm_fusion_dot_351": "matrix products",
  "input_reduce_fusion_7": "reductions: norms, softmax",
  "loop_convert_fusion": "elementwise",
  "loop_add_fusion_3": "elementwise",
  "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
  "redzone_checker": "others",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kinds(name):
  assert profile.kind_of(name) == KERNELS[name]


def test_shares_and_idle_time():
  events = [
    Event("nvjet_a", 0, 30),
    Event("nvjet_b", 20, 20),  # At the same time, in another stream.
    Event("loop_add_fusion", 60, 40),
    Event("nvjet_b", 140, 10),
  ]
  products, elementwise = profile.by_kind(events)
  assert (products.name, products.share) == ("matrix products", 0.6)
  assert products.note == "nvjet_a 30%, nvjet_b 30%"
  assert (elementwise.name, elementwise.share) == ("elementwise", 0.4)
  assert profile.busy(Trace(events, seconds=180e-9)) == pytest.approx(90 / 180)


def test_a_trace_of_this_machine():
  program = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: jnp.sin(x @ x), x).sum())
  x = jnp.ones((256, 256))
  program(x)
  result, trace = profile.record(lambda: program(x))
  assert result.shape == ()
  names = [event.name for event in trace.events]
  assert any(name.startswith(("sin", "wrapped_sin")) for name in names), names
  assert not any("while" in name for name in names)  # Which hold the others.
  assert sum(kind.share for kind in profile.by_kind(trace.events)) == pytest.approx(1)
  assert 0 < profile.busy(trace) <= 1


def _line(name, *events):
  made = [types.SimpleNamespace(name=one, start_ns=0.0, duration_ns=5.0) for one in events]
  return types.SimpleNamespace(name=name, events=made)


@pytest.mark.parametrize(
  ("plane", "lines", "found"),
  [
    ("/device:GPU:0", [_line("Stream #7(Compute)", "a"), _line("XLA Ops", "a")], ["a"]),
    ("/device:TPU:0", [_line("XLA Ops", "a", "%while.3"), _line("Steps", "1")], ["a"]),
    ("/host:CPU", [_line("tf_XLAEigen/1", "a", "end: a"), _line("python", "b")], ["a"]),
    ("/host:CPU", [_line("python", "b")], []),
  ],
)
def test_an_event_is_counted_once(plane, lines, found):
  data = types.SimpleNamespace(planes=[types.SimpleNamespace(name=plane, lines=lines)])
  assert [event.name for event in profile._events(data)] == found
