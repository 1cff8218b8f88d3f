"""The text decoder: complete sequences for training and scoring, prefill and steps for sampling.

P prompts, B rows, T tokens, L layers, D embed, N query heads, K kv heads, H head
size. All functions are pure; jit them at the caller's boundary with the config static.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models import paged
from ares_jax.models.attention import attention
from ares_jax.models.config import ModelConfig
from ares_jax.models.layers import (
  adapted,
  project,
  rms_norm,
  rotary,
  rotate,
  scan_blocks,
  swiglu,
)
from ares_jax.models.paged import Pages, Reads
from ares_jax.models.weights import Params
from ares_jax.system.mesh import ROWS, shard


def hidden(config: ModelConfig, params: Params, embeds_BTD, positions_3BT, segment_BT,
           prompt_BT=None) -> jax.Array:
  """Hidden states of complete rows, after the final norm; logits are hidden @ unembedding^T.

  Args:
    config, params: sizes and weights.
    embeds_BTD: from `qwen25_vl.embed`, image features included; with DeepStack they are wider, D
      for the residual stream and D for what is added behind each of the first blocks.
    positions_3BT: int32, M-RoPE positions (time, height, width).
    segment_BT: int32, the sequence of each token in its row, 0 for padding; a token attends to
      earlier tokens of its segment.
    prompt_BT: int32, another segment to which it attends, as in `attention`; None = no token does.

  Returns:
    [B, T, D] in the compute dtype; meaningless for padding.
  """
  x, _ = _blocks(config, params, embeds_BTD, positions_3BT, segment_BT, prompt_BT, keep_kv=False)
  return shard(rms_norm(x, params["final_norm"], config.norm_eps), ROWS)


def prefill(config: ModelConfig, params: Params, embeds_PTD, positions_3PT,
            length_P) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Reads prompts and returns their keys and values.

  Args:
    config, params: sizes and weights.
    embeds_PTD: embeddings of right-padded prompts, as in `hidden`.
    positions_3PT: int32, M-RoPE positions.
    length_P: int32, tokens of each prompt, 1..T.

  Returns:
    The hidden state of each prompt's last token [P, D], after the final norm, then the rotated keys
    and the values [L, P, T, K, H], meaningless from `length` on.
  """
  real_PT = jnp.arange(embeds_PTD.shape[1]) < length_P[:, None]
  x, (k, v) = _blocks(config, params, embeds_PTD, positions_3PT, real_PT.astype(jnp.int32), None,
                      keep_kv=True)
  last = jnp.take_along_axis(x, (length_P - 1)[:, None, None], axis=1)[:, 0]
  return rms_norm(last, params["final_norm"], config.norm_eps), k, v


def decode_step(config: ModelConfig, params: Params, embeds_B1D, positions_3B1, pages: Pages,
                reads: Reads) -> tuple[jax.Array, Pages]:
  """Reads one more token per row.

  Each layer writes its new keys and values before it reads the pages. Every read thus precedes the
  next write, so a `lax.while_loop` that carries the pages updates them in place, without a copy.

  Args:
    config, params: sizes and weights.
    embeds_B1D: embeddings of the new tokens.
    positions_3B1: int32, their M-RoPE positions.
    pages: keys and values.
    reads: which of them each row reads, and where it writes.

  Returns:
    Hidden states [B, D] after the final norm, meaningless for idle rows, and the pages.
  """
  cos_sin = _mrope(config, positions_3B1)
  heads = config.kv_heads, config.heads // config.kv_heads, config.head_dim
  pages_of_layer = pages.k.shape[1] // config.layers

  def block(carry, layer):
    x_B1D, pages = carry
    weights, first, scales = layer
    of_layer = reads.replace(scales=scales)
    q, k, v = _qkv(config, weights, x_B1D, cos_sin)
    pages = paged.write_token(pages, of_layer, first, k[:, 0], v[:, 0])
    q_BKQH = q.reshape(-1, *heads) * config.head_dim**-0.5
    mixed = paged.attend(q_BKQH, pages, of_layer, first).astype(x_B1D.dtype).reshape(q.shape)
    x_B1D = _mlp(config, weights, x_B1D + _out(weights, mixed))
    return (x_B1D, pages), None

  (x, pages), _ = scan_blocks(
    block, (embeds_B1D, pages),
    (params["blocks"], pages_of_layer * np.arange(config.layers, dtype=np.int32), reads.scales),
    remat="none", unroll=config.unroll)
  return rms_norm(x[:, 0], params["final_norm"], config.norm_eps), pages


