"""Entropy of every token, and its log-probability straight from hidden states.

B rows, T tokens of a row, N = B*T tokens, D embed, V vocabulary; c suffixes mark one chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames="temperature")
def token_entropy(logits_BTV, *, temperature=1.0):
  """Entropy over the whole vocabulary, H = -sum_j p_j ln p_j (paper eq. 3).

  Never negative: with z = logits - max it is ln sum e^z - sum z e^z / sum e^z, two terms >= 0.

  Args:
    logits_BTV: [..., V] floating; -inf marks tokens that cannot be drawn.
    temperature: p = softmax(logits / temperature), > 0.

  Returns:
    entropy_BT: [...] float32, nats.

  Raises:
    ValueError: no vocabulary axis, a dtype that is not floating, temperature <= 0.

  >>> import numpy as np
  >>> print(token_entropy(np.float32([[[0, 0], [0, -np.inf]]])))
  [[0.6931472 0.       ]]
  """
  if logits_BTV.ndim < 1 or logits_BTV.shape[-1] == 0:
    raise ValueError(f"logits have shape {logits_BTV.shape}; the last axis must be the vocabulary")
  _check_floating(logits_BTV=logits_BTV)
  _check_positive(temperature=temperature)
  logits_BTV = logits_BTV.astype(jnp.float32) / temperature
  shifted_BTV = logits_BTV - lax.stop_gradient(logits_BTV.max(-1, keepdims=True))
  weight_BTV = jnp.exp(shifted_BTV)
  # 0 * -inf is nan: a token without probability counts 0, in the gradient too.
  shifted_BTV = jnp.where(weight_BTV > 0, shifted_BTV, 0)
  total_BT = weight_BTV.sum(-1)
  return jnp.log(total_BT) - (weight_BTV * shifted_BTV).sum(-1) / total_BT


@functools.partial(jax.jit, static_argnames=("temperature", "token_chunk", "vocab_chunk"))
def logprob_and_entropy(
  hidden_ND, unembed_VD, token_N, *, temperature=1.0, token_chunk=2048, vocab_chunk=4096
):
  """ln pi(token) and entropy (paper eq. 3) of softmax(hidden @ unembed^T / temperature).

  The logits exist one chunk of tokens x vocabulary at a time, in the forward and in the backward
  pass: maximum, sum and weighted sum run along, and gradients recompute each chunk (only what
  fits in a single chunk is kept for them). Both outputs are differentiable in hidden and unembed.

  Args:
    hidden_ND: floating; products are taken in this dtype and summed in float32.
    unembed_VD: floating; cast to hidden's dtype chunk by chunk.
    token_N: integers in [0, V); others give a meaningless log-probability.
    temperature: divides the logits, > 0.
    token_chunk, vocab_chunk: a chunk holds at most their product of logits; where the vocabulary
      is smaller than vocab_chunk it holds more tokens instead. Both count tokens of the whole
      array: when N is sharded over devices, multiply token_chunk by their number.

  Returns:
    logprob_N: float32, nats.
    entropy_N: float32, nats, >= 0.

  Raises:
    ValueError: shapes that do not fit, wrong dtypes, temperature or chunks not positive.

  >>> import numpy as np
  >>> hidden_ND, unembed_VD = np.zeros((1, 3), np.float32), np.ones((4, 3), np.float32)
  >>> logprob_N, entropy_N = logprob_and_entropy(hidden_ND, unembed_VD, np.int32([2]))
  >>> print(logprob_N, entropy_N)                                  # uniform over 4: ln 4 = 1.386
  [-1.3862944] [1.3862944]
  """
  if hidden_ND.ndim != 2 or unembed_VD.ndim != 2 or token_N.shape != hidden_ND.shape[:1]:
    raise ValueError(
      f"hidden {hidden_ND.shape}, unembed {unembed_VD.shape}, token {token_N.shape}: "
      "need [N, D], [V, D], [N]; flatten batch and time first"
    )
  if hidden_ND.shape[1] != unembed_VD.shape[1] or unembed_VD.shape[0] == 0:
    raise ValueError(
      f"hidden {hidden_ND.shape} and unembed {unembed_VD.shape} must share D and V must be >= 1; "
      "pass the unembedding as [V, D]"
    )
  _check_floating(hidden_ND=hidden_ND, unembed_VD=unembed_VD)
  if not jnp.issubdtype(token_N.dtype, jnp.integer):
    raise ValueError(f"token_N has dtype {token_N.dtype}; pass integers")
  _check_positive(temperature=temperature, token_chunk=token_chunk, vocab_chunk=vocab_chunk)
  tokens, vocab = hidden_ND.shape[0], unembed_VD.shape[0]
  if tokens == 0:
    return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.float32)
  token_N = token_N.astype(jnp.int32)
  if tokens * vocab <= token_chunk * vocab_chunk:
    return _whole(temperature, hidden_ND, unembed_VD, token_N)
  # Token i*chunks + j is in chunk j: each chunk takes some tokens of every device.
  chunks = -(-tokens // max(token_chunk, token_chunk * vocab_chunk // vocab))
  padding = -tokens % chunks
  hidden_SKD = jnp.pad(hidden_ND, ((0, padding), (0, 0))).reshape(-1, chunks, hidden_ND.shape[1])
  token_SK = jnp.pad(token_N, (0, padding)).reshape(-1, chunks)
  logprob_SK, entropy_SK = _chunked(
    temperature, min(vocab, vocab_chunk), hidden_SKD, unembed_VD, token_SK
  )
  return logprob_SK.reshape(-1)[:tokens], entropy_SK.reshape(-1)[:tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(temperature, hidden_ND, unembed_VD, token_N):
  return _whole_forward(temperature, hidden_ND, unembed_VD, token_N)[0]


def _whole_forward(temperature, hidden_ND, unembed_VD, token_N):
  logits_NV = _logits(hidden_ND, unembed_VD, temperature)
  shifted_NV = logits_NV - logits_NV.max(-1, keepdims=True)
  weight_NV = jnp.exp(shifted_NV)
  total_N = weight_NV.sum(-1)
  log_total_N = jnp.log(total_N)
  entropy_N = log_total_N - (weight_NV * shifted_NV).sum(-1) / total_N
  logprob_NV = shifted_NV - log_total_N[:, None]
  logprob_N = jnp.take_along_axis(logprob_NV, token_N[:, None], -1)[:, 0]
  p_NV = weight_NV / total_N[:, None]
  return (logprob_N, entropy_N), (hidden_ND, unembed_VD, token_N, logprob_NV, p_NV, entropy_N)


def _whole_backward(temperature, kept, gradients):
  hidden_ND, unembed_VD, token_N, logprob_NV, p_NV, entropy_N = kept
  slope_NV = _slope(logprob_NV, p_NV, token_N, entropy_N, *gradients, temperature)
  slope_NV = slope_NV.astype(hidden_ND.dtype)
  hidden_gradient_ND = _dot(slope_NV, unembed_VD.astype(hidden_ND.dtype), "nv,vd->nd")
  unembed_gradient_VD = _dot(slope_NV, hidden_ND, "nv,nd->vd")
  return (
    hidden_gradient_ND.astype(hidden_ND.dtype),
    unembed_gradient_VD.astype(unembed_VD.dtype),
    None,
  )


_whole.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(temperature, vocab_chunk, hidden_SKD, unembed_VD, token_SK):
  """`_whole` for K chunks of S tokens, each a loop over chunks of the vocabulary."""
  return _chunked_forward(temperature, vocab_chunk, hidden_SKD, unembed_VD, token_SK)[0]


def _chunked_forward(temperature, vocab_chunk, hidden_SKD, unembed_VD, token_SK):
  size, chunks, _ = hidden_SKD.shape

  def one_chunk(chunk):
    hidden_SD = lax.dynamic_index_in_dim(hidden_SKD, chunk, 1, keepdims=False)
    token_S = lax.dynamic_index_in_dim(token_SK, chunk, 1, keepdims=False)

    def fold(start, rows_VD, running):
      max_S, total_S, weighted_S, chosen_S = running
      logits_SV = _logits(hidden_SD, rows_VD, temperature)
      new_S = jnp.maximum(max_S, logits_SV.max(-1))
      shifted_SV = logits_SV - new_S[:, None]
      weight_SV = jnp.exp(shifted_SV)
      rise_S = new_S - max_S
      decay_S = jnp.exp(-rise_S)
      # weighted = sum (l - max) e^(l - max): moving the maximum by `rise` moves every term.
      weighted_S = decay_S * (weighted_S - rise_S * total_S) + (weight_SV * shifted_SV).sum(-1)
      total_S = decay_S * total_S + weight_SV.sum(-1)
      local_S = token_S - start
      inside_S = (local_S >= 0) & (local_S < rows_VD.shape[0])
      index_S = jnp.clip(local_S, 0, rows_VD.shape[0] - 1)
      logit_S = jnp.take_along_axis(logits_SV, index_S[:, None], -1)[:, 0]
      return new_S, total_S, weighted_S, jnp.where(inside_S, logit_S, chosen_S)

    # A finite lowest maximum, so that the first rise is finite and times total = 0 gives 0.
    zero_S = jnp.zeros(size, jnp.float32)
    lowest_S = jnp.full(size, jnp.finfo(jnp.float32).min / 4)
    running = _over_vocab(fold, (lowest_S, zero_S, zero_S, zero_S), unembed_VD, vocab_chunk)
    max_S, total_S, weighted_S, chosen_S = running
    log_total_S = jnp.log(total_S)
    lse_S = max_S + log_total_S
    return chosen_S - lse_S, log_total_S - weighted_S / total_S, lse_S

  if chunks == 1:
    outputs = [x[:, None] for x in one_chunk(0)]
  else:
    outputs = [x.T for x in lax.map(one_chunk, jnp.arange(chunks))]
  logprob_SK, entropy_SK, lse_SK = outputs
  return (logprob_SK, entropy_SK), (hidden_SKD, unembed_VD, token_SK, lse_SK, entropy_SK)


def _chunked_backward(temperature, vocab_chunk, kept, gradients):
  hidden_SKD, unembed_VD, token_SK, lse_SK, entropy_SK = kept
  size, chunks, embed = hidden_SKD.shape
  # With one chunk of tokens every row of the gradient is written once: no float32 sum is needed.
  sum_dtype = unembed_VD.dtype if chunks == 1 else jnp.float32

  def one_chunk(chunk, carry):
    hidden_gradient_SKD, unembed_gradient_VD = carry
    hidden_SD, token_S, lse_S, entropy_S, *gradients_S = (
      lax.dynamic_index_in_dim(x, chunk, 1, keepdims=False)
      for x in (hidden_SKD, token_SK, lse_SK, entropy_SK, *gradients)
    )

    def fold(start, rows_VD, running):
      gradient_SD, unembed_gradient_VD = running
      rows_VD = rows_VD.astype(hidden_SD.dtype)
      logprob_SV = _logits(hidden_SD, rows_VD, temperature) - lse_S[:, None]
      slope_SV = _slope(
        logprob_SV, jnp.exp(logprob_SV), token_S - start, entropy_S, *gradients_S, temperature
      )
      slope_SV = slope_SV.astype(hidden_SD.dtype)
      gradient_SD = gradient_SD + _dot(slope_SV, rows_VD, "nv,vd->nd")
      part_VD = _dot(slope_SV, hidden_SD, "nv,nd->vd")
      if chunks > 1:
        part_VD += lax.dynamic_slice_in_dim(unembed_gradient_VD, start, rows_VD.shape[0], 0)
      return gradient_SD, lax.dynamic_update_slice_in_dim(
        unembed_gradient_VD, part_VD.astype(sum_dtype), start, 0
      )

    zero_SD = jnp.zeros((size, embed), jnp.float32)
    gradient_SD, unembed_gradient_VD = _over_vocab(
      fold, (zero_SD, unembed_gradient_VD), unembed_VD, vocab_chunk
    )
    hidden_gradient_SKD = lax.dynamic_update_index_in_dim(
      hidden_gradient_SKD, gradient_SD.astype(hidden_SKD.dtype), chunk, 1
    )
    return hidden_gradient_SKD, unembed_gradient_VD

  carry = jnp.zeros_like(hidden_SKD), jnp.zeros(unembed_VD.shape, sum_dtype)
  carry = one_chunk(0, carry) if chunks == 1 else lax.fori_loop(0, chunks, one_chunk, carry)
  return carry[0], carry[1].astype(unembed_VD.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


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


def _logits(hidden_ND, unembed_VD, temperature):
  logits_NV = _dot(hidden_ND, unembed_VD.astype(hidden_ND.dtype), "nd,vd->nv")
  return logits_NV if temperature == 1 else logits_NV / temperature


def _slope(logprob_NV, p_NV, token_N, entropy_N, logprob_slope_N, entropy_slope_N, temperature):
  """Gradient in the logits: g_logp (1[token] - p) - g_H p (ln p + H)."""
  chosen_NV = lax.broadcasted_iota(jnp.int32, logprob_NV.shape, 1) == token_N[:, None]
  constant_N = logprob_slope_N + entropy_slope_N * entropy_N
  slope_NV = jnp.where(chosen_NV, logprob_slope_N[:, None], 0) - p_NV * (
    constant_N[:, None] + entropy_slope_N[:, None] * logprob_NV
  )
  return slope_NV if temperature == 1 else slope_NV / temperature


def _dot(left, right, subscripts):
  return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _check_floating(**arrays):
  for name, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {array.dtype}; pass float32 or bfloat16")


def _check_positive(**numbers):
  for name, number in numbers.items():
    if not number > 0:
      raise ValueError(f"{name} = {number} must be > 0")
