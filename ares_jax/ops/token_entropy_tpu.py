"""TPU kernels of `logprob_and_entropy`: logits live in VMEM only, one block of V x N at a time.

N tokens, D embed, V vocabulary. Blocks are computed transposed, [V, N]: what is known of a token is
then a row, tokens along the lanes, and sums over the vocabulary are sums of registers.

Against the chunked program of XLA the backward pass has one more matmul (both kernels recompute the
logits) and no sums in HBM: every block of a gradient is summed in VMEM and written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MEBI = 2**20
LANES = 128
# v5p has 64 MiB a core, v5e and v6e 128; the compiler's own limit would be 16.
VMEM_LIMIT = 56 * MEBI


def suits(hidden_ND, unembed_VD):
  """Whether the kernels take these arrays; the others go through XLA."""
  return (hidden_ND.shape[1] % LANES == 0
          and unembed_VD.shape[0] >= LANES
          and LANES * hidden_ND.shape[1] * 4 <= 4 * MEBI
          and hidden_ND.dtype in (jnp.bfloat16, jnp.float32)
          and unembed_VD.dtype in (jnp.bfloat16, jnp.float32))


@functools.partial(jax.jit, static_argnames="temperature")
def statistics(hidden_ND, unembed_VD, token_N, *, temperature):
  """max l, sum e^(l - max), sum (l - max) e^(l - max) and l[token], of l = logits / temperature.

  Args:
    hidden_ND, unembed_VD: bfloat16 or float32, D a multiple of 128; products in hidden's dtype.
    token_N: int32; one outside [0, V) gets the logit 0.
    temperature: > 0.

  Returns:
    four float32 [N].
  """
  tokens, embed = hidden_ND.shape
  # A block of the vocabulary is read again for every block of tokens: 1024 of them make 1024
  # FLOP a byte, and a v6e needs 560 to keep its matmul unit busy.
  block_n = _block(hidden_ND, tokens, most=1024, limit=8 * MEBI)
  block_v = _block(unembed_VD, unembed_VD.shape[0], most=512, limit=4 * MEBI)
  hidden_ND, token_1N = _pad(hidden_ND, 0, block_n), _pad(token_N[None], 1, block_n)
  kernel = functools.partial(_statistics_kernel, vocab=unembed_VD.shape[0], temperature=temperature)
  statistics_4N = pl.pallas_call(
    kernel,
    grid=(hidden_ND.shape[0] // block_n, pl.cdiv(unembed_VD.shape[0], block_v)),
    in_specs=[pl.BlockSpec((block_n, embed), lambda n, v: (n, 0)),
              pl.BlockSpec((block_v, embed), lambda n, v: (v, 0)),
              pl.BlockSpec((1, block_n), lambda n, v: (0, n))],
    out_specs=pl.BlockSpec((4, block_n), lambda n, v: (0, n)),
    out_shape=jax.ShapeDtypeStruct((4, hidden_ND.shape[0]), jnp.float32),
    compiler_params=_compiler_params(),
    name="token_entropy_statistics",
  )(hidden_ND, unembed_VD, token_1N)
  return tuple(statistics_4N[:, :tokens])


def _statistics_kernel(hidden_ref, unembed_ref, token_ref, statistics_ref, *, vocab, temperature):
  block = pl.program_id(1)
  lowest = jnp.finfo(jnp.float32).min / 4

  @pl.when(block == 0)
  def _():
    statistics_ref[0:1, :] = jnp.full_like(statistics_ref[0:1, :], lowest)
    statistics_ref[1:4, :] = jnp.zeros_like(statistics_ref[1:4, :])

  logits_VN = _logits(hidden_ref[...], unembed_ref[...], temperature)
  row_VN = _row(logits_VN.shape, block)
  if vocab % logits_VN.shape[0]:
    # Rows past the end of the array hold anything, nan too.
    logits_VN = jnp.where(row_VN < vocab, logits_VN, lowest)
  max_1N, total_1N = statistics_ref[0:1, :], statistics_ref[1:2, :]
  new_1N = jnp.maximum(max_1N, logits_VN.max(0, keepdims=True))
  shifted_VN = logits_VN - new_1N
  weight_VN = jnp.exp(shifted_VN)
  rise_1N = new_1N - max_1N
  decay_1N = jnp.exp(-rise_1N)
  statistics_ref[0:1, :] = new_1N
  statistics_ref[1:2, :] = decay_1N * total_1N + weight_VN.sum(0, keepdims=True)
  statistics_ref[2:3, :] = (decay_1N * (statistics_ref[2:3, :] - rise_1N * total_1N)
                            + (weight_VN * shifted_VN).sum(0, keepdims=True))
  chosen_VN = jnp.where(row_VN == token_ref[...], logits_VN, 0)
  statistics_ref[3:4, :] += chosen_VN.sum(0, keepdims=True)


@functools.partial(jax.jit, static_argnames=("temperature", "hidden_dtype", "unembed_dtype"))
def gradients(hidden_ND, unembed_VD, token_N, lse_N, entropy_N, logprob_slope_N, entropy_slope_N, *,
              temperature, hidden_dtype, unembed_dtype):
  """Gradients in hidden and unembed from those in the log-probability and the entropy.

  Args:
    hidden_ND, unembed_VD, token_N, temperature: as for `statistics`.
    lse_N, entropy_N: float32, over the whole vocabulary if unembed is a part of it.
    logprob_slope_N, entropy_slope_N: float32, the gradients in the two outputs.
    hidden_dtype, unembed_dtype: of the results; sums are float32.

  Returns:
    hidden_gradient_ND, unembed_gradient_VD.
  """
  (tokens, embed), vocab = hidden_ND.shape, unembed_VD.shape[0]
  block_n = _block(hidden_ND, tokens, most=512, limit=4 * MEBI)
  block_v = _block(unembed_VD, vocab, most=512, limit=4 * MEBI)
  hidden_ND, token_1N = _pad(hidden_ND, 0, block_n), _pad(token_N[None], 1, block_n)
  constant_N = logprob_slope_N + entropy_slope_N * entropy_N
  # Padding has slopes 0, so it adds nothing to the unembedding's gradient.
  known_4N = jnp.stack([lse_N, constant_N, logprob_slope_N, entropy_slope_N])
  known_4N = _pad(known_4N, 1, block_n)
  padded = hidden_ND.shape[0]
  blocks_n, blocks_v = padded // block_n, pl.cdiv(vocab, block_v)

  def call(kernel, grid, token_block, vocab_block, out_block, rows, dtype, name):
    index = lambda block, row: lambda *step: (step[block], 0) if row else (0, step[block])  # noqa: E731
    size = block_n if out_block == token_block else block_v
    return pl.pallas_call(
      functools.partial(kernel, vocab=vocab, temperature=temperature),
      grid=grid,
      in_specs=[pl.BlockSpec((block_n, embed), index(token_block, True)),
                pl.BlockSpec((block_v, embed), index(vocab_block, True)),
                pl.BlockSpec((1, block_n), index(token_block, False)),
                pl.BlockSpec((4, block_n), index(token_block, False))],
      out_specs=pl.BlockSpec((size, embed), index(out_block, True)),
      out_shape=jax.ShapeDtypeStruct((rows, embed), dtype),
      scratch_shapes=[pltpu.VMEM((size, embed), jnp.float32)],
      compiler_params=_compiler_params(),
      name=name,
    )(hidden_ND, unembed_VD, token_1N, known_4N)

  hidden_gradient_ND = call(_hidden_kernel, (blocks_n, blocks_v), 0, 1, 0, padded, hidden_dtype,
                            "token_entropy_hidden")
  unembed_gradient_VD = call(_unembed_kernel, (blocks_v, blocks_n), 1, 0, 0, vocab, unembed_dtype,
                             "token_entropy_unembed")
  return hidden_gradient_ND[:tokens], unembed_gradient_VD


def _hidden_kernel(hidden_ref, unembed_ref, token_ref, known_ref, gradient_ref, sum_ref, *, vocab,
                   temperature):
  block = pl.program_id(1)
  unembed_VD = unembed_ref[...].astype(hidden_ref.dtype)
  slope_VN = _slope(hidden_ref[...], unembed_VD, token_ref, known_ref, block, temperature)
  if vocab % unembed_VD.shape[0]:
    # Rows past the end of the array hold anything, and 0 * nan is nan: both factors become 0.
    slope_VN = jnp.where(_row(slope_VN.shape, block) < vocab, slope_VN, 0)
    inside_VD = _row(unembed_VD.shape, block) < vocab
    unembed_VD = jnp.where(inside_VD, unembed_VD, jnp.zeros_like(unembed_VD))
  part_ND = _dot(slope_VN.astype(hidden_ref.dtype), unembed_VD, 0, 0)
  _accumulate(sum_ref, part_ND, gradient_ref)


def _unembed_kernel(hidden_ref, unembed_ref, token_ref, known_ref, gradient_ref, sum_ref, *, vocab,
                    temperature):
  del vocab  # What rows past the end of the array get is not written.
  hidden_ND = hidden_ref[...]
  unembed_VD = unembed_ref[...].astype(hidden_ND.dtype)
  slope_VN = _slope(hidden_ND, unembed_VD, token_ref, known_ref, pl.program_id(0), temperature)
  _accumulate(sum_ref, _dot(slope_VN.astype(hidden_ND.dtype), hidden_ND, 1, 0), gradient_ref)


def _slope(hidden_ND, unembed_VD, token_ref, known_ref, block, temperature):
  """Gradient in the logits: g_logp (1[token] - p) - g_H p (ln p + H)."""
  logprob_VN = _logits(hidden_ND, unembed_VD, temperature) - known_ref[0:1, :]
  chosen_VN = _row(logprob_VN.shape, block) == token_ref[...]
  weight_VN = known_ref[1:2, :] + known_ref[3:4, :] * logprob_VN
  slope_VN = jnp.where(chosen_VN, known_ref[2:3, :], 0.0) - jnp.exp(logprob_VN) * weight_VN
  return slope_VN if temperature == 1 else slope_VN / temperature


def _logits(hidden_ND, unembed_VD, temperature):
  logits_VN = _dot(unembed_VD.astype(hidden_ND.dtype), hidden_ND, 1, 1)
  return logits_VN if temperature == 1 else logits_VN / temperature


def _dot(left, right, left_axis, right_axis):
  dimensions = (((left_axis,), (right_axis,)), ((), ()))
  return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _row(shape, block):
  return block * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)


def _accumulate(sum_ref, part, out_ref):
  """Sums along the inner axis of the grid, in float32, and writes at its end."""
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = part

  @pl.when(step > 0)
  def _():
    sum_ref[...] += part

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _block(array, rows, *, most, limit):
  """Rows of a block: a power of two from 128 to `most`, at most `limit` bytes and `rows`."""
  row = array.shape[1] * array.dtype.itemsize
  block = most
  while block > LANES and (block * row > limit or block > rows):
    block //= 2
  return block


def _pad(array, axis, multiple):
  padding = -array.shape[axis] % multiple
  return jnp.pad(array, [(0, padding if i == axis else 0) for i in range(array.ndim)])


def _compiler_params():
  # The outer axis may go to the two cores of a v5p; the inner one carries sums.
  return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                              vmem_limit_bytes=VMEM_LIMIT)
