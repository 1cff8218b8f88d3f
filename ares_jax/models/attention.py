"""Attention over complete sequences, with the kernel that suits the device.

A TPU uses splash attention, an NVIDIA GPU Pallas's fused attention for Triton. Both are part of
jax, support segments and keep no [T, S] scores. Other devices, and short rows, use plain XLA. The
choice is made when a program is lowered, so a CPU host compiles for a TPU what a TPU runs.

The "model" axis splits heads if it divides their number, else the queries of a row (context
parallelism): each device then has T / m queries and gathers all keys and values. These are few with
GQA: 42 MB per layer in bfloat16 for 20480 tokens of 7B.

cuDNN's attention is not used: it takes packed rows only with a [T, S] mask, and its function cannot
be traced on a host without cuDNN.

Answers to one prompt may share it (codes.py): splash attention asks a function of a query's index
and a key's which of the keys with the query's id it reads, and gets a code in place of the index.
The kernel for Triton asks none; there such rows take plain XLA.

B rows, T query positions, S key positions, N query heads, K kv heads, H head size, m devices of
"model".
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ares_jax.models.codes import codes, reads, until
from ares_jax.models.layers import MASKED
from ares_jax.system.mesh import ROWS, size, unmapped

# Shorter rows use plain XLA: their scores are small, so a kernel would save little.
KERNEL_TOKENS = 256
# About how many queries and keys a step of a kernel takes. With splash's default of 128 keys would
# be read 4 times as often. Triton's backward pass has blocks of 32, which divide 128.
SPLASH_BLOCK, TRITON_BLOCK = 512, 128


def attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, segment_BT: jax.Array,
              causal: bool, prompt_BT: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over the keys of the query's own segment.

  A kernel is used if a row has `KERNEL_TOKENS` or more and there is a single device or a mesh. The
  mesh axes ROWS split the rows if they divide them, and "model" splits the heads if it divides
  them, else the queries.

  Args:
    q_BTNH, k_BTKH, v_BTKH: queries, keys, values; query head n uses kv head n // (N / K).
    segment_BT: int32, segment of each token; 0 is padding, whose results are meaningless.
    causal: whether to attend only to keys up to the query's index.
    prompt_BT: int32, the segment of the prompt that the query's answer shares with others, whose
      keys it reads too; the query's own segment where there is none. Answers follow their prompt
      and begin at multiples of `codes.step_of(T)`. Needs `causal`. None: none shares.

  Returns:
    [B, T, N, H] in q's dtype.
  """
  mesh = jax.sharding.get_abstract_mesh()
  code_BT = None
  if prompt_BT is not None:
    code_BT, segment_BT = codes(segment_BT, prompt_BT), prompt_BT
  if q_BTNH.shape[1] < KERNEL_TOKENS or (mesh.empty and jax.device_count() > 1):
    return _dense(q_BTNH, k_BTKH, v_BTKH, segment_BT, code_BT, causal=causal)
  if mesh.empty:
    return _on_device(q_BTNH, k_BTKH, v_BTKH, segment_BT, code_BT, causal=causal)
  rows_axis = unmapped(ROWS)
  if q_BTNH.shape[0] % size(*rows_axis or ()):
    rows_axis = None
  over = _split_queries if q_BTNH.shape[2] % mesh.shape["model"] else _split_heads
  return over(q_BTNH, k_BTKH, v_BTKH, segment_BT, code_BT, causal=causal, rows_axis=rows_axis,
              parts=mesh.shape["model"])


