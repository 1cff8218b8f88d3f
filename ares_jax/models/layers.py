"""Layers that the decoder and the vision tower use: norm, rotary embedding, MLP, scan.

D width, H head size, F mlp, L layers. Activations have the compute dtype; statistics of norms and
softmax are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Finite, so that a query which may attend to nothing gets a uniform softmax, not NaN.
MASKED = -1e30


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32; the result has x's dtype."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale).astype(x.dtype) * weight_D.astype(x.dtype)


def layer_norm(x: jax.Array, weight_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
  """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32.

  The result has x's dtype.
  """
  x32 = x.astype(jnp.float32)
  x32 -= jnp.mean(x32, axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale * weight_D.astype(jnp.float32)
          + bias_D.astype(jnp.float32)).astype(x.dtype)


def rotary(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin, float32, of the angles [..., H/2], with an axis for the heads: [..., 1, H/2]."""
  return jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]


def rotate(x: jax.Array, rotary_cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates feature i of the first half with feature i of the second half of each head of x.

  x is [..., heads, H]; `rotary` gives the cosines and sines, [..., 1, H/2] each.
  """
  cos, sin = rotary_cos_sin
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin],
                         axis=-1).astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """x [..., D] times weight [D, ...], plus bias; both are cast to x's dtype here."""
  y = jnp.tensordot(x, weight.astype(x.dtype), axes=1)
  return y if bias is None else y + bias.astype(x.dtype)


def adapted(x: jax.Array, weights: dict[str, Any], name: str) -> jax.Array:
  """`project` with matrix `name`, and with its bias and its adapter (lora.py) if it has them."""
  y = project(x, weights[name], weights.get(f"{name}_bias"))
  pair = weights.get(f"{name}_lora")
  return y if pair is None else y + project(project(x, pair["a"]), pair["b"])


def swiglu(x: jax.Array, weights: dict[str, Any]) -> jax.Array:
  """(silu(x gate) * (x up)) down, with biases and adapters if the weights have them."""
  gate, up = adapted(x, weights, "gate"), adapted(x, weights, "up")
  return adapted(jax.nn.silu(gate) * up, weights, "down")


def scan_blocks(block: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: jax.Array,
                per_layer: Any, *, remat: str, unroll: int) -> tuple[jax.Array, Any]:
  """Applies `block(x, layer) -> (x, result)` for each slice of `per_layer` along its leading axis.

  `remat`: "none" keeps every intermediate for the backward pass, "block" only the input of each
  block, "dots" also the results of matmuls with weights. `unroll`: layers per iteration.

  Returns:
    The last x and the results stacked on a leading axis.
  """
  if remat == "block":
    block = jax.checkpoint(block)
  elif remat == "dots":
    block = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
  layers = jax.tree.leaves(per_layer)[0].shape[0]
  return jax.lax.scan(block, x, per_layer, unroll=min(unroll, layers))
