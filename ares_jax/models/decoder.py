"""The text decoder: whole sequences to train and score, prefill and single steps to sample.

P prompts, B rows, T tokens, S cached tokens, L layers, D embed, N query heads, K kv heads, H head
size. All functions are pure; jit them at the caller's boundary with the config static.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models.attention import attention
from ares_jax.models.config import ModelConfig
from ares_jax.models.layers import (
  MASKED,
  adapted,
  project,
  rms_norm,
  rotary,
  rotate,
  scan_blocks,
  swiglu,
)
from ares_jax.models.weights import Params
from ares_jax.system.mesh import ROWS, shard


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
  return shard(rms_norm(x, params["final_norm"], config.norm_eps), ROWS)


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


def empty_cache(config: ModelConfig, rows: int, slots: int) -> KVCache:
  """Room for `slots` tokens of `rows` rows that have read nothing yet."""
  shape = config.layers, rows, slots, config.kv_heads, config.head_dim
  zeros = jnp.zeros(shape, config.compute_dtype)
  return KVCache(k=zeros, v=zeros, length=jnp.zeros(rows, jnp.int32))


def decode_step(config: ModelConfig, params: Params, embeds_B1D, positions_3B1, prompts: KVCache,
                query_B, cache: KVCache, *, group: int, live: int) -> tuple[jax.Array, KVCache]:
  """Reads one more token per row, after a prompt that up to G rows share.

  Keys and values of a prompt are there once and are read once, for the queries of all its rows.
  Each layer writes its new keys and values before it reads the cache, so every read precedes the
  next write and a `lax.while_loop` that carries the cache updates it in place: nothing of its size
  is copied.

  Args:
    config: sizes.
    params: the weights.
    embeds_B1D: embeddings of the new tokens.
    positions_3B1: int32, their M-RoPE positions.
    prompts: what `prefill` returned.
    query_B: int32, p * G + g for a row that continues prompt p, all different; P * G for an idle
      row, whose result means nothing.
    cache: keys and values of what each row read after its prompt. A row with no slot left is not
      written and its result means nothing.
    group: G.
    live: slots that are read; a row's length must be below it.

  Returns:
    Hidden states [B, D] after the final norm, and the cache with length + 1.
  """
  cos_sin = _mrope(config, positions_3B1)
  heads = config.kv_heads, config.heads // config.kv_heads, config.head_dim
  row = jnp.arange(cache.k.shape[1])
  seen_PS = jnp.arange(prompts.k.shape[2]) < prompts.length[:, None]
  seen_BS = jnp.arange(live) <= cache.length[:, None]

  def block(carry, layer):
    x_B1D, k_LBSKH, v_LBSKH = carry
    weights, (k_PSKH, v_PSKH), index = layer
    q, k, v = _qkv(config, weights, x_B1D, cos_sin)
    k_LBSKH = k_LBSKH.at[index, row, cache.length].set(k[:, 0], mode="drop")
    v_LBSKH = v_LBSKH.at[index, row, cache.length].set(v[:, 0], mode="drop")
    q_BKQH = q.reshape(-1, *heads) * config.head_dim**-0.5
    of_prompt = _attend_prompts(q_BKQH, k_PSKH, v_PSKH, seen_PS, query_B, group)
    of_response = _attend(q_BKQH, k_LBSKH[index, :, :live], v_LBSKH[index, :, :live], seen_BS)
    mixed = _join(of_prompt, of_response).astype(x_B1D.dtype).reshape(q.shape)
    x_B1D = _mlp(config, weights, x_B1D + _out(weights, mixed))
    return (x_B1D, k_LBSKH, v_LBSKH), None

  (x, k, v), _ = scan_blocks(
    block, (embeds_B1D, cache.k, cache.v),
    (params["blocks"], (prompts.k, prompts.v), np.arange(config.layers)),
    remat="none", unroll=config.unroll)
  return (rms_norm(x[:, 0], params["final_norm"], config.norm_eps),
          KVCache(k=k, v=v, length=cache.length + 1))


def _blocks(config, params, embeds_BTD, positions_3BT, segment_BT, *, keep_kv):
  cos_sin = _mrope(config, positions_3BT)
  # Prompts are short, and nothing is kept for a backward pass: by plan of a prefill of 7B on 16 x 4
  # chips splitting their tokens would send 6 times as much.
  between = (lambda x: x) if keep_kv else _split_tokens

  def block(x_BTD, weights):
    x_BTD = between(x_BTD)
    q, k, v = _qkv(config, weights, x_BTD, cos_sin)
    mixed = attention(q, k, v, segment_BT=segment_BT, segment_BS=segment_BT, causal=True)
    x_BTD = between(x_BTD + _out(weights, mixed))
    return between(_mlp(config, weights, x_BTD)), (k, v) if keep_kv else None

  return scan_blocks(block, embeds_BTD, params["blocks"], remat=config.remat,
                     unroll=config.unroll)


def _split_tokens(x_BTD):
  """The residual stream with a row's tokens split over "model", where they divide.

  The MLP splits its width over it instead, and attention its heads where they divide: tokens are
  gathered before and scattered behind. A row is then kept for the backward pass by all of those
  devices together: of 20480 tokens 28 blocks of 7B keep 3.8 GiB. By plan of its update on 16 x 4
  chips 1.4 times as much is sent as where every device has all tokens, half as much goes to memory
  and back, and 3.1 GiB less is held.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape["model"]
  return shard(x_BTD, ROWS, "model" if x_BTD.shape[1] % parts == 0 else None)


