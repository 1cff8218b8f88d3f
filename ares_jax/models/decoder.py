"""The text decoder: whole sequences to train and score, prefill and single steps to sample.

P prompts, B rows, T tokens, S cached tokens, L layers, D embed, N query heads, K kv heads, H head
size. All functions are pure; jit them at the caller's boundary with the config static.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.mesh import shard
from ares_jax.models.attention import attention
from ares_jax.models.config import ModelConfig
from ares_jax.models.layers import (
  MASKED,
  project,
  rms_norm,
  rotary,
  rotate,
  scan_blocks,
  swiglu,
)
from ares_jax.models.weights import Params


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens read so far. Slots at `length` and behind hold anything."""

  k: jax.Array  # [L, B, S, K, H] compute dtype, rotated
  v: jax.Array  # [L, B, S, K, H] compute dtype
  length: jax.Array  # [B] int32, slots in use


def hidden(config: ModelConfig, params: Params, embeds_BTD, positions_3BT, segment_BT) -> jax.Array:
  """Hidden states of whole rows, after the final norm; logits are hidden @ unembedding^T.

  Args:
    config: sizes.
    params: the weights.
    embeds_BTD: token embeddings with image features in place.
    positions_3BT: int32, M-RoPE positions (time, height, width).
    segment_BT: int32; a token attends to earlier tokens of its own segment, 0 is padding, so
      several sequences may be packed into one row.

  Returns:
    [B, T, D] in the compute dtype; meaningless on padding.
  """
  x, _ = _blocks(config, params, embeds_BTD, positions_3BT, segment_BT, keep_kv=False)
  return rms_norm(x, params["final_norm"], config.norm_eps)


def prefill(config: ModelConfig, params: Params, embeds_PTD, positions_3PT,
            length_P) -> tuple[jax.Array, KVCache]:
  """Reads prompts and keeps their keys and values.

  Args:
    config: sizes.
    params: the weights.
    embeds_PTD: embeddings of right-padded prompts.
    positions_3PT: int32, M-RoPE positions.
    length_P: int32, tokens of each prompt, 1..T.

  Returns:
    The hidden state of each prompt's last token [P, D], after the final norm, and the cache with
    S = T slots.
  """
  real_PT = jnp.arange(embeds_PTD.shape[1]) < length_P[:, None]
  x, (k, v) = _blocks(config, params, embeds_PTD, positions_3PT, real_PT.astype(jnp.int32),
                      keep_kv=True)
  last = jnp.take_along_axis(x, (length_P - 1)[:, None, None], axis=1)[:, 0]
  return (rms_norm(last, params["final_norm"], config.norm_eps),
          KVCache(k=k, v=v, length=length_P.astype(jnp.int32)))


def decode_step(config: ModelConfig, params: Params, embeds_B1D, positions_3B1,
                cache: KVCache) -> tuple[jax.Array, KVCache]:
  """Reads one more token per row.

  Each layer writes its new keys and values before it reads the cache, so every read precedes the
  next write and a `lax.while_loop` that carries the cache updates it in place: nothing of its size
  is copied.

  Args:
    config: sizes.
    params: the weights.
    embeds_B1D: embeddings of the new tokens.
    positions_3B1: int32, their M-RoPE positions.
    cache: keys and values of the earlier tokens. A row with no slot left is not written and its
      result means nothing.

  Returns:
    Hidden states [B, D] after the final norm, and the cache with length + 1.
  """
  cos_sin = _mrope(config, positions_3B1)
  rows, slots = cache.k.shape[1:3]
  row = jnp.arange(rows)
  seen_BS = jnp.arange(slots) <= cache.length[:, None]

  def block(carry, layer):
    x_B1D, k_LBSKH, v_LBSKH = carry
    x_B1D = shard(x_B1D, "data")
    weights, index = layer
    q, k, v = _qkv(config, weights, x_B1D, cos_sin)
    k_LBSKH = k_LBSKH.at[index, row, cache.length].set(k[:, 0], mode="drop")
    v_LBSKH = v_LBSKH.at[index, row, cache.length].set(v[:, 0], mode="drop")
    mixed = _attend(q, k_LBSKH[index], v_LBSKH[index], seen_BS)
    x_B1D = _mlp(config, weights, x_B1D + _out(weights, mixed))
    return (x_B1D, k_LBSKH, v_LBSKH), None

  (x, k, v), _ = scan_blocks(
    block, (embeds_B1D, cache.k, cache.v), (params["blocks"], np.arange(config.layers)),
    remat="none", unroll=config.unroll)
  return (rms_norm(x[:, 0], params["final_norm"], config.norm_eps),
          KVCache(k=k, v=v, length=cache.length + 1))


