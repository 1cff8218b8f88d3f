"""Continuous batching on the device: slots that decode rows and take the next one when one ends.

P prompts, G group, B = P*G rows (row b = p*G + g), S slots, T response tokens, V vocabulary,
D embed. Prompts, rows and slots are split over the mesh's "data" axis: a device's slots answer its
own prompts, from a queue of its own. Sizes in this file are those of one device.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ares_jax.mesh import shard
from ares_jax.models import qwen25_vl
from ares_jax.models.decoder import KVCache
from ares_jax.ops.sampling import next_token


@flax.struct.dataclass
class Prompts:
  """What is computed once a prompt and shared by its G rows."""

  cache: KVCache
  hidden: jax.Array  # [P, D]: of the last prompt token
  position: jax.Array  # int32 [P]: M-RoPE position of the first response token, all three axes
  prompt_id: jax.Array  # int32 [P]


@flax.struct.dataclass
class Slots:
  """All that changes while rows are decoded."""

  row: jax.Array  # int32 [S]: the row in work; B = idle
  hidden: jax.Array  # [S, D]: the next token's
  cache: KVCache  # of the response so far; `length` counts its tokens
  taken: jax.Array  # int32 [1]: rows that the queue has given away
  tokens: jax.Array  # int32 [B, T]
  length: jax.Array  # int32 [B]: tokens of each response
  logprob: jax.Array  # float32 [B, T]
  drawn_logprob: jax.Array  # float32 [B, T]
  entropy: jax.Array  # float32 [B, T]


_ROWS, _CACHE = PartitionSpec("data"), PartitionSpec(None, "data")
_CACHES = KVCache(k=_CACHE, v=_CACHE, length=_ROWS)
_PROMPTS = Prompts(cache=_CACHES, hidden=_ROWS, position=_ROWS, prompt_id=_ROWS)
_SLOTS = Slots(_ROWS, _ROWS, _CACHES, *[_ROWS] * 6)


@functools.partial(jax.jit, static_argnames="model")
def read(model, params, prompts):
  """Prompts of `sample`'s dict of arrays: one pass of the vision tower and of the decoder."""
  features = qwen25_vl.vision_features(model, params, prompts["vision"])
  embeds = qwen25_vl.embed(model, params, prompts["tokens"], prompts["unit"], features)
  hidden, cache = qwen25_vl.prefill(model, params, embeds, prompts["positions"], prompts["length"])
  # M-RoPE counts on from the largest prompt position on all three axes.
  position = prompts["positions"].max((0, 2)) + 1
  cache = KVCache(*(shard(x, None, "data", None, kv_axis(model)) for x in (cache.k, cache.v)),
                  cache.length)
  return Prompts(cache, shard(hidden, "data"), position, prompts["prompt_id"])


