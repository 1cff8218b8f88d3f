"""Attention of decoding: keys and values in pages, of which each row reads its own.

A pool holds pages of A tokens. A row's table names the pages of its prompt and of what it has read
since; rows of one prompt name the same pages. In bfloat16 a kernel that is part of jax reads a
row's pages up to its length and nothing else: on TPUs `pallas.ops.tpu.paged_attention` (heads of a
multiple of 128), on NVIDIA GPUs `pallas.ops.gpu.paged_attention` (heads of a power of 2). Elsewhere
plain XLA reads a prompt once for all its rows, and of responses either as many tokens of every row
as the longest has, or all pages of the pool, whichever are fewer.

Pages may hold int8. A number of a page then stands for itself times a scale, which the rows of a
prompt share; each layer, kv head and feature has its own. So queries take the scales of keys before
attention, and its results those of values: whatever reads the pages needs no scales. (The TPU
kernel of jax takes a scale a token, but reads it as an array as large as the pages, in float32.)

B rows, M pages of a row, C prompts, Z pages of the pool, A tokens of a page, L layers, K kv heads,
Q query heads of a kv head, H head size.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ares_jax.models.layers import MASKED

TABLE_BYTES = 2**19  # of the tables of one call: a TPU keeps them in scalar memory, of 1 MiB
BLOCK_PAGES = 8  # pages that a step of a kernel takes; tables are as wide as a multiple of it
INT8_MOST = 127
# The largest key or value that int8 pages hold, in the largest of the prompt. With 1, 1.5 and 2 the
# mean gap of SmolLM2-135M to exact log-probabilities is 0.097, 0.051 and 0.070 nats a token.
RANGE = 1.5


@flax.struct.dataclass
class Pages:
  """A device's keys and values; page z of layer l is at l * Z + z, so no layer is ever copied."""

  k: jax.Array  # [K, L * Z, A, H] compute dtype or int8, rotated
  v: jax.Array  # [K, L * Z, A, H] compute dtype or int8


@flax.struct.dataclass
class Scales:
  """What the numbers of int8 pages are multiplied by, of each prompt or row."""

  k: jax.Array  # float32 [..., K, H]
  v: jax.Array  # float32 [..., K, H]


@flax.struct.dataclass
class Reads:
  """What the rows of one decoding step read, and where they write."""

  table: jax.Array  # int32 [B, M]: pages of each row, those of its prompt first
  length: jax.Array  # int32 [B]: tokens of the row before the new one, its prompt's included
  active: jax.Array  # bool [B]: False for an idle row, which writes nothing
  prompt_length: jax.Array  # int32 [B]: tokens of the row's prompt
  own: tuple | None  # from `own_pages`, for XLA; None: it reads as many tokens of all rows
  # For XLA, which reads a prompt once for its rows:
  prompts: jax.Array  # int32 [C, pages]: tables of the prompts that rows continue
  prompts_length: jax.Array  # int32 [C]
  query: jax.Array  # int32 [B]: c * G + g for row g of prompt c, all different; C * G = idle
  group: int = flax.struct.field(pytree_node=False)  # G
  prompt_tokens: int = flax.struct.field(pytree_node=False)  # read of a prompt: the longest's
  live: int = flax.struct.field(pytree_node=False)  # read of a response, > tokens of the longest
  # Of int8 pages: of the rows in each layer, [L, B, K, H]; `write_token` and `attend` want those of
  # their layer.
  scales: Scales | None = None


def empty_pages(config, pages, tokens, dtype):
  """Pages of a ModelConfig: `pages` of `tokens` tokens in every layer."""
  zeros = jnp.zeros((config.kv_heads, config.layers * pages, tokens, config.head_dim), dtype)
  return Pages(zeros, zeros)


def prompt_scales(k_LCTKH, v_LCTKH, length_C):
  """Scales [C, L, K, H] by which the keys and values of prompts and of their responses fit int8.

  The largest of a prompt becomes INT8_MOST / RANGE. Rotation turns two features of a key into each
  other, so both have the scale of the pair's length, which is the same at every position.
  """
  seen_CT111 = (jnp.arange(k_LCTKH.shape[2]) < length_C[:, None])[..., None, None]

  def scale(x_LCTKH):
    largest_LCKH = jnp.where(seen_CT111, jnp.abs(x_LCTKH), 0).max(2).astype(jnp.float32)
    return jnp.moveaxis(largest_LCKH, 0, 1) * (RANGE / INT8_MOST)

  first, second = jnp.split(k_LCTKH.astype(jnp.float32), 2, axis=-1)
  pair = jnp.hypot(first, second)
  return Scales(scale(jnp.concatenate([pair, pair], -1)), scale(v_LCTKH))


