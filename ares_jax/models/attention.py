"""Attention over whole sequences: one function, and the kernel that suits the device.

TPU: splash attention; NVIDIA GPU: Pallas's fused attention for Triton; both are jax's own, keep no
[T, S] scores and know segments. Anywhere else, and for short rows, plain XLA. Which of them a
program holds is settled when it is lowered, so that a CPU host compiles for a TPU what a TPU runs.

cuDNN's attention is not used: of packed rows it would take a [T, S] mask only, and its function
cannot be traced on a host without cuDNN.

B rows, T query positions, S key positions, N query heads, K kv heads, H head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ares_jax.models.layers import MASKED

# Below, the scores of a row are small, and so is what a kernel saves.
KERNEL_TOKENS = 256
# Of queries and keys a step of a kernel works on; splash's own 128 would read the keys 4 times as
# often. Triton's backward pass has blocks of 32, which divide 128.
SPLASH_BLOCK, TRITON_BLOCK = 512, 128


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  causal: bool,
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over the keys of the query's own segment.

  The one place where attention over whole sequences is computed. A kernel is used where the very
  same `segment_BT` stands for queries and keys, a row has `KERNEL_TOKENS` or more, and the arrays
  of one device are known: under a mesh, whose "data" axis then splits the rows and whose "model"
  axis the heads, each where it divides them, or on a single device.

  Args:
    q_BTNH: queries; query heads n share kv head n // (N / K).
    k_BSKH: keys.
    v_BSKH: values.
    segment_BT: int32, segment of each query. Segment 0 is padding: its results mean nothing.
    segment_BS: int32, segment of each key.
    causal: attend to keys at or before the query's index only; needs T = S.

  Returns:
    [B, T, N, H] in q's dtype.
  """
  mesh = jax.sharding.get_abstract_mesh()
  long = q_BTNH.shape[1] >= KERNEL_TOKENS and segment_BT is segment_BS
  if not long or (mesh.empty and jax.device_count() > 1):
    return _dense(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, causal=causal)
  if mesh.empty:
    return _on_device(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal=causal)
  heads, kv_heads = q_BTNH.shape[2], k_BSKH.shape[2]
  rows_axis = "data" if q_BTNH.shape[0] % mesh.shape["data"] == 0 else None
  heads_axis = "model" if heads % mesh.shape["model"] == 0 else None
  parts = mesh.shape["model"] if heads_axis else 1
  kv_axis = heads_axis if kv_heads % parts == 0 else None

  def local(q_BTNH, k_BSKH, v_BSKH, segment_BT):
    if heads_axis and not kv_axis:
      own = _kv_heads_of_this_device(heads // parts, heads // kv_heads)
      k_BSKH, v_BSKH = (jnp.take(x, own, axis=2) for x in (k_BSKH, v_BSKH))
    return _on_device(q_BTNH, k_BSKH, v_BSKH, segment_BT, causal=causal)

  kv_spec = P(rows_axis, None, kv_axis)
  return jax.shard_map(
    local, in_specs=(P(rows_axis, None, heads_axis), kv_spec, kv_spec, P(rows_axis)),
    out_specs=P(rows_axis, None, heads_axis), check_vma=False,
  )(q_BTNH, k_BSKH, v_BSKH, segment_BT)


def _kv_heads_of_this_device(heads: int, group: int):
  """Indices of the kv heads of this device's `heads` query heads, `group` of which share one."""
  first = lax.axis_index("model") * heads
  # One where all share it, else one for each query head.
  return (first + jnp.arange(1 if group % heads == 0 else heads)) // group


def _on_device(q_BTNH, k_BSKH, v_BSKH, segment_BT, *, causal):
  def dense(q_BTNH, k_BSKH, v_BSKH, segment_BT):
    if causal:
      return _near(q_BTNH, k_BSKH, v_BSKH, segment_BT)
    return _dense(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BT, causal=False)

  return lax.platform_dependent(
    q_BTNH, k_BSKH, v_BSKH, segment_BT,
    tpu=functools.partial(_splash, causal=causal),
    cuda=functools.partial(_triton, causal=causal),
    # A conditional keeps what any of its branches needs for the backward pass. Recomputed, the
    # [T, S] of this branch are not part of the program of another platform.
    default=jax.checkpoint(dense),
  )


def _splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, *, causal):
  # Imported where they are used: small models never need Pallas (0.2 s).
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  tokens, heads, head_dim = q_BTNH.shape[1:]
  block = min(SPLASH_BLOCK, -(-tokens // 128) * 128)
  q, k, v, segment_BT = _pad(block, q_BTNH * head_dim**-0.5, k_BSKH, v_BSKH, segment_BT)
  mask = (splash.CausalMask if causal else splash.FullMask)((q.shape[1], q.shape[1]))
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([mask] * heads),
    # The fused backward kernel would write dq once for every block of keys: at T = 20480 and 28
    # heads 6 GB of it.
    block_sizes=splash.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
      block_kv_dq=block),
  )
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q=segment_BT, kv=segment_BT))
  return jnp.swapaxes(out, 1, 2)[:, :tokens]