def kv_axis(model):
  """The mesh axis that kv heads of a cache are split over, or None where they do not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if model.kv_heads % mesh.shape["model"] else "model"


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots", "tokens"))
def idle(model, *, rows, slots, tokens):
  """Slots with nothing in them, of the whole mesh: B `rows` in the queue, T `tokens` a response."""
  devices = jax.sharding.get_abstract_mesh().shape["data"]
  cache = qwen25_vl.empty_cache(model, slots, tokens)
  cache = KVCache(*(shard(x, None, "data", None, kv_axis(model)) for x in (cache.k, cache.v)),
                  cache.length)
  split = functools.partial(jax.tree.map, lambda x: shard(x, "data"))
  return Slots(
    cache=cache.replace(length=shard(cache.length, "data")),
    **split(dict(row=jnp.full(slots, rows // devices), taken=jnp.zeros(devices, jnp.int32),
                 hidden=jnp.zeros((slots, model.embed), model.compute_dtype),
                 tokens=jnp.zeros((rows, tokens), jnp.int32), length=jnp.zeros(rows, jnp.int32),
                 logprob=jnp.zeros((rows, tokens)), drawn_logprob=jnp.zeros((rows, tokens)),
                 entropy=jnp.zeros((rows, tokens)))))


@functools.partial(
  jax.jit, donate_argnames="slots",
  static_argnames=("model", "group", "sampling", "end", "steps", "live"))
def decode(model, params, prompts, slots, key, allowed_V, *, group, sampling, end, steps, live):
  """Up to `steps` tokens in every slot, without a word from the host.

  Args:
    model: ModelConfig.
    params: weights, in no part split over "data".
    prompts: Prompts.
    slots: Slots; donated.
    key: typed PRNG key.
    allowed_V: bool, tokens that may be drawn.
    group: G.
    sampling: SamplingConfig.
    end: tuple of end-of-turn token ids.
    steps: tokens a slot.
    live: response tokens that attention reads, at least `steps` more than any slot has now.

  Returns:
    Slots and, for every device, int32 [2]: rows that have not ended, tokens of the longest of them.
  """
  one_device = functools.partial(_decode, model, group=group, sampling=sampling, end=end,
                                 steps=steps, live=live)
  return jax.shard_map(
    one_device, axis_names={"data"}, check_vma=False,
    in_specs=(PartitionSpec(), _PROMPTS, _SLOTS, PartitionSpec(), PartitionSpec()),
    out_specs=(_SLOTS, _ROWS))(params, prompts, slots, key, allowed_V)


def _decode(model, params, prompts, slots, key, allowed_V, *, group, sampling, end, steps, live):
  rows = len(slots.tokens)
  # In the hidden state's dtype, as the trainer's logprob_and_entropy has it.
  unembedding = qwen25_vl.unembedding(model, params).astype(slots.hidden.dtype)

  def busy(slots):
    # The largest over "data": devices whose loops differ would wait for each other in collectives.
    here = (slots.taken[0] < rows) | jnp.any(slots.row < rows)
    return jax.lax.pmax(here.astype(jnp.int32), "data")

  def cond(carry):
    step, some_busy, _ = carry
    return (step < steps) & (some_busy > 0)

  def body(carry):
    step, _, slots = carry
    slots = _refill(slots, prompts, group)
    drawn = _draw(slots, prompts, unembedding, key, allowed_V, group, sampling, end)
    slots, embeds, positions = _record(model, params, slots, prompts, drawn, group)
    full_S = slots.cache.length + 1 >= sampling.max_tokens
    ended_S = full_S | jnp.isin(drawn.token, jnp.array(end))
    hidden, cache = qwen25_vl.decode_step(model, params, embeds, positions, prompts.cache,
                                          slots.row, slots.cache, group=group, live=live)
    slots = slots.replace(row=jnp.where(ended_S, rows, slots.row), hidden=hidden, cache=cache)
    return step + 1, busy(slots), slots

  *_, slots = jax.lax.while_loop(cond, body, (jnp.int32(0), busy(slots), slots))
  busy_S = slots.row < rows
  return slots, jnp.stack([rows - slots.taken[0] + busy_S.sum(),
                           jnp.where(busy_S, slots.cache.length, 0).max()])[None]


def _refill(slots, prompts, group):
  """Idle slots take the next rows of the queue, as long as there are any."""
  rows = len(slots.tokens)
  idle_S = slots.row >= rows
  row_S = jnp.where(idle_S, slots.taken[0] - 1 + jnp.cumsum(idle_S), slots.row)
  first_SD = prompts.hidden[jnp.minimum(row_S, rows - 1) // group]
  return slots.replace(
    row=jnp.minimum(row_S, rows),
    hidden=jnp.where(idle_S[:, None], first_SD, slots.hidden),
    cache=slots.cache.replace(length=jnp.where(idle_S, 0, slots.cache.length)),
    taken=jnp.minimum(slots.taken + idle_S.sum(), rows))


def _draw(slots, prompts, unembedding, key, allowed_V, group, sampling, end):
  """The next token of every slot; its random number is of (key, prompt id, sample, position)."""
  place_S = jnp.minimum(slots.row, len(slots.tokens) - 1)
  fold = jax.vmap(jax.random.fold_in)
  keys_S = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.prompt_id[place_S // group])
  keys_S = fold(fold(keys_S, place_S % group), slots.cache.length)
  logits_SV = jnp.einsum("SD,VD->SV", slots.hidden, unembedding,
                         preferred_element_type=jnp.float32)
  allowed_SV = allowed_V[None]
  if sampling.min_tokens:
    is_end_V = jnp.isin(jnp.arange(len(allowed_V)), jnp.array(end))
    early_S = slots.cache.length + 1 < sampling.min_tokens
    allowed_SV = allowed_SV & ~(is_end_V & early_S[:, None])
  return next_token(logits_SV, jax.vmap(jax.random.uniform)(keys_S), allowed_SV,
                    temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)


def _record(model, params, slots, prompts, drawn, group):
  """Slots with the drawn tokens written down, and the input of the next step."""
  at = slots.row, slots.cache.length

  def write(x_BT, value_S):
    return x_BT.at[at].set(value_S, mode="drop")

  embeds = qwen25_vl.embed(model, params, drawn.token[:, None], None, None)
  position_S = prompts.position[jnp.minimum(slots.row, len(slots.tokens) - 1) // group]
  positions = jnp.broadcast_to((position_S + slots.cache.length)[:, None], (3, len(at[0]), 1))
  return slots.replace(
    tokens=write(slots.tokens, drawn.token),
    length=slots.length.at[slots.row].set(slots.cache.length + 1, mode="drop"),
    logprob=write(slots.logprob, drawn.logprob),
    drawn_logprob=write(slots.drawn_logprob, drawn.drawn_logprob),
    entropy=write(slots.entropy, drawn.entropy)), embeds, positions