def _mrope(config: ModelConfig, positions_3BT):
  """Rotary angles whose frequencies are split between time, height and width."""
  frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
  axis = np.repeat(np.arange(3), config.mrope_sections)
  # [B, T, H/2]: each frequency picks its own axis's position.
  position = jnp.moveaxis(positions_3BT, 0, -1)[..., axis].astype(jnp.float32)
  return rotary(position * np.float32(frequency))


def _qkv(config, weights, x, cos_sin):
  x = rms_norm(x, weights["attention_norm"], config.norm_eps)
  q, k, v = (adapted(x, weights, name) for name in ("q", "k", "v"))
  return rotate(q, cos_sin), rotate(k, cos_sin), v


def _out(weights, mixed_BTNH):
  out = jnp.einsum("btnh,nhd->btd", mixed_BTNH, weights["o"].astype(mixed_BTNH.dtype))
  pair = weights.get("o_lora")
  if pair is None:
    return out
  low = jnp.einsum("btnh,nhr->btr", mixed_BTNH, pair["a"].astype(mixed_BTNH.dtype))
  return out + project(low, pair["b"])


def _mlp(config, weights, x):
  return x + swiglu(rms_norm(x, weights["mlp_norm"], config.norm_eps), weights)


def _attend(q_BKQH, k_BSKH, v_BSKH, seen_BS):
  """Attention to a part of the keys: (mixed, sum of weights, largest score), not normalised."""
  scores = jnp.einsum("bkqh,bskh->bkqs", q_BKQH, k_BSKH, preferred_element_type=jnp.float32)
  scores = jnp.where(seen_BS[:, None, None], scores, MASKED)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  mixed = jnp.einsum("bkqs,bskh->bkqh", weights.astype(v_BSKH.dtype), v_BSKH,
                     preferred_element_type=jnp.float32)
  return mixed, weights.sum(-1, keepdims=True), largest


def _attend_prompts(q_BKQH, k_PSKH, v_PSKH, seen_PS, query_B, group):
  """`_attend` of each row to its prompt: queries of a prompt's rows meet its keys in one matmul."""
  prompts, (_, kv_heads, queries, head_dim) = len(k_PSKH), q_BKQH.shape
  table = jnp.zeros((prompts * group, *q_BKQH.shape[1:]), q_BKQH.dtype)
  table = table.at[query_B].set(q_BKQH, mode="drop").reshape(prompts, group, *q_BKQH.shape[1:])
  q_PKQH = jnp.moveaxis(table, 1, 2).reshape(prompts, kv_heads, group * queries, head_dim)

  def of_rows(x_PKQx):
    x = x_PKQx.reshape(prompts, kv_heads, group, queries, -1)
    x_RKQx = jnp.moveaxis(x, 2, 1).reshape(prompts * group, kv_heads, queries, -1)
    return x_RKQx.at[query_B].get(mode="clip")

  return [of_rows(x) for x in _attend(q_PKQH, k_PSKH, v_PSKH, seen_PS)]


def _join(first, second):
  """Attention over the keys of two parts."""
  largest = jnp.maximum(first[2], second[2])
  scale = [jnp.exp(part[2] - largest) for part in (first, second)]
  mixed, total = (first[index] * scale[0] + second[index] * scale[1] for index in (0, 1))
  return mixed / total
