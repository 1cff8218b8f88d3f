"""`logprob_and_entropy` of one device's arrays: logits exist one chunk at a time, in plain XLA.

N tokens, D embed, V vocabulary; a chunk is S tokens, K of them.
"""

import jax
import jax.numpy as jnp
from jax import lax


def statistics(hidden_ND, unembed_VD, token_N, wanted_N, *, temperature, token_chunk, vocab_chunk):
  """max l, sum e^(l - max), sum (l - max) e^(l - max) and l[token], of l = logits / temperature.

  Args:
    hidden_ND, unembed_VD: floating; products in hidden's dtype.
    token_N: int32; one outside [0, V) gets the logit 0.
    wanted_N: bool, the tokens whose results mean something, or None for all.
    temperature: > 0.
    token_chunk, vocab_chunk: tokens and rows of the vocabulary of a chunk, the latter <= V.

  Returns:
    four float32 [N].
  """
  order_SK, used = _wanted_first(wanted_N, token_chunk)
  hidden_SKD, token_SK = (_in_chunks(x, token_chunk, order_SK) for x in (hidden_ND, token_N))
  size, chunks, _ = hidden_SKD.shape

  def one_chunk(chunk, found):
    hidden_SD = lax.dynamic_index_in_dim(hidden_SKD, chunk, 1, keepdims=False)
    token_S = lax.dynamic_index_in_dim(token_SK, chunk, 1, keepdims=False)

    def fold(start, rows_VD, running):
      max_S, total_S, weighted_S, chosen_S = running
      logits_SV = logits(hidden_SD, rows_VD, temperature)
      new_S = jnp.maximum(max_S, logits_SV.max(-1))
      shifted_SV = logits_SV - new_S[:, None]
      weight_SV = jnp.exp(shifted_SV)
      weighted_S, total_S = rise(weighted_S, total_S, new_S - max_S)
      weighted_S = weighted_S + (weight_SV * shifted_SV).sum(-1)
      total_S = total_S + weight_SV.sum(-1)
      return new_S, total_S, weighted_S, chosen(logits_SV, token_S - start, chosen_S)

    # A finite lowest maximum, so that the first rise is finite and times total = 0 gives 0.
    zero_S = jnp.zeros(size, jnp.float32)
    lowest_S = jnp.full(size, jnp.finfo(jnp.float32).min / 4)
    running = lowest_S, zero_S, zero_S, zero_S
    values = _over_vocab(fold, running, unembed_VD, vocab_chunk)
    return tuple(lax.dynamic_update_index_in_dim(x_SK, x_S, chunk, 1)
                 for x_SK, x_S in zip(found, values, strict=True))

  found = _over_chunks(chunks, used, one_chunk, (jnp.zeros((size, chunks), jnp.float32),) * 4)
  return tuple(_from_chunks(x, len(token_N), order_SK) for x in found)


def gradients(hidden_ND, unembed_VD, token_N, wanted_N, lse_N, entropy_N, logprob_slope_N,
              entropy_slope_N, *, temperature, token_chunk, vocab_chunk, vocab_axis, unembed_dtype):
  """Gradients in hidden and unembed from those in the log-probability and the entropy.

  Args:
    hidden_ND, unembed_VD, token_N, wanted_N, temperature, token_chunk, vocab_chunk: as in
      `statistics`.
    lse_N: float32, logsumexp of the logits over the whole vocabulary.
    entropy_N: float32, nats, likewise.
    logprob_slope_N, entropy_slope_N: float32, the loss's gradients in the two outputs; 0 for a
      token that is not wanted.
    vocab_axis: mesh axis over which hidden's gradient is summed, a chunk at a time, or None; its
      devices have the same tokens, and so as many chunks.
    unembed_dtype: dtype of the second result.

  Returns:
    [N, D] in hidden's dtype, [V, D].
  """
  known_N = token_N, lse_N, entropy_N, logprob_slope_N, entropy_slope_N
  order_SK, used = _wanted_first(wanted_N, token_chunk)
  hidden_SKD, *known_SK = (_in_chunks(x, token_chunk, order_SK) for x in (hidden_ND, *known_N))
  size, chunks, embed = hidden_SKD.shape
  # With one chunk of tokens every row of the gradient is written once: no float32 sum is needed.
  sum_dtype = jnp.float32 if chunks > 1 else unembed_dtype

  def one_chunk(chunk, carry):
    hidden_gradient_SKD, unembed_gradient_VD = carry
    hidden_SD, token_S, lse_S, entropy_S, *slopes_S = (
      lax.dynamic_index_in_dim(x, chunk, 1, keepdims=False) for x in (hidden_SKD, *known_SK))

    def fold(start, rows_VD, running):
      gradient_SD, unembed_gradient_VD = running
      rows_VD = rows_VD.astype(hidden_SD.dtype)
      logprob_SV = logits(hidden_SD, rows_VD, temperature) - lse_S[:, None]
      slope_SV = slope(logprob_SV, jnp.exp(logprob_SV), token_S - start, entropy_S, *slopes_S,
                       temperature)
      slope_SV = slope_SV.astype(hidden_SD.dtype)
      gradient_SD = gradient_SD + dot(slope_SV, rows_VD, "nv,vd->nd")
      part_VD = dot(slope_SV, hidden_SD, "nv,nd->vd")
      if chunks > 1:
        part_VD += lax.dynamic_slice_in_dim(unembed_gradient_VD, start, rows_VD.shape[0], 0)
      return gradient_SD, lax.dynamic_update_slice_in_dim(
        unembed_gradient_VD, part_VD.astype(sum_dtype), start, 0)

    zero_SD = jnp.zeros((size, embed), jnp.float32)
    gradient_SD, unembed_gradient_VD = _over_vocab(fold, (zero_SD, unembed_gradient_VD),
                                                   unembed_VD, vocab_chunk)
    if vocab_axis:
      gradient_SD = lax.psum(gradient_SD, vocab_axis)
    gradient_SD = gradient_SD.astype(hidden_SKD.dtype)
    return (lax.dynamic_update_index_in_dim(hidden_gradient_SKD, gradient_SD, chunk, 1),
            unembed_gradient_VD)

  carry = jnp.zeros_like(hidden_SKD), jnp.zeros(unembed_VD.shape, sum_dtype)
  hidden_gradient_SKD, unembed_gradient_VD = _over_chunks(chunks, used, one_chunk, carry)
  return (_from_chunks(hidden_gradient_SKD, len(token_N), order_SK),
          unembed_gradient_VD.astype(unembed_dtype))


