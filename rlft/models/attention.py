"""softmax(q k^T / sqrt(D)) v, by whichever implementation suits the shapes and the platform.

    xla     three operations; the logits `[B, heads, N, M]` exist in float32
    splash  a Pallas kernel for TPUs that never holds the logits; long self-attention only
    cudnn   cuDNN's fused attention for NVIDIA GPUs, in half precision only
    auto    the platform's own where it takes the shapes, xla elsewhere

For CPUs there is a form of our own, see `dispatch`. Which accelerator a program is for is known
when it is lowered, so one that is lowered on one machine for another contains what the other runs.
At 4096 tokens the logits of 32 images with 5 heads are 10.7 GB, which is why there are kernels.
"""

import functools

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
import jax.numpy as jnp

from rlft.models import dispatch
from rlft.models.cpu import ops

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

_LANES = 128  # of a TPU: the kernel wants multiples of it in heads and sequences
_LARGEST_BLOCK = 512
_SPLASH_TOKENS = 1024  # below, the logits are small and XLA's own fusion is as good
_SPLASH_HEAD = 256
_CUDNN_MULTIPLE = 8  # of the keys' length, where gradients are wanted


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  *,
  implementation: str = "auto",
) -> jax.Array:
  """Attention over `[B, N, heads, D]` queries and `[B, M, heads, D]` keys and values.

  Args:
    query, key, value: of one type, in which the products are made; logits and softmax are float32.
    mask: boolean, broadcasts to `[B, heads, N, M]`; False forbids. Only `xla` takes one.
    implementation: one of `IMPLEMENTATIONS`; shapes that it does not take go to `xla`.

  Returns:
    `[B, N, heads, D]`.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r}: choose from {IMPLEMENTATIONS}")
  arrays = query, key, value
  if implementation == "auto" and dispatch.is_for_cpus():
    own = mask is None and query.dtype == jnp.float32
    return ops.attention(*arrays) if own else xla(*arrays, mask)
  use_splash = implementation in ("auto", "splash") and mask is None and _splash_takes(query, key)
  use_cudnn = implementation in ("auto", "cudnn") and mask is None and _cudnn_takes(*arrays)
  if implementation != "auto":
    return splash(*arrays) if use_splash else cudnn(*arrays) if use_cudnn else xla(*arrays, mask)
  branches = {}
  if use_splash:
    branches["tpu"] = splash
  if use_cudnn:
    branches["cuda"] = cudnn
  if not branches:
    return xla(*arrays, mask)
  return jax.lax.platform_dependent(*arrays, default=xla, **branches)


def xla(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """See `attention`; any shapes, any platform."""
  # Heads go beside the batch by hand: XLA's CPU products are a tenth slower otherwise.
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
  logits *= query.shape[-1] ** -0.5
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum("bhnm,bhmd->bhnd", weights, value).transpose(0, 2, 1, 3)


def splash(
  query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """See `attention`; N and M multiples of 128, D is padded to one.

  Runs on the shards of one device: under a mesh, call it inside `jax.shard_map`.

  Args:
    query, key, value: as in `attention`.
    interpret: runs the kernel step by step on any platform, for tests.
  """
  features = query.shape[-1]
  query = (query.astype(jnp.float32) * features**-0.5).astype(query.dtype)

  def heads_first(x: jax.Array) -> jax.Array:
    return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0),) * 3 + ((0, -features % _LANES),))

  attend = _kernel(query.shape[2], query.shape[1], key.shape[1], interpret)
  output = jax.vmap(attend)(heads_first(query), heads_first(key), heads_first(value))
  return output[..., :features].transpose(0, 2, 1, 3)


def _kernel(heads: int, queries: int, keys: int, interpret: bool) -> kernel.SplashAttentionKernel:
  """The kernel for these sizes, in the largest blocks that divide them."""
  q, kv = _block(queries), _block(keys)
  sizes = kernel.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_q_dq=q,
    block_kv_dq=kv,
  )
  everything = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
  return kernel.make_splash_mha_single_device(everything, block_sizes=sizes, interpret=interpret)


def _block(tokens: int) -> int:
  """The largest multiple of 128 that divides `tokens`, at most 512."""
  return max(n for n in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if tokens % n == 0)


def _splash_takes(query: jax.Array, key: jax.Array) -> bool:
  tokens = query.shape[1]
  return (
    tokens == key.shape[1]
    and tokens >= _SPLASH_TOKENS
    and tokens % _LANES == 0
    and query.shape[-1] <= _SPLASH_HEAD
  )


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """See `attention`; bfloat16 or float16. Keys are padded, which costs less than an odd length."""
  length = key.shape[1]
  padding = -length % _CUDNN_MULTIPLE
  lengths = None
  if padding:
    key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (key, value))
    lengths = jnp.full((key.shape[0],), length, jnp.int32)
  return jax.nn.dot_product_attention(
    query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
  )


def _cudnn_takes(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  return half and _cudnn_traces(
    *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
  )


@functools.lru_cache
def _cudnn_traces(*arrays: jax.ShapeDtypeStruct) -> bool:
  """Whether cuDNN is installed and takes the shapes, forward and backward, on this GPU."""
  try:
    jax.eval_shape(jax.grad(lambda *x: cudnn(*x).astype(jnp.float32).sum()), *arrays)
  except (RuntimeError, NotImplementedError, ValueError):
    return False
  return True
