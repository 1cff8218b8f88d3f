"""What decoding holds on the devices, and how it is laid out over the mesh.

P prompts, G group, B = P*G rows (row b = p*G + g), S decoding slots, M pages of a slot's table, T
response tokens, V vocabulary, D embed. The mesh axes ROWS, "slice" and "data", split prompts, rows,
slots and pages. Sizes in this file are those of one device.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ares_jax.models import paged
from ares_jax.sampling import branching as branching_lib
from ares_jax.sampling import pages
from ares_jax.system.mesh import ROWS, abstract, shard, size


@flax.struct.dataclass
class Prompts:
  """What the G rows of each prompt share, from when it is read until its last row has ended."""

  read: jax.Array  # bool [P]: its pages are held
  table: jax.Array  # int32 [P, pages]
  length: jax.Array  # int32 [P]
  hidden: jax.Array  # [P, D]: of the last prompt token
  position: jax.Array  # int32 [P]: M-RoPE position of the first response token, all three axes
  prompt_id: jax.Array  # int32 [P]
  scales: paged.Scales | None = None  # [P, L, K, H], if pages hold int8


@flax.struct.dataclass
class Slots:
  """The decoding slots, and the responses written so far."""

  row: jax.Array  # int32 [S]: the row being decoded; B = idle
  hidden: jax.Array  # [S, D]: from which the next token is drawn
  table: jax.Array  # int32 [S, M]: pages of the prompt and of the response so far
  done: jax.Array  # int32 [S]: response tokens whose keys and values are in the pages
  waiting: jax.Array  # bool [B]: rows that no slot has taken yet, or that were put back
  ended: jax.Array  # bool [B]
  tokens: jax.Array  # int32 [B, T]
  length: jax.Array  # int32 [B]: tokens of each response
  logprob: jax.Array  # float32 [B, T]
  entropy: jax.Array  # float32 [B, T]
  fork: jax.Array  # int32 [B]: tokens shared with the parent; 0 = the row starts at its prompt
  forks: jax.Array  # int32 [S]: forks noted in the sequence of each slot
  given: jax.Array  # int32 [B]: forks of a row that other slots took over, the first ones
  limit: jax.Array  # int32 [1]: slots that may be busy
  redrawn: jax.Array  # int32 [1]: tokens of rows that were put back


@flax.struct.dataclass
class State:
  """All that decoding holds on the devices, but for the weights."""

  pool: pages.Pool
  prompts: Prompts
  slots: Slots


@flax.struct.dataclass
class Status:
  """What the host learns after a chunk; complete on every device, for every host to read."""

  ended: jax.Array  # bool [B]
  length: jax.Array  # int32 [B]: tokens of each response so far
  done: jax.Array  # int32 [S]: tokens of the row in each slot; -1 = idle
  redrawn: jax.Array  # int32 [devices]


@flax.struct.dataclass
class Drawing:
  """How responses are drawn: the same for all of them."""

  key: jax.Array  # typed PRNG key
  allowed_V: jax.Array  # bool, tokens that may be drawn; statistics are of all of V
  branching: branching_lib.Branching | None  # None: every response starts at its prompt
  group: int = flax.struct.field(pytree_node=False)  # G
  sampling: object = flax.struct.field(pytree_node=False)  # SamplingConfig
  end: tuple = flax.struct.field(pytree_node=False)  # end-of-turn token ids

  @property
  def branches(self):
    """Samples of a group that may be forks."""
    return self.branching.branches if self.branching else 0


@functools.partial(jax.jit, static_argnames=("model", "sizes", "branches"))
def empty_state(model, sizes, branches):
  """State in which nothing is read and all slots are idle.

  All rows wait for a slot but the last `branches` of each group, which may fork from the others.
  `sizes` is a `scheduler.CachePlan`.
  """
  devices = size(*ROWS)
  prompts, slots, held = (devices * count for count in (sizes.prompts, sizes.slots, sizes.pages))
  rows, tokens, empty = prompts * sizes.group, sizes.tokens, sizes.pages
  dtype = jnp.int8 if sizes.int8 else model.compute_dtype
  scale = jnp.zeros((prompts, model.layers, model.kv_heads, model.head_dim))
  return _lay_out(model, shard, State(
    pool=pages.Pool(paged.empty_pages(model, held, sizes.page_tokens, dtype),
                    jnp.zeros(held, jnp.int32)),
    prompts=Prompts(
      read=jnp.zeros(prompts, bool),
      table=jnp.full((prompts, sizes.prompt_pages), empty, jnp.int32),
      length=jnp.zeros(prompts, jnp.int32),
      hidden=jnp.zeros((prompts, model.embed), model.compute_dtype),
      position=jnp.zeros(prompts, jnp.int32), prompt_id=jnp.zeros(prompts, jnp.int32),
      scales=paged.Scales(scale, scale) if sizes.int8 else None),
    slots=Slots(
      row=jnp.full(slots, rows // devices, jnp.int32),
      hidden=jnp.zeros((slots, model.embed), model.compute_dtype),
      table=jnp.full((slots, sizes.row_pages), empty, jnp.int32),
      done=jnp.zeros(slots, jnp.int32), forks=jnp.zeros(slots, jnp.int32),
      waiting=jnp.arange(rows) % sizes.group < sizes.group - branches,
      ended=jnp.zeros(rows, bool), fork=jnp.zeros(rows, jnp.int32),
      given=jnp.zeros(rows, jnp.int32),
      tokens=jnp.zeros((rows, tokens), jnp.int32), length=jnp.zeros(rows, jnp.int32),
      logprob=jnp.zeros((rows, tokens)), entropy=jnp.zeros((rows, tokens)),
      limit=jnp.zeros(devices, jnp.int32), redrawn=jnp.zeros(devices, jnp.int32))))


def abstract_state(model, sizes, branches):
  """The shapes of `empty_state`, with their layout on the current mesh."""
  shapes = jax.eval_shape(functools.partial(empty_state, model, sizes, branches))
  return _lay_out(model, lambda x, *spec: abstract(x.dtype, x.shape, *spec), shapes)


def _lay_out(model, place, state):
  """State of `place(array, *mesh axes)` for every array."""
  laid = jax.tree.map(lambda x: place(x, ROWS), state.replace(pool=state.pool.holders))
  held = jax.tree.map(lambda x: place(x, kv_axis(model), ROWS), state.pool.pages)
  return laid.replace(pool=pages.Pool(held, laid.pool))


def specs(state):
  """PartitionSpecs of a State for a `jax.shard_map` over ROWS."""
  return jax.tree.map(lambda _: PartitionSpec(ROWS), state).replace(
    pool=pages.Pool(paged.Pages(*[PartitionSpec(None, ROWS)] * 2), PartitionSpec(ROWS)))


def kv_axis(model):
  """The mesh axis that splits the kv heads of the pages, or None if it does not divide them."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if model.kv_heads % mesh.shape["model"] else "model"