def _wanted_first(wanted_N, token_chunk):
  """Tokens of each chunk, so that those wanted fill the first ones, and how many chunks they fill.

  None, None where all are wanted. Numbers from N on are padding.
  """
  if wanted_N is None:
    return None, None
  tokens = len(wanted_N)
  chunks = -(-tokens // token_chunk)
  size = -(-tokens // chunks)
  order_N = jnp.argsort(~wanted_N, stable=True)
  order_N = jnp.pad(order_N, (0, size * chunks - tokens), constant_values=tokens)
  return order_N.reshape(chunks, size).T, _shared((wanted_N.sum() + size - 1) // size)


@jax.custom_batching.custom_vmap
def _shared(number):
  """`number`; under `vmap` the largest for all, as in `mesh.sum_of_slices`.

  Loops whose ends differ would choose after each pass between all that they carry, here the whole
  gradient of the unembedding, and what it was before.
  """
  return number


@_shared.def_vmap
def _largest(size, batched, number_B):
  del size, batched
  return number_B.max(), False


def _in_chunks(array, token_chunk, order_SK):
  """[N, ...] as [S, K, ...], padded with 0, in the order given.

  Without one token i*K + j is in chunk j, so that each chunk takes some tokens of every device
  where N is sharded without `axes`.
  """
  if order_SK is not None:
    return array.at[order_SK].get(mode="fill", fill_value=0)
  chunks = -(-array.shape[0] // token_chunk)
  padding = [(0, -array.shape[0] % chunks)] + [(0, 0)] * (array.ndim - 1)
  return jnp.pad(array, padding).reshape(-1, chunks, *array.shape[1:])


def _from_chunks(array_SK, tokens, order_SK):
  """Undoes `_in_chunks`: [S, K, ...] back to [N, ...]."""
  rest = array_SK.shape[2:]
  if order_SK is None:
    return array_SK.reshape(-1, *rest)[:tokens]
  return jnp.zeros((tokens, *rest), array_SK.dtype).at[order_SK].set(array_SK, mode="drop")


def _over_chunks(chunks, used, body, carry):
  """carry = body(chunk, carry) over all chunks, or the `used` first ones."""
  if chunks == 1:
    return body(0, carry)
  if used is None:
    return lax.fori_loop(0, chunks, body, carry)
  # The bound that is a number is for those who count FLOPs (jaxpr_cost.py).
  return lax.while_loop(lambda state: (state[0] < chunks) & (state[0] < used),
                        lambda state: (state[0] + 1, body(*state)), (jnp.int32(0), carry))[1]


def rise(weighted_S, total_S, rise_S):
  """sum (l - max) e^(l - max) and sum e^(l - max) after the maximum rose: every term moves."""
  decay_S = jnp.exp(-rise_S)
  return decay_S * (weighted_S - rise_S * total_S), decay_S * total_S


def chosen(logits_SV, token_S, otherwise_S):
  """logits[token] where the token is one of these, else `otherwise`."""
  inside_S = (token_S >= 0) & (token_S < logits_SV.shape[1])
  index_S = jnp.clip(token_S, 0, logits_SV.shape[1] - 1)
  logit_S = jnp.take_along_axis(logits_SV, index_S[:, None], -1)[:, 0]
  return jnp.where(inside_S, logit_S, otherwise_S)


def _over_vocab(fold, running, unembed_VD, vocab_chunk):
  """running = fold(start, rows start.., running) over all rows; the last, shorter chunk alone."""
  full = unembed_VD.shape[0] // vocab_chunk

  def step(index, running):
    start = index * vocab_chunk
    rows_VD = lax.dynamic_slice_in_dim(unembed_VD, start, vocab_chunk, 0)
    return fold(start, rows_VD, running)

  running = step(0, running) if full == 1 else lax.fori_loop(0, full, step, running)
  if full * vocab_chunk < unembed_VD.shape[0]:
    running = fold(full * vocab_chunk, unembed_VD[full * vocab_chunk :], running)
  return running


def logits(hidden_ND, unembed_VD, temperature):
  logits_NV = dot(hidden_ND, unembed_VD.astype(hidden_ND.dtype), "nd,vd->nv")
  return logits_NV if temperature == 1 else logits_NV / temperature


def slope(logprob_NV, p_NV, token_N, entropy_N, logprob_slope_N, entropy_slope_N, temperature):
  """Gradient in the logits: g_logp (1[token] - p) - g_H p (ln p + H)."""
  chosen_NV = lax.broadcasted_iota(jnp.int32, logprob_NV.shape, 1) == token_N[:, None]
  constant_N = logprob_slope_N + entropy_slope_N * entropy_N
  weight_NV = constant_N[:, None] + entropy_slope_N[:, None] * logprob_NV
  slope_NV = jnp.where(chosen_NV, logprob_slope_N[:, None], 0) - p_NV * weight_NV
  return slope_NV if temperature == 1 else slope_NV / temperature


def dot(left, right, subscripts):
  return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)
