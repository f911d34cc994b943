"""Colours as eyes see them."""

import jax
import jax.numpy as jnp
import numpy as np


def cielab(rgb: jax.Array) -> jax.Array:
  """sRGB to CIELAB with the white of D65 (IEC 61966-2-1 and CIE 15).

  Args:
    rgb: `[..., 3]` in [0, 1].

  Returns:
    `[..., 3]`: lightness L* in [0, 100], a* (green to red), b* (blue to yellow).
  """
  linear = jnp.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  to_xyz = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
  )
  xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T  # relative to white
  f = jnp.where(xyz > 216 / 24389, jnp.cbrt(xyz), xyz * (24389 / 27 / 116) + 16 / 116)
  x, y, z = f[..., 0], f[..., 1], f[..., 2]
  return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def typology_angle(lab: jax.Array) -> jax.Array:
  """ITA in degrees, in (-90, 90), of CIELAB colours `[..., 3]` with b* > 0 -> `[...]`."""
  return jnp.degrees(jnp.arctan2(lab[..., 0] - 50, jnp.maximum(lab[..., 2], 0.1)))