def expand_cache(cache: KVCache, group: int, slots: int) -> KVCache:
  """Repeats every row `group` times (row b = p * group + g) and enlarges S to `slots`.

  Raises:
    ValueError: the cache has more slots than `slots`.
  """
  have = cache.k.shape[2]
  if slots < have:
    raise ValueError(f"the cache has {have} slots, {slots} were asked for; raise slots")

  def expand(x_LPSKH):
    x = jnp.pad(x_LPSKH, ((0, 0), (0, 0), (0, slots - have), (0, 0), (0, 0)))
    return jnp.repeat(x, group, axis=1)

  return KVCache(k=expand(cache.k), v=expand(cache.v), length=jnp.repeat(cache.length, group))


def _blocks(config, params, embeds_BTD, positions_3BT, segment_BT, *, keep_kv):
  cos_sin = _mrope(config, positions_3BT)

  def block(x_BTD, weights):
    x_BTD = shard(x_BTD, "data")
    q, k, v = _qkv(config, weights, x_BTD, cos_sin)
    mixed = attention(q, k, v, segment_BT=segment_BT, segment_BS=segment_BT, causal=True)
    x_BTD = _mlp(config, weights, x_BTD + _out(weights, mixed))
    return x_BTD, (k, v) if keep_kv else None

  return scan_blocks(block, embeds_BTD, params["blocks"], remat=config.remat,
                     unroll=config.unroll)


def _mrope(config: ModelConfig, positions_3BT):
  """Rotary angles whose frequencies are split between time, height and width."""
  frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
  axis = np.repeat(np.arange(3), config.mrope_sections)
  # [B, T, H/2]: each frequency picks its own axis's position.
  position = jnp.moveaxis(positions_3BT, 0, -1)[..., axis].astype(jnp.float32)
  return rotary(position * np.float32(frequency))


def _qkv(config, weights, x, cos_sin):
  x = rms_norm(x, weights["attention_norm"], config.norm_eps)
  q = project(x, weights["q"], weights["q_bias"])
  k = project(x, weights["k"], weights["k_bias"])
  v = project(x, weights["v"], weights["v_bias"])
  return rotate(q, cos_sin), rotate(k, cos_sin), v


def _out(weights, mixed_BTNH):
  return jnp.einsum("btnh,nhd->btd", mixed_BTNH, weights["o"].astype(mixed_BTNH.dtype))


def _mlp(config, weights, x):
  return x + swiglu(rms_norm(x, weights["mlp_norm"], config.norm_eps), weights)


def _attend(q_B1NH, k_BSKH, v_BSKH, seen_BS):
  """Attention of one token per row to the slots it has seen; [B, 1, N, H]."""
  rows, _, heads, head_dim = q_B1NH.shape
  kv_heads = k_BSKH.shape[2]
  q = q_B1NH.reshape(rows, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
  scores = jnp.einsum("bkgh,bskh->bkgs", q, k_BSKH, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(seen_BS[:, None, None], scores, MASKED))
  mixed = jnp.einsum("bkgs,bskh->bkgh", weights.astype(v_BSKH.dtype), v_BSKH)
  return mixed.reshape(rows, 1, heads, head_dim)