def to_int8(x, scale):
  """int8 of x by its scale; those that do not fit become the largest that do."""
  x = jnp.round(x.astype(jnp.float32) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny))
  return jnp.clip(x, -INT8_MOST, INT8_MOST).astype(jnp.int8)


def of_layers(layers, page, pages):
  """int [L, ...]: where `page` of each layer is; beyond all pages where it is Z."""
  total = pages.k.shape[1]
  first_L = total // layers * jnp.arange(layers).reshape(-1, *[1] * jnp.ndim(page))
  return jnp.where(page < total // layers, first_L + page, total)


def write_prompts(pages, table_CM, k_LCTKH, v_LCTKH):
  """Pages with the keys and values of prompts; entries of Z in their tables are not written.

  Both have the dtype of the pages.
  """
  tokens = pages.k.shape[2]
  at_LCM = of_layers(len(k_LCTKH), table_CM, pages)

  def write(x_KXAH, new_LCTKH):
    layers, prompts, length, heads, head_dim = new_LCTKH.shape
    padding = table_CM.shape[1] * tokens - length
    new = jnp.pad(new_LCTKH, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
    new = new.reshape(layers, prompts, table_CM.shape[1], tokens, heads, head_dim)
    return x_KXAH.at[:, at_LCM].set(jnp.moveaxis(new, 4, 0), mode="drop")

  return Pages(write(pages.k, k_LCTKH), write(pages.v, v_LCTKH))


def copy_page(pages, layers, source, to):
  """Pages with page `to` of every layer as page `source`."""
  # Not slices of an array by layer: then XLA copies all pages first.
  source_L, to_L = of_layers(layers, source, pages), of_layers(layers, to, pages)
  return Pages(*(x.at[:, to_L].set(x[:, source_L], mode="drop") for x in (pages.k, pages.v)))


def write_token(pages, reads, first, k_BKH, v_BKH):
  """Pages with a token's keys and values for each row, in the layer whose pages begin at `first`.

  A page that a row writes to must be in no other table.
  """
  tokens, total = pages.k.shape[2], pages.k.shape[1]
  page_B = jnp.take_along_axis(reads.table, (reads.length // tokens)[:, None], 1)[:, 0]
  page_B = jnp.where(reads.active, first + page_B, total)
  if reads.scales is not None:
    k_BKH, v_BKH = to_int8(k_BKH, reads.scales.k), to_int8(v_BKH, reads.scales.v)
  return _by_heads(_write, pages, k_BKH, v_BKH, page_B, reads.length % tokens,
                   axes=(1, 1, None, None), out=0)


def _write(pages, k_BKH, v_BKH, page_B, offset_B):
  # With heads and pages as one axis: a scatter of all heads of a token would lay out the pages head
  # by head, other than the kernel does, and XLA would copy them all in every layer.
  heads, total, tokens, head_dim = pages.k.shape
  at_KB = total * jnp.arange(heads)[:, None] + page_B
  at_KB = jnp.where(page_B < total, at_KB, heads * total)

  def write(x_KXAH, new_BKH):
    x_YAH = x_KXAH.reshape(heads * total, tokens, head_dim)
    new_KBH = jnp.moveaxis(new_BKH, 1, 0)
    return x_YAH.at[at_KB, offset_B].set(new_KBH, mode="drop").reshape(x_KXAH.shape)

  return Pages(write(pages.k, k_BKH), write(pages.v, v_BKH))


def attend(q_BKQH, pages, reads, first):
  """Attention of a token of each row to its pages, after `write_token`: float32 [B, K, Q, H].

  `q_BKQH` is scaled by 1 / sqrt(H). Results of idle rows are meaningless.
  """
  kernels = {
    platform: functools.partial(_by_kernel, kernel=kernel)
    for platform, kernel in (("tpu", _tpu), ("cuda", _gpu))
    if has_kernel(platform, q_BKQH.shape[-1], pages.k.dtype, pages.k.shape[2])}
  if reads.scales is not None:
    q_BKQH = q_BKQH * reads.scales.k[:, :, None]  # float32, as _by_xla then computes
  mixed = lax.platform_dependent(q_BKQH, pages, reads, first, **kernels, default=_by_xla)
  return mixed if reads.scales is None else mixed * reads.scales.v[:, :, None]


def has_kernel(platform, head_dim, dtype, tokens):
  """Whether "tpu" or "cuda" has a kernel for such heads and pages of so many tokens."""
  # Not float32: the one rounds keys to bfloat16, the other to tf32.
  if platform == "tpu":
    return dtype in (jnp.bfloat16, jnp.int8) and head_dim % 128 == 0
  return (dtype == jnp.bfloat16 and head_dim >= 16 and head_dim & (head_dim - 1) == 0
          and tokens >= 16)


def _by_kernel(q_BKQH, pages, reads, first, *, kernel):
  table_BM = jnp.minimum(reads.table + first, pages.k.shape[1] - 1)
  # An idle row reads one token of some page.
  length_B = jnp.where(reads.active, reads.length + 1, 1)
  return _by_heads(kernel, pages, q_BKQH, table_BM, length_B, axes=(1, None, None), out=1)


def _by_heads(f, pages, *arguments, axes, out):
  """f(pages, *arguments) on each device's kv heads, where "model" divides them.

  They are on `axes` of the arguments and on axis `out` of the result; None = on none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = set(mesh.axis_names) - set(mesh.manual_axes)  # a kernel has to be mapped over all of them
  if "model" not in free:
    return f(pages, *arguments)
  name = None if pages.k.shape[0] % mesh.shape["model"] else "model"
  specs = [PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)
           for axis in (0, *axes, out)]
  return jax.shard_map(f, axis_names=free, check_vma=False, in_specs=tuple(specs[:-1]),
                       out_specs=specs[-1])(pages, *arguments)


def _tpu(pages, q_BKQH, table_BM, length_B):
  # Imported here because Pallas takes 0.2 s.
  from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

  rows, kv_heads, queries, head_dim = q_BKQH.shape
  q_BNH = q_BKQH.reshape(rows, kv_heads * queries, head_dim).astype(jnp.float32)
  calls = -(-4 * table_BM.size // TABLE_BYTES)
  parts = zip(*(jnp.array_split(x, calls) for x in (q_BNH, length_B, table_BM)), strict=True)
  return jnp.concatenate([
    paged_attention(q, pages.k, pages.v, length, table, pages_per_compute_block=BLOCK_PAGES)
    for q, length, table in parts]).reshape(q_BKQH.shape)


def _gpu(pages, q_BKQH, table_BM, length_B):
  from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

  rows, kv_heads, queries, head_dim = q_BKQH.shape
  out = paged_attention(
    q_BKQH.reshape(rows, kv_heads * queries, head_dim).astype(pages.k.dtype), pages.k, pages.v,
    table_BM, length_B, pages_per_compute_block=BLOCK_PAGES,
    k_splits=table_BM.shape[1] // BLOCK_PAGES)
  return out.reshape(q_BKQH.shape).astype(jnp.float32)


def _by_xla(q_BKQH, pages, reads, first):
  own = _own_pages if reads.own is not None else _own_tokens
  prompts = _tokens(pages, reads.prompts, first, jnp.arange(reads.prompt_tokens)[None],
                    q_BKQH.dtype)
  seen_CT = jnp.arange(reads.prompt_tokens) < reads.prompts_length[:, None]
  of_prompt = _attend_prompts(q_BKQH, *prompts, seen_CT, reads.query, reads.group)
  return _combine(of_prompt, own(q_BKQH, pages, reads, first))


def _own_tokens(q_BKQH, pages, reads, first):
  """`_partial` of each row to its response, as long as the longest."""
  index_S = jnp.arange(reads.live)
  response = _tokens(pages, reads.table, first, reads.prompt_length[:, None] + index_S,
                     q_BKQH.dtype)
  seen_BS = index_S <= (reads.length - reads.prompt_length)[:, None]
  return _partial(q_BKQH, *response, seen_BS)


def _own_pages(q_BKQH, pages, reads, first):
  """The same by pages: all of the pool are read once, and no others."""
  (row_Z, index_Z), rows = reads.own, len(q_BKQH)
  k_KZAH, v_KZAH = (lax.dynamic_slice_in_dim(x, first, len(row_Z), axis=1).astype(q_BKQH.dtype)
                    for x in (pages.k, pages.v))
  row_Z, held_Z = jnp.minimum(row_Z, rows - 1), row_Z < rows
  index_ZA = index_Z[:, None] * k_KZAH.shape[2] + jnp.arange(k_KZAH.shape[2])
  seen_ZA = ((index_ZA >= reads.prompt_length[row_Z][:, None])
             & (index_ZA <= reads.length[row_Z][:, None]) & held_Z[:, None])
  mixed, total, largest = _partial(q_BKQH[row_Z], k_KZAH, v_KZAH, seen_ZA)
  largest_B = jnp.full((rows, *largest.shape[1:]), MASKED, largest.dtype).at[row_Z].max(
    jnp.where(held_Z[:, None, None, None], largest, MASKED))
  scale = jnp.where(held_Z[:, None, None, None], jnp.exp(largest - largest_B[row_Z]), 0)
  mixed, total = (jnp.zeros((rows, *x.shape[1:]), x.dtype).at[row_Z].add(x * scale)
                  for x in (mixed, total))
  return mixed, total, largest_B


def own_pages(table_BM, length_B, prompt_length_B, active_B, pages, tokens):
  """(int32 [Z], int32 [Z]): the row whose own page each one is, B = none, and its place there.

  Pages that rows share hold tokens of a prompt alone, unless there are forks.
  """
  rows, index_M = jnp.arange(len(table_BM))[:, None], jnp.arange(table_BM.shape[1])
  own_BM = (active_B[:, None] & (index_M >= (prompt_length_B // tokens)[:, None])
            & (index_M <= (length_B // tokens)[:, None]))
  at_BM = jnp.where(own_BM, table_BM, pages)
  row_Z = jnp.full(pages, len(table_BM), jnp.int32).at[at_BM].set(rows, mode="drop")
  return row_Z, jnp.zeros(pages, jnp.int32).at[at_BM].set(index_M, mode="drop")


def _tokens(pages, table_BM, first, index_BS, dtype):
  """Keys and values [K, B, S, H] of tokens of each row; of int8 pages, their numbers."""
  tokens = pages.k.shape[2]
  index_BS = jnp.broadcast_to(index_BS, (len(table_BM), index_BS.shape[1]))
  page_BS = jnp.take_along_axis(table_BM, index_BS // tokens, 1, mode="clip") + first
  at_BS = page_BS * tokens + index_BS % tokens
  return [x.reshape(len(x), -1, x.shape[-1]).at[:, at_BS].get(mode="clip").astype(dtype)
          for x in (pages.k, pages.v)]


def _partial(q_BKQH, k_KBSH, v_KBSH, seen_BS):
  """Unnormalised attention to some of the keys: (mixed values, sum of weights, largest score)."""
  scores = jnp.einsum("bkqh,kbsh->bkqs", q_BKQH, k_KBSH, preferred_element_type=jnp.float32)
  scores = jnp.where(seen_BS[:, None, None], scores, MASKED)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  mixed = jnp.einsum("bkqs,kbsh->bkqh", weights.astype(v_KBSH.dtype), v_KBSH,
                     preferred_element_type=jnp.float32)
  return mixed, weights.sum(-1, keepdims=True), largest


def _attend_prompts(q_BKQH, k_KCTH, v_KCTH, seen_CT, query_B, group):
  """`_partial` of each row to its prompt, in one matmul for all rows of a prompt."""
  prompts, (_, kv_heads, queries, head_dim) = len(seen_CT), q_BKQH.shape
  table = jnp.zeros((prompts * group, *q_BKQH.shape[1:]), q_BKQH.dtype)
  table = table.at[query_B].set(q_BKQH, mode="drop").reshape(prompts, group, *q_BKQH.shape[1:])
  q_CKQH = jnp.moveaxis(table, 1, 2).reshape(prompts, kv_heads, group * queries, head_dim)

  def of_rows(x_CKQx):
    x = x_CKQx.reshape(prompts, kv_heads, group, queries, -1)
    x_RKQx = jnp.moveaxis(x, 2, 1).reshape(prompts * group, kv_heads, queries, -1)
    return x_RKQx.at[query_B].get(mode="clip")

  return [of_rows(x) for x in _partial(q_CKQH, k_KCTH, v_KCTH, seen_CT)]


def _combine(first, second):
  """Attention over the keys of two results of `_partial`."""
  largest = jnp.maximum(first[2], second[2])
  scale = [jnp.exp(part[2] - largest) for part in (first, second)]
  mixed, total = (first[index] * scale[0] + second[index] * scale[1] for index in (0, 1))
  return mixed / total
