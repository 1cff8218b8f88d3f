"""Entropy of every token, and its log-probability straight from hidden states.

Here is what is public, the custom gradient and the split over a mesh; what a device computes on its
own arrays is in token_entropy_xla.py, and for TPUs in token_entropy_tpu.py.

B rows, T tokens of a row, N = B*T tokens, D embed, V vocabulary.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ares_jax.ops import token_entropy_xla as xla
from ares_jax.ops.op import op

# Where only some tokens are wanted there are so many chunks that few are computed in vain, of no
# fewer tokens: the gradient of the unembedding is read and written once a chunk.
WANTED_CHUNKS, WANTED_TOKENS = 8, 256


@op(static=("temperature",))
def token_entropy(logits_BTV, *, temperature=1.0):
  """Entropy over the whole vocabulary, H = -sum_j p_j ln p_j (paper eq. 3).

  Never negative: with z = logits - max it is ln sum e^z - sum z e^z / sum e^z, two terms >= 0.

  Args:
    logits_BTV: [..., V] floating; -inf marks tokens that cannot be drawn.
    temperature: p = softmax(logits / temperature), a Python number > 0.

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


@op(static=("temperature", "token_chunk", "vocab_chunk", "axes"))
def logprob_and_entropy(hidden_ND, unembed_VD, token_N, wanted_N=None, *, temperature=1.0,
                        token_chunk=2048, vocab_chunk=4096, axes=None):
  """ln pi(token) and entropy (paper eq. 3) of softmax(hidden @ unembed^T / temperature).

  The logits exist one chunk of tokens x vocabulary at a time, in the forward and in the backward
  pass: maximum, sum and weighted sum run along, and gradients recompute each chunk (only what
  fits in a single chunk is kept for them). Both outputs are differentiable in hidden and unembed.

  With `axes` each device works on its own tokens against its own rows of the unembedding: the
  statistics meet in one maximum and one sum over the vocabulary's axis, the gradient of the
  unembedding in one sum over the tokens' axis. Those rows are gathered whole first, in hidden's
  dtype (7B, 4-way vocabulary: 260 MiB), and their gradient is float32 until it is summed. On a TPU
  the chunks are then blocks of a kernel (token_entropy_tpu.py); without `axes` only where there is
  one device, as the compiler cannot split a kernel.

  Args:
    hidden_ND: floating; products are taken in this dtype and summed in float32.
    unembed_VD: floating; cast to hidden's dtype.
    token_N: integers in [0, V); others give a meaningless log-probability.
    wanted_N: bool, tokens that results are wanted of, or None for all. Chunks are filled with them
      first, and those without any are left out: of prompts nothing is asked, and of a rollout
      batch they may be half. One chunk and the kernels of a TPU compute all tokens.
    temperature: divides the logits, a Python number > 0.
    token_chunk, vocab_chunk: a chunk holds at most their product of logits; where the vocabulary
      is smaller than vocab_chunk it holds more tokens instead, with `wanted_N` fewer. They count
      what a device holds with `axes`, and the whole array without: when N is then sharded over
      devices, multiply token_chunk by their number.
    axes: (axis that splits the tokens, axis that splits the vocabulary), names of axes of the
      current mesh (`jax.set_mesh`) or None for not split; a tuple of axes may split the
      tokens. V must divide over its axis.

  Returns:
    logprob_N: float32, nats; 0 where not wanted.
    entropy_N: float32, nats, >= 0; 0 where not wanted.

  Raises:
    ValueError: shapes that do not fit, wrong dtypes, temperature or chunks not positive, axes that
      the current mesh has not.

  >>> import numpy as np
  >>> hidden_ND, unembed_VD = np.zeros((1, 3), np.float32), np.ones((4, 3), np.float32)
  >>> logprob_N, entropy_N = logprob_and_entropy(hidden_ND, unembed_VD, np.int32([2]))
  >>> print(logprob_N, entropy_N)                                  # uniform over 4: ln 4 = 1.386
  [-1.3862944] [1.3862944]
  """
  if hidden_ND.ndim != 2 or unembed_VD.ndim != 2 or token_N.shape != hidden_ND.shape[:1]:
    raise ValueError(f"hidden {hidden_ND.shape}, unembed {unembed_VD.shape}, token "
                     f"{token_N.shape}: need [N, D], [V, D], [N]; flatten batch and time first")
  if wanted_N is not None and (wanted_N.shape != token_N.shape or wanted_N.dtype != bool):
    raise ValueError(f"wanted_N is {wanted_N.dtype} {wanted_N.shape}; pass bool {token_N.shape}")
  if hidden_ND.shape[1] != unembed_VD.shape[1] or unembed_VD.shape[0] == 0:
    raise ValueError(f"hidden {hidden_ND.shape} and unembed {unembed_VD.shape} must share D and V "
                     "must be >= 1; pass the unembedding as [V, D]")
  _check_floating(hidden_ND=hidden_ND, unembed_VD=unembed_VD)
  if not jnp.issubdtype(token_N.dtype, jnp.integer):
    raise ValueError(f"token_N has dtype {token_N.dtype}; pass integers")
  _check_positive(temperature=temperature, token_chunk=token_chunk, vocab_chunk=vocab_chunk)
  tokens, vocab = hidden_ND.shape[0], unembed_VD.shape[0]
  token_axis, vocab_axis, token_parts, vocab_parts, local = _split(axes, vocab)
  if tokens == 0:
    return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.float32)
  here = -(-tokens // token_parts), vocab // vocab_parts  # tokens and vocabulary of a device
  plan = _Plan(
    temperature=temperature,
    token_chunk=(max(token_chunk, token_chunk * vocab_chunk // here[1]) if wanted_N is None else
                 min(token_chunk, max(WANTED_TOKENS, here[0] // WANTED_CHUNKS))),
    vocab_chunk=min(vocab_chunk, here[1]),
    token_axis=token_axis, vocab_axis=vocab_axis,
    one_chunk=math.prod(here) <= token_chunk * vocab_chunk,
    kernel=local or (jax.default_backend() == "tpu" and jax.device_count() == 1),
  )
  token_N = token_N.astype(jnp.int32)
  padding = -tokens % token_parts
  if padding:
    hidden_ND, token_N = jnp.pad(hidden_ND, ((0, padding), (0, 0))), jnp.pad(token_N, (0, padding))
    wanted_N = None if wanted_N is None else jnp.pad(wanted_N, (0, padding))
  logprob_N, entropy_N = _both(plan, hidden_ND, unembed_VD, token_N, wanted_N)
  return (logprob_N[:tokens], entropy_N[:tokens]) if padding else (logprob_N, entropy_N)


class _Plan(NamedTuple):
  temperature: float
  token_chunk: int
  vocab_chunk: int
  # Mesh axes; with neither the program is not mapped over devices.
  token_axis: str | tuple[str, ...] | None
  vocab_axis: str | None
  one_chunk: bool  # a device's logits fit in one chunk, and stay for the backward pass
  # TPU kernels may be used: the arrays here are one device's complete shards.
  kernel: bool

  def map(self, function, in_specs, out_specs):
    function = functools.partial(function, self)
    if self.token_axis is None and self.vocab_axis is None:
      return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _split(axes, vocab):
  """Token and vocabulary axis, devices along each, whether arrays will be one device's shards."""
  if axes is None:
    return None, None, 1, 1, False
  mesh = jax.sharding.get_abstract_mesh()
  names = [_names(axis) for axis in axes]
  if len(axes) != 2 or not set(sum(names, ())) <= set(mesh.axis_names):
    raise ValueError(f"axes = {axes!r}, but the current mesh has {mesh.axis_names or 'none'}; pass "
                     "(token axis, vocabulary axis) of it, and enter jax.set_mesh(mesh) first")
  if set(names[0]) & set(names[1]):
    raise ValueError(f"axes = {axes!r}: tokens and vocabulary need different axes; pass None once")
  token_parts, vocab_parts = (math.prod(mesh.shape[name] for name in part) for part in names)
  if vocab % vocab_parts:
    raise ValueError(f"unembed has {vocab} rows, which do not divide over {vocab_parts} devices of "
                     f"{axes[1]!r}; pad it, or pass axes = ({axes[0]!r}, None)")
  if mesh.size == 1:
    return None, None, 1, 1, True
  return *axes, token_parts, vocab_parts, axes != (None, None)


def _names(axis):
  """The mesh axes of an entry of a spec, as a tuple."""
  return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _both(plan, hidden_ND, unembed_VD, token_N, wanted_N):
  return _both_forward(plan, hidden_ND, unembed_VD, token_N, wanted_N)[0]


def _both_forward(plan, hidden_ND, unembed_VD, token_N, wanted_N):
  n, v = plan.token_axis, plan.vocab_axis
  forward = plan.map(_forward, (P(n), P(v), P(n), P(n)),
                     ((P(n), P(n)), P(n, v) if plan.one_chunk else P(n)))
  unembed = _gathered(plan, unembed_VD, hidden_ND.dtype)
  outputs, kept = forward(hidden_ND, unembed, token_N, wanted_N)
  if wanted_N is not None:
    outputs = tuple(jnp.where(wanted_N, x, 0) for x in outputs)
  return outputs, (hidden_ND, unembed_VD, token_N, wanted_N, outputs[1], kept)


def _both_backward(plan, kept, gradients):
  hidden_ND, unembed_VD, token_N, wanted_N, entropy_N, kept = kept
  if wanted_N is not None:
    gradients = tuple(jnp.where(wanted_N, x, 0) for x in gradients)
  n, v = plan.token_axis, plan.vocab_axis
  # Weights are often split along D over the tokens' axis (FSDP): their gradient can arrive so.
  shape = jax.sharding.get_abstract_mesh().shape
  parts = math.prod(shape[name] for name in _names(n))
  scattered = n if hidden_ND.shape[1] % parts == 0 else None
  kept_spec = P(n, v) if plan.one_chunk else P(n)
  backward = plan.map(functools.partial(_backward, scattered=scattered),
                      (P(n), P(v), P(n), P(n), P(n), kept_spec, (P(n), P(n))),
                      (P(n), P(v, scattered)))
  hidden_gradient_ND, unembed_gradient_VD = backward(
    hidden_ND, _gathered(plan, unembed_VD, hidden_ND.dtype), token_N, wanted_N, entropy_N, kept,
    gradients)
  return hidden_gradient_ND, unembed_gradient_VD.astype(unembed_VD.dtype), None, None


_both.defvjp(_both_forward, _both_backward)


def _gathered(plan, unembed_VD, dtype):
  """The unembedding in the dtype in which it is gathered over the tokens' axis."""
  return unembed_VD.astype(dtype) if plan.token_axis else unembed_VD


def _forward(plan, hidden_ND, unembed_VD, token_N, wanted_N):
  """(logprob, entropy) and what is kept for `_backward`, of one device's arrays."""
  token_N = _local_tokens(plan, token_N, unembed_VD)
  if plan.one_chunk:
    logits_NV = xla.logits(hidden_ND, unembed_VD, plan.temperature)
    shifted_NV = logits_NV - _all_max(plan, logits_NV.max(-1))[:, None]
    weight_NV = jnp.exp(shifted_NV)
    weighted_N, chosen_N = (weight_NV * shifted_NV).sum(-1), xla.chosen(shifted_NV, token_N, 0)
    total_N, weighted_N, chosen_N = _all_sum(plan, (weight_NV.sum(-1), weighted_N, chosen_N))
    log_total_N = jnp.log(total_N)
    kept = shifted_NV - log_total_N[:, None], weight_NV / total_N[:, None]
    return (chosen_N - log_total_N, log_total_N - weighted_N / total_N), kept
  statistics = functools.partial(xla.statistics, temperature=plan.temperature,
                                 token_chunk=plan.token_chunk, vocab_chunk=plan.vocab_chunk)
  max_N, total_N, weighted_N, chosen_N = _compute(
    plan, _tpu_statistics, statistics, hidden_ND, unembed_VD, token_N, wanted_N)
  if plan.vocab_axis:
    local_N, max_N = max_N, _all_max(plan, max_N)
    weighted_N, total_N = xla.rise(weighted_N, total_N, max_N - local_N)
    total_N, weighted_N, chosen_N = _all_sum(plan, (total_N, weighted_N, chosen_N))
  log_total_N = jnp.log(total_N)
  lse_N = max_N + log_total_N
  return (chosen_N - lse_N, log_total_N - weighted_N / total_N), lse_N


def _backward(plan, hidden_ND, unembed_VD, token_N, wanted_N, entropy_N, kept, slopes, *,
              scattered):
  """Gradients in hidden and unembed, of one device's arrays; `scattered` as in `_all_rows`."""
  token_N = _local_tokens(plan, token_N, unembed_VD)
  if plan.one_chunk:
    slope_NV = xla.slope(*kept, token_N, entropy_N, *slopes, plan.temperature)
    slope_NV = slope_NV.astype(hidden_ND.dtype)
    hidden_gradient_ND = xla.dot(slope_NV, unembed_VD.astype(hidden_ND.dtype), "nv,vd->nd")
    hidden_gradient_ND = _all_sum(plan, hidden_gradient_ND).astype(hidden_ND.dtype)
    unembed_gradient_VD = xla.dot(slope_NV, hidden_ND, "nv,nd->vd")
  else:
    gradients = functools.partial(
      xla.gradients, temperature=plan.temperature, token_chunk=plan.token_chunk,
      vocab_chunk=plan.vocab_chunk, vocab_axis=plan.vocab_axis,
      unembed_dtype=_partial_dtype(plan, unembed_VD))
    hidden_gradient_ND, unembed_gradient_VD = _compute(
      plan, _tpu_gradients, gradients, hidden_ND, unembed_VD, token_N, wanted_N, kept, entropy_N,
      *slopes)
  return hidden_gradient_ND, _all_rows(plan, unembed_gradient_VD, scattered)


def _compute(plan, kernel, default, hidden_ND, unembed_VD, *others):
  """`kernel` of the arrays on a TPU, if it takes them, else `default`."""
  arrays = hidden_ND, unembed_VD, *others
  if not plan.kernel or not _tpu().suits(hidden_ND, unembed_VD):
    return default(*arrays)
  return lax.platform_dependent(*arrays, tpu=functools.partial(kernel, plan), default=default)


def _tpu():
  # Imported where it is used: small models never need Pallas (0.1 s).
  from ares_jax.ops import token_entropy_tpu

  return token_entropy_tpu


def _tpu_statistics(plan, hidden_ND, unembed_VD, token_N, _):
  return _tpu().statistics(hidden_ND, unembed_VD, token_N, temperature=plan.temperature)


def _tpu_gradients(plan, hidden_ND, unembed_VD, token_N, _, *known_N):
  hidden_gradient_ND, unembed_gradient_VD = _tpu().gradients(
    hidden_ND, unembed_VD, token_N, *known_N, temperature=plan.temperature,
    hidden_dtype=jnp.dtype(jnp.float32 if plan.vocab_axis else hidden_ND.dtype),
    unembed_dtype=_partial_dtype(plan, unembed_VD))
  return _all_sum(plan, hidden_gradient_ND).astype(hidden_ND.dtype), unembed_gradient_VD


def _local_tokens(plan, token_N, unembed_VD):
  """Token ids relative to this device's first vocabulary row.

  Out of range for ids on other devices.
  """
  if plan.vocab_axis is None:
    return token_N
  return token_N - lax.axis_index(plan.vocab_axis) * unembed_VD.shape[0]


def _all_max(plan, array):
  return lax.pmax(array, plan.vocab_axis) if plan.vocab_axis else array


def _all_sum(plan, arrays):
  return lax.psum(arrays, plan.vocab_axis) if plan.vocab_axis else arrays


def _all_rows(plan, unembed_gradient_VD, scattered):
  """Sum over the devices of the tokens' axis; with `scattered` each gets its columns only."""
  if scattered:
    return lax.psum_scatter(unembed_gradient_VD, scattered, scatter_dimension=1, tiled=True)
  return lax.psum(unembed_gradient_VD, plan.token_axis) if plan.token_axis else unembed_gradient_VD


def _partial_dtype(plan, unembed_VD):
  """Dtype of a device's gradient of the unembedding: float32 where others are added to it."""
  return jnp.dtype(jnp.float32) if plan.token_axis else unembed_VD.dtype


def _check_floating(**arrays):
  for name, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {array.dtype}; pass float32 or bfloat16")


def _check_positive(**numbers):
  for name, number in numbers.items():
    if not number > 0:
      raise ValueError(f"{name} = {number} must be > 0")