def _split_heads(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT, *, causal, rows_axis, parts):
  heads, kv_heads = q_BTNH.shape[2], k_BSKH.shape[2]
  kv_axis = "model" if kv_heads % parts == 0 else None

  def local(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT):
    if not kv_axis:
      used = _local_kv_heads(heads // parts, heads // kv_heads, kv_heads)
      k_BSKH, v_BSKH = (jnp.take(x, used, axis=2) for x in (k_BSKH, v_BSKH))
    return _on_device(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT, causal=causal)

  spec, kv_spec, row = P(rows_axis, None, "model"), P(rows_axis, None, kv_axis), P(rows_axis)
  return jax.shard_map(local, in_specs=(spec, kv_spec, kv_spec, row, row), out_specs=spec,
                       check_vma=False)(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT)


def _local_kv_heads(heads: int, group: int, kv_heads: int):
  """Indices of the kv heads of this device's `heads` query heads, `group` of which share one."""
  first = lax.axis_index("model") * heads
  # A single index if all of them share it, else one per query head; padding heads use the last.
  used = (first + jnp.arange(1 if group % heads == 0 else heads)) // group
  return jnp.minimum(used, kv_heads - 1)


def _split_queries(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT, *, causal, rows_axis, parts):
  tokens = q_BTNH.shape[1]
  # Two chunks per device, see `_chunks`.
  padded = _pad(2 * parts, q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT)

  def local(q_BTNH, k_BSKH, v_BSKH, segment_BS, code_BS):
    # The backward pass sums the gradients of keys and values over the devices.
    k_BSKH, v_BSKH = (lax.all_gather(x, "model", axis=1, tiled=True) for x in (k_BSKH, v_BSKH))
    dense = jax.checkpoint(functools.partial(_dense_queries, causal=causal, tokens=tokens))
    return lax.platform_dependent(
      q_BTNH, k_BSKH, v_BSKH, segment_BS, code_BS,
      tpu=functools.partial(_splash_queries, causal=causal, tokens=tokens),
      cuda=functools.partial(_triton_queries, causal=causal) if code_BT is None else dense,
      default=dense)

  spec, row = P(rows_axis, "model"), P(rows_axis)
  return jax.shard_map(local, in_specs=(spec, spec, spec, row, row), out_specs=spec,
                       check_vma=False)(*padded)[:, :tokens]


def _splash_queries(q_BTNH, k_BSKH, v_BSKH, segment_BS, code_BS, *, causal, tokens):
  if not causal:
    segment_BT = _local_part(segment_BS, 1)
    return _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, None, causal=False)
  chunks = _chunks(lax.axis_size("model"))
  numbers = jnp.asarray(chunks)[lax.axis_index("model")]
  rows = len(segment_BS)
  segment_BT, code_BT = jax.tree.map(
    lambda x: x.reshape(rows, chunks.size, -1)[:, numbers].reshape(rows, -1), (segment_BS, code_BS))
  out = _splash(_send_chunks(q_BTNH, chunks), k_BSKH, v_BSKH, segment_BT, segment_BS, code_BT,
                causal=True, tokens=tokens, chunks=chunks)
  return _send_chunks(out, chunks, back=True)


def _chunks(parts):
  """[m, 2]: for each device, the two query chunks it computes, the even index first.

  Device i computes chunks i and 2 m - 1 - i, which balances the load: early queries attend to few
  keys. With chunks 2 i and 2 i + 1 the last device would have nearly twice the average work.
  """
  return np.array([sorted((index, 2 * parts - 1 - index), key=lambda chunk: chunk % 2)
                   for index in range(parts)])


def _send_chunks(x_BTNH, chunks, *, back=False):
  """Sends chunks 2 i and 2 i + 1 from device i to those that compute them, or `back`."""
  halves = []
  for half, numbers in zip(jnp.split(x_BTNH, 2, axis=1), chunks.T, strict=True):
    pairs = [(number // 2, device) for device, number in enumerate(numbers)]
    halves.append(lax.ppermute(half, "model", [pair[::-1] for pair in pairs] if back else pairs))
  return jnp.concatenate(halves, axis=1)


def _triton_queries(q_BTNH, k_BSKH, v_BSKH, segment_BS, _, *, causal):
  # This kernel needs as many queries as keys, both from the first token of the row. So devices
  # exchange some tokens of all heads for all tokens of some heads, with padding heads if "model"
  # does not divide them (28 heads over 8 devices: 4 of 32).
  heads, kv_heads, parts = q_BTNH.shape[2], k_BSKH.shape[2], lax.axis_size("model")
  q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, -heads % parts), (0, 0)))
  used = _local_kv_heads(q_BTNH.shape[2] // parts, heads // kv_heads, kv_heads)
  q_BSNH = lax.all_to_all(q_BTNH, "model", 2, 1, tiled=True)
  k_BSNH, v_BSNH = (jnp.take(x, used, axis=2) for x in (k_BSKH, v_BSKH))
  out = _triton(q_BSNH, k_BSNH, v_BSNH, segment_BS, causal=causal)
  return lax.all_to_all(out, "model", 1, 2, tiled=True)[:, :, :heads]


def _dense_queries(q_BTNH, k_BSKH, v_BSKH, segment_BS, code_BS, *, causal, tokens):
  index_S = jnp.arange(segment_BS.shape[1])
  allowed_BTS = _local_part(segment_BS, 1)[:, :, None] == segment_BS[:, None, :]
  if causal:
    code_BT = None if code_BS is None else _local_part(code_BS, 1)
    allowed_BTS &= until(_local_part(index_S, 0), code_BT, index_S, tokens)
  return _attend(q_BTNH, k_BSKH, v_BSKH, allowed_BTS)


def _local_part(x, axis):
  """One of m equal parts of `x` along `axis`: this device's part."""
  size = x.shape[axis] // lax.axis_size("model")
  return lax.dynamic_slice_in_dim(x, lax.axis_index("model") * size, size, axis)


def _on_device(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT, *, causal):
  def dense(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT):
    if causal:
      return _banded(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT)
    return _dense(q_BTNH, k_BSKH, v_BSKH, segment_BT, None, causal=False)

  def kernel(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT):
    return _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BT, code_BT, causal=causal,
                   tokens=q_BTNH.shape[1])

  def triton(q_BTNH, k_BSKH, v_BSKH, segment_BT, _):
    return _triton(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal=causal)

  # A conditional saves for the backward pass what any of its branches needs. This branch is
  # recomputed, so that its [T, S] arrays do not enter the programs of other platforms.
  dense = jax.checkpoint(dense)
  return lax.platform_dependent(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT, tpu=kernel,
                                cuda=triton if code_BT is None else dense, default=dense)