def _blocks(config, params, embeds_BTD, positions_3BT, segment_BT, prompt_BT, *, keep_kv):
  cos_sin = _mrope(config, positions_3BT)
  # A prefill does not split tokens: prompts are short and no activations are kept for a backward
  # pass. For 7B on 16 x 4 chips the plan says that splitting would send 6 times as much.
  between = (lambda x: x) if keep_kv else _split_tokens
  embeds_BTD, *deep = jnp.split(embeds_BTD, embeds_BTD.shape[-1] // config.embed, axis=-1)
  # Constants of the scan: a scan of its own for the first blocks would copy the others' weights.
  deep_nBTD = jnp.stack([between(each) for each in deep]) if deep else None
  index = np.arange(config.layers) if deep else None

  def block(x_BTD, layer):
    weights, index = layer
    x_BTD = between(x_BTD)
    q, k, v = _qkv(config, weights, x_BTD, cos_sin)
    mixed = attention(q, k, v, segment_BT=segment_BT, prompt_BT=prompt_BT, causal=True)
    x_BTD = between(x_BTD + _out(weights, mixed))
    x_BTD = _mlp(config, weights, x_BTD)
    if deep:
      added_BTD = deep_nBTD[jnp.minimum(index, len(deep) - 1)]
      x_BTD += jnp.where(index < len(deep), added_BTD, 0)
    return between(x_BTD), (k, v) if keep_kv else None

  return scan_blocks(block, embeds_BTD, (params["blocks"], index), remat=config.remat,
                     unroll=config.unroll)


def _split_tokens(x_BTD):
  """The residual stream with "model" splitting the tokens of a row, if it divides them.

  In the MLP "model" splits the width, and in attention the heads if it divides them; tokens are
  gathered before and scattered after. So each device keeps only its tokens of a row for the
  backward pass: 28 blocks of 7B keep 3.8 GiB for 20480 tokens. For an update on 16 x 4 chips the
  plan says that 1.4 times as much is sent as with all tokens on every device, that half as much
  memory is read and written, and that 3.1 GiB less is held.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape["model"]
  return shard(x_BTD, ROWS, "model" if x_BTD.shape[1] % parts == 0 else None)


def _mrope(config: ModelConfig, positions_3BT):
  """Rotary angles whose frequencies are split between time, height and width."""
  frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
  axis = np.repeat(np.arange(3), config.mrope_sections)
  if config.mrope_interleaved:
    # Frequency i turns with axis i % 3 as long as that axis has frequencies, then with time.
    index = np.arange(config.head_dim // 2)
    axis = np.where(index < 3 * np.take(config.mrope_sections, index % 3), index % 3, 0)
  # [B, T, H/2]: each frequency uses the position along its axis.
  position = jnp.moveaxis(positions_3BT, 0, -1)[..., axis].astype(jnp.float32)
  return rotary(position * np.float32(frequency))


def _qkv(config, weights, x, cos_sin):
  x = rms_norm(x, weights["attention_norm"], config.norm_eps)
  q, k, v = (adapted(x, weights, name) for name in ("q", "k", "v"))
  if config.qk_norm:
    q = rms_norm(q, weights["q_norm"], config.norm_eps)
    k = rms_norm(k, weights["k_norm"], config.norm_eps)
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
