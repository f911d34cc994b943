"""The optimizer of the policy: AdamW after clipping the global norm, with a constant rate."""

import optax


def make_optimizer(
  *,
  learning_rate: float,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  max_grad_norm: float,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter, 1711.05101); `max_grad_norm` 0 does not clip."""
  clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
  return optax.chain(
    clip, optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  )