def _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, code_BT, *, causal, tokens=None,
            chunks=((0,),)):
  """Splash attention of T queries to S keys.

  `chunks` [m, chunks of a device] are the numbers in the row of each device's chunks of queries;
  ((0,),) = the queries begin where the keys do. `tokens` of the row that `code_BT` is about.
  """
  # Imported here because small models never need Pallas, which takes 0.2 s.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  chunks = np.asarray(chunks)
  (rows, queries, heads, head_dim), (devices, count) = q_BTNH.shape, chunks.shape
  size = queries // count
  block_q, block_kv = _splash_block(size), _splash_block(k_BSKH.shape[1])
  # Each chunk is padded to a multiple of the block.
  q, segment_BT, code_BT = _pad(block_q, *jax.tree.map(
    lambda x: x.reshape(rows * count, size, *x.shape[2:]),
    (q_BTNH * head_dim**-0.5, segment_BT, code_BT)))
  padded = q.shape[1]
  q, segment_BT, code_BT = jax.tree.map(
    lambda x: x.reshape(rows, count * padded, *x.shape[2:]), (q, segment_BT, code_BT))
  k, v, segment_BS = _pad(block_kv, k_BSKH, v_BSKH, segment_BS)
  if causal:
    mask = splash.CausalMask((devices * count * padded, k.shape[1]))
    # The index of each query in the row. Padding has the index of the last query of its chunk, so
    # that it attends to a key: without any, its 0 / 0 would reach the gradients of the keys.
    mask.q_sequence = np.int32(
      chunks.reshape(-1, 1) * size + np.minimum(np.arange(padded), size - 1)).reshape(-1)
  else:
    mask = splash.FullMask((count * padded, k.shape[1]))
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=devices,
    # The fused backward kernel would write dq for every block of keys: 6 GB at T = 20480 and 28
    # heads.
    block_sizes=splash.BlockSizes(
      block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
      block_q_dq=block_q, block_kv_dq=block_kv))
  if devices > 1:
    # The kernel's arrays, [1, blocks of queries, ...] and [queries], describe the queries of all
    # devices.
    kernel = jax.tree.map(lambda x: _local_part(x, min(x.ndim - 1, 1)), kernel)
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  out = jax.vmap(functools.partial(_call_splash, kernel, tokens))(
    q, k, v, splash.SegmentIds(q=segment_BT, kv=segment_BS), code_BT)
  out = jnp.swapaxes(out, 1, 2).reshape(rows * count, padded, heads, -1)[:, :size]
  return out.reshape(rows, queries, heads, -1)


def _call_splash(kernel, tokens, q, k, v, segments, code):
  """The kernel of a causal mask, asking in place of the mask's own function that of the codes."""
  if code is not None:
    infos, settings = kernel.tree_flatten()
    kernel = kernel.tree_unflatten(settings | {"mask_function": reads(tokens)},
                                   [info._replace(q_sequence=code) for info in infos])
  return kernel(q, k, v, segments)