def _triton(q_BTNH, k_BSKH, v_BSKH, segment_BT, *, causal):
  from jax.experimental.pallas.ops.gpu import attention as triton

  tokens, heads, head_dim = q_BTNH.shape[1:]
  # This kernel wants a kv head for every query head.
  k_BSNH, v_BSNH = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
  padded = _pad(TRITON_BLOCK, q_BTNH, k_BSNH, v_BSNH, segment_BT)
  return triton.mha(*padded, sm_scale=head_dim**-0.5, causal=causal)[:, :tokens]


def _pad(block, *arrays):
  """Enlarges axis 1 to a multiple of `block` with zeros: tokens of the padding segment."""
  def pad(x):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))

  return [pad(x) for x in arrays]


def _near(q_BTNH, k_BSKH, v_BSKH, segment_BT):
  """Causal attention whose queries, block by block, meet the last 2 or 4 blocks of keys, or all.

  As few as hold all that a row's segments let the block see. Rows of 640 tokens with sequences of
  105 on average take a third of the time that `_dense` takes, on CPU, forward and backward.
  """
  queries = q_BTNH.shape[1]
  size = -(-queries // 8)
  blocks = []
  for first in range(0, queries, size):
    last = min(first + size, queries)
    q, own = q_BTNH[:, first:last], segment_BT[:, first:last, None]
    index = jnp.arange(last)
    allowed_BTS = (own == segment_BT[:, None, :last]) & (index[first:, None] >= index)
    seen_S = (allowed_BTS & (own > 0)).any((0, 1))
    needed = jnp.where(seen_S, last - index, 0).max()
    counts = [*(count * size for count in (2, 4) if count * size < last), last]
    # Each keeps what goes in, not the scores of all of them.
    parts = [jax.checkpoint(lambda q, k, v, allowed, keys=keys: _attend(
               q, k[:, -keys:], v[:, -keys:], allowed[:, :, -keys:])) for keys in counts]
    choice = sum(needed > keys for keys in counts[:-1])
    blocks.append(lax.switch(choice, parts, q, k_BSKH[:, :last], v_BSKH[:, :last], allowed_BTS))
  return jnp.concatenate(blocks, axis=1)


def _dense(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, *, causal):
  queries = q_BTNH.shape[1]
  if not causal:
    allowed_BTS = segment_BT[:, :, None] == segment_BS[:, None, :]
    return _attend(q_BTNH, k_BSKH, v_BSKH, allowed_BTS)
  # Each quarter of the queries meets only the keys up to its own end: 3/8 less work than the whole
  # square; at T=100 on CPU 9.8 ms forward and backward against 16.8.
  edges = sorted({queries * quarter // 4 for quarter in range(5)})
  quarters = []
  for first, last in zip(edges[:-1], edges[1:], strict=True):
    allowed_BTS = ((segment_BT[:, first:last, None] == segment_BS[:, None, :last])
                   & (jnp.arange(first, last)[:, None] >= jnp.arange(last)))
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