def _splash_block(tokens):
  """A multiple of 128 near SPLASH_BLOCK, at most a quarter above, that pads `tokens` little."""
  count = max(round(tokens / SPLASH_BLOCK), -(-tokens * 4 // (5 * SPLASH_BLOCK)))
  return -(-tokens // (128 * count)) * 128


def _triton(q_BTNH, k_BSKH, v_BSKH, segment_BT, *, causal):
  from jax.experimental.pallas.ops.gpu import attention as triton

  tokens, heads, head_dim = q_BTNH.shape[1:]
  # This kernel needs a kv head for every query head.
  k_BSNH, v_BSNH = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
  padded = _pad(TRITON_BLOCK, q_BTNH, k_BSNH, v_BSNH, segment_BT)
  return triton.mha(*padded, sm_scale=head_dim**-0.5, causal=causal)[:, :tokens]


def _pad(block, *arrays):
  """Pads axis 1 to a multiple of `block` with zeros, which are tokens of segment 0."""
  def pad(x):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))

  return jax.tree.map(pad, arrays)


def _banded(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT):
  """Causal attention of each block of queries to the last 2 or 4 blocks of keys, or to all.

  Each block of queries uses the fewest that contain all keys of its segments. Rows of 640 tokens
  with sequences of 105 on average take a third of the time of `_dense`, on CPU, forward and
  backward.
  """
  queries = q_BTNH.shape[1]
  size = -(-queries // 8)
  blocks = []
  for first in range(0, queries, size):
    last = min(first + size, queries)
    q, segment = q_BTNH[:, first:last], segment_BT[:, first:last, None]
    index = jnp.arange(last)
    code = None if code_BT is None else code_BT[:, first:last]
    allowed_BTS = (segment == segment_BT[:, None, :last]) & until(index[first:], code, index,
                                                                   queries)
    seen_S = (allowed_BTS & (segment > 0)).any((0, 1))
    needed = jnp.where(seen_S, last - index, 0).max()
    counts = [*(count * size for count in (2, 4) if count * size < last), last]
    # Only the inputs are saved for the backward pass, not the scores of every branch.
    parts = [jax.checkpoint(lambda q, k, v, allowed, keys=keys: _attend(
               q, k[:, -keys:], v[:, -keys:], allowed[:, :, -keys:])) for keys in counts]
    choice = sum(needed > keys for keys in counts[:-1])
    blocks.append(lax.switch(choice, parts, q, k_BSKH[:, :last], v_BSKH[:, :last], allowed_BTS))
  return jnp.concatenate(blocks, axis=1)


def _dense(q_BTNH, k_BSKH, v_BSKH, segment_BT, code_BT, *, causal):
  queries = q_BTNH.shape[1]
  if not causal:
    allowed_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    return _attend(q_BTNH, k_BSKH, v_BSKH, allowed_BTS)
  # Each quarter of the queries uses only the keys up to its end: 3/8 less work than the full
  # square; at T=100 on CPU 9.8 ms forward and backward, not 16.8.
  edges = sorted({queries * quarter // 4 for quarter in range(5)})
  quarters = []
  for first, last in zip(edges[:-1], edges[1:], strict=True):
    code = None if code_BT is None else code_BT[:, first:last]
    allowed_BTS = ((segment_BT[:, first:last, None] == segment_BT[:, None, :last])
                   & until(jnp.arange(first, last), code, jnp.arange(last), queries))
    quarters.append(_attend(q_BTNH[:, first:last], k_BSKH[:, :last], v_BSKH[:, :last], allowed_BTS))
  return jnp.concatenate(quarters, axis=1)


def _attend(q_BTNH, k_BSKH, v_BSKH, allowed_BTS):
  rows, queries, heads, head_dim = q_BTNH.shape
  keys, kv_heads = k_BSKH.shape[1:3]
  group = heads // kv_heads
  # The query heads of one kv head are folded into the query axis: one larger matmul per kv head.
  q = (q_BTNH * head_dim**-0.5).reshape(rows, queries, kv_heads, group, head_dim)
  q = q.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, group * queries, head_dim)
  scores = jnp.einsum("bkth,bskh->bkts", q, k_BSKH, preferred_element_type=jnp.float32)
  scores = scores.reshape(rows, kv_heads, group, queries, keys)
  scores = jnp.where(allowed_BTS[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
  weights = weights.reshape(rows, kv_heads, group * queries, keys)
  mixed = jnp.einsum("bkts,bskh->bkth", weights, v_BSKH)
  mixed = mixed.reshape(rows, kv_heads, group, queries, head_dim)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, head_dim)
