"""Continuous batching on the device: slots that decode rows and take the next one when one ends.

P prompts, C places for prompts that have been read, R prompts a read, G group, B = P*G rows (row
b = p*G + g), S slots, T response tokens, V vocabulary, D embed. All are split over the mesh's ROWS,
"slice" and "data": a device's slots answer its own prompts. Sizes in this file are those of one
device.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ares_jax.models import qwen25_vl
from ares_jax.models.decoder import KVCache
from ares_jax.ops.sampling import next_token
from ares_jax.sampling import branching as branching_lib
from ares_jax.system.mesh import ROWS, shard, size


@flax.struct.dataclass
class Prompts:
  """Places: what is computed once a prompt and shared by its G rows.

  A place is free for another prompt when all rows of its prompt have ended.
  """

  cache: KVCache  # of C prompts
  hidden: jax.Array  # [C, D]: of the last prompt token
  position: jax.Array  # int32 [C]: M-RoPE position of the first response token, all three axes
  prompt_id: jax.Array  # int32 [C]
  place: jax.Array  # int32 [P]: where each prompt was read to; C = not read yet


@flax.struct.dataclass
class Slots:
  """All that changes while rows are decoded."""

  row: jax.Array  # int32 [S]: the row in work; B = idle
  hidden: jax.Array  # [S, D]: the next token's
  cache: KVCache  # of the response so far; `length` counts its tokens
  waiting: jax.Array  # bool [B]: rows that no slot has taken yet
  ended: jax.Array  # bool [B]
  tokens: jax.Array  # int32 [B, T]
  length: jax.Array  # int32 [B]: tokens of each response
  logprob: jax.Array  # float32 [B, T]
  entropy: jax.Array  # float32 [B, T]
  fork: jax.Array  # int32 [B]: tokens that are its parent's; 0 = it starts at the prompt
  forks: jax.Array  # int32 [S]: forks of the slot's sequence; those from `given` on are to come
  given: jax.Array  # int32 [S]: the first of them, that other slots took


_ROWS, _CACHE = PartitionSpec(ROWS), PartitionSpec(None, ROWS)
_CACHES = KVCache(k=_CACHE, v=_CACHE, length=_ROWS)
_PROMPTS = Prompts(_CACHES, *[_ROWS] * 4)
_SLOTS = Slots(_ROWS, _ROWS, _CACHES, *[_ROWS] * 9)


@functools.partial(jax.jit, static_argnames=("model", "prompts", "places", "tokens"))
def empty_prompts(model, *, prompts, places, tokens):
  """Prompts of the whole mesh, none of them read: `places` of `tokens` each for `prompts`."""
  devices = size(*ROWS)
  split = functools.partial(jax.tree.map, lambda x: shard(x, ROWS))
  return Prompts(cache=_laid_out(model, qwen25_vl.empty_cache(model, places, tokens)), **split(dict(
    hidden=jnp.zeros((places, model.embed), model.compute_dtype),
    position=jnp.zeros(places, jnp.int32), prompt_id=jnp.zeros(places, jnp.int32),
    place=jnp.full(prompts, places // devices))))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="read_before")
def read_prompts(model, params, read_before, prompts, prompt_R, place_R):
  """Reads R prompts in one pass of the vision tower and of the decoder.

  Args:
    model: ModelConfig.
    params: weights, in no part split over "data".
    read_before: Prompts; donated.
    prompts: `sample`'s dict of arrays, of R prompts.
    prompt_R: int32, which of the device's P prompts they are; P is none of them.
    place_R: int32, their free places, no two alike but C, which is none.

  Returns:
    Prompts.
  """
  features = qwen25_vl.vision_features(model, params, prompts["vision"])
  embeds = qwen25_vl.embed(model, params, prompts["tokens"], prompts["unit"], features)
  hidden, cache = qwen25_vl.prefill(model, params, embeds, prompts["positions"], prompts["length"])
  # M-RoPE counts on from the largest prompt position on all three axes.
  position = prompts["positions"].max((0, 2)) + 1
  new = (_laid_out(model, cache), shard(hidden, ROWS), position, prompts["prompt_id"])
  return jax.shard_map(
    _keep, axis_names=set(ROWS), check_vma=False,
    in_specs=(_PROMPTS, (_CACHES, _ROWS, _ROWS, _ROWS), _ROWS, _ROWS),
    out_specs=_PROMPTS)(read_before, new, prompt_R, place_R)


def _keep(read_before, new, prompt_R, place_R):
  cache, *of_prompt = new

  def put(x_C, new_R):
    return x_C.at[place_R].set(new_R, mode="drop")

  before = read_before.cache
  k, v = (old.at[:, place_R].set(x, mode="drop")
          for old, x in ((before.k, cache.k), (before.v, cache.v)))
  old = read_before.hidden, read_before.position, read_before.prompt_id
  return Prompts(KVCache(k, v, put(before.length, cache.length)), *map(put, old, of_prompt),
                 read_before.place.at[prompt_R].set(place_R, mode="drop"))


def _laid_out(model, cache):
  k, v = (shard(x, None, ROWS, None, kv_axis(model)) for x in (cache.k, cache.v))
  return KVCache(k, v, shard(cache.length, ROWS))


def kv_axis(model):
  """The mesh axis that kv heads of a cache are split over, or None where they do not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if model.kv_heads % mesh.shape["model"] else "model"


@functools.partial(
  jax.jit, static_argnames=("model", "rows", "slots", "tokens", "group", "branches"))
def idle_slots(model, *, rows, slots, tokens, group, branches):
  """Slots of the whole mesh with nothing in them, for B `rows` of T `tokens`.

  All rows are waiting, but the last `branches` of a group of G, which may fork off the others.
  """
  devices = size(*ROWS)
  split = functools.partial(jax.tree.map, lambda x: shard(x, ROWS))
  return Slots(
    cache=_laid_out(model, qwen25_vl.empty_cache(model, slots, tokens)),
    **split(dict(row=jnp.full(slots, rows // devices),
                 hidden=jnp.zeros((slots, model.embed), model.compute_dtype),
                 waiting=jnp.arange(rows) % group < group - branches,
                 ended=jnp.zeros(rows, bool), fork=jnp.zeros(rows, jnp.int32),
                 forks=jnp.zeros(slots, jnp.int32), given=jnp.zeros(slots, jnp.int32),
                 tokens=jnp.zeros((rows, tokens), jnp.int32), length=jnp.zeros(rows, jnp.int32),
                 logprob=jnp.zeros((rows, tokens)), entropy=jnp.zeros((rows, tokens)))))


@functools.partial(
  jax.jit, donate_argnames="slots",
  static_argnames=("model", "group", "sampling", "end", "steps", "live"))
def decode(model, params, prompts, slots, key, allowed_V, branching, *, group, sampling, end, steps,
           live):
  """Up to `steps` tokens in every slot, without a word from the host.

  Args:
    model: ModelConfig.
    params: weights, in no part split over "data".
    prompts: Prompts.
    slots: Slots; donated.
    key: typed PRNG key.
    allowed_V: bool, tokens that may be drawn.
    branching: Branching, or None.
    group: G.
    sampling: SamplingConfig.
    end: tuple of end-of-turn token ids.
    steps: tokens a slot.
    live: response tokens that attention reads, at least `steps` more than any slot has now.

  Returns:
    Slots; bool [B], rows that have ended; int32 [1], tokens of the longest that is in a slot.
  """
  one_device = functools.partial(_decode, model, group=group, sampling=sampling, end=end,
                                 steps=steps, live=live)
  slots, ended_B, longest = jax.shard_map(
    one_device, axis_names=set(ROWS), check_vma=False,
    in_specs=(PartitionSpec(), _PROMPTS, _SLOTS, *[PartitionSpec()] * 3),
    out_specs=(_SLOTS, _ROWS, _ROWS))(params, prompts, slots, key, allowed_V, branching)
  return slots, shard(ended_B), shard(longest)  # whole, for every host to read


def _decode(model, params, prompts, slots, key, allowed_V, branching, *, group, sampling, end,
            steps, live):
  rows = len(slots.tokens)
  # In the hidden state's dtype, as the trainer's logprob_and_entropy has it.
  unembedding = qwen25_vl.unembedding(model, params).astype(slots.hidden.dtype)

  def busy(slots):
    # Devices whose loops differ would wait for each other in collectives: the largest over "data".
    # Slices would ask each other at every token, over their network; they finish the chunk instead.
    if size("slice") > 1:
      return jnp.int32(1)
    here = jnp.any(_ready(slots, prompts, group)) | jnp.any(slots.row < rows)
    return jax.lax.pmax(here.astype(jnp.int32), "data")

  def cond(carry):
    step, some_busy, _ = carry
    return (step < steps) & (some_busy > 0)

  def body(carry):
    step, _, slots = carry
    slots = _refill(slots, prompts, group)
    drawn = _draw(slots, prompts, unembedding, key, allowed_V, group, sampling, end)
    again_S = jnp.zeros_like(slots.row, bool)
    if branching is not None:
      again_S, token_S = branching_lib.replay_step(slots, group, branching)
      drawn = drawn._replace(token=jnp.where(again_S, token_S, drawn.token))
    slots, embeds, positions = _record(model, params, slots, prompts, drawn, again_S, group)
    if branching is not None:
      slots = branching_lib.note_forks(slots, group, branching)
    full_S = slots.cache.length + 1 >= sampling.max_tokens
    ended_S = full_S | jnp.isin(drawn.token, jnp.array(end))
    none = len(prompts.hidden) * group
    place_S = _place(slots, prompts, group) * group + slots.row % group
    hidden, cache = qwen25_vl.decode_step(
      model, params, embeds, positions, prompts.cache,
      jnp.where(slots.row < rows, place_S, none), slots.cache, group=group, live=live)
    ended_S &= slots.row < rows
    slots = slots.replace(
      hidden=hidden, cache=cache,
      ended=slots.ended.at[jnp.where(ended_S, slots.row, rows)].set(True, mode="drop"))
    if branching is None:
      slots = slots.replace(row=jnp.where(ended_S, rows, slots.row))
    else:
      slots = branching_lib.return_to_fork(slots, ended_S, group, branching)
    return step + 1, busy(slots), slots

  if branching is not None:
    slots = branching_lib.hand_over_forks(_refill(slots, prompts, group), group, branching, live)
  *_, slots = jax.lax.while_loop(cond, body, (jnp.int32(0), busy(slots), slots))
  return slots, slots.ended, jnp.where(slots.row < rows, slots.cache.length, 0).max()[None]


@functools.partial(jax.jit, static_argnames=("group", "branches"))
def responses(slots, row_R, *, group, branches):
  """Rows that have ended, on every device whole: int32 [R, T] tokens, int32 [R] lengths."""
  tokens_RT = slots.tokens[row_R]
  if branches:
    parent_G = jnp.asarray(branching_lib.parents(group, branches))
    shared_RT = jnp.arange(tokens_RT.shape[1]) < slots.fork[row_R][:, None]
    parent_R = row_R - row_R % group + parent_G[row_R % group]
    tokens_RT = jnp.where(shared_RT, slots.tokens[parent_R], tokens_RT)
  return shard(tokens_RT), shard(slots.length[row_R])


def _refill(slots, prompts, group):
  """Idle slots take the first rows that are ready, as long as there are any."""
  rows = len(slots.tokens)
  idle_S = slots.row >= rows
  (next_S,) = jnp.nonzero(_ready(slots, prompts, group), size=len(idle_S), fill_value=rows)
  row_S = jnp.where(idle_S, next_S[jnp.cumsum(idle_S) - 1], slots.row)
  slots = slots.replace(row=row_S.astype(jnp.int32))
  first_SD = prompts.hidden[_place(slots, prompts, group)]
  return slots.replace(
    hidden=jnp.where(idle_S[:, None], first_SD, slots.hidden),
    cache=slots.cache.replace(length=jnp.where(idle_S, 0, slots.cache.length)),
    waiting=slots.waiting.at[row_S].set(False, mode="drop"),
    forks=jnp.where(idle_S, 0, slots.forks), given=jnp.where(idle_S, 0, slots.given))


def _ready(slots, prompts, group):
  """bool [B]: rows that a slot may take, since their prompt has been read."""
  return slots.waiting & jnp.repeat(prompts.place < len(prompts.hidden), group)


def _place(slots, prompts, group):
  """int32 [S]: where each slot's prompt is; means nothing for an idle slot."""
  return prompts.place[jnp.minimum(slots.row, len(slots.tokens) - 1) // group]


def _draw(slots, prompts, unembedding, key, allowed_V, group, sampling, end):
  """The next token of every slot; its random number is of (key, prompt id, sample, position)."""
  fold = jax.vmap(jax.random.fold_in)
  prompt_id_S = prompts.prompt_id[_place(slots, prompts, group)]
  keys_S = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_id_S)
  keys_S = fold(fold(keys_S, slots.row % group), slots.cache.length)
  logits_SV = jnp.einsum("SD,VD->SV", slots.hidden, unembedding,
                         preferred_element_type=jnp.float32)
  allowed_SV = allowed_V[None]
  if sampling.min_tokens:
    is_end_V = jnp.isin(jnp.arange(len(allowed_V)), jnp.array(end))
    early_S = slots.cache.length + 1 < sampling.min_tokens
    allowed_SV = allowed_SV & ~(is_end_V & early_S[:, None])
  return next_token(logits_SV, jax.vmap(jax.random.uniform)(keys_S), allowed_SV,
                    temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)


def _record(model, params, slots, prompts, drawn, again_S, group):
  """Slots with the drawn tokens written down, and the input of the next step.

  A token that is read `again` was not drawn, and is its parent's.
  """
  at = jnp.where(again_S, len(slots.tokens), slots.row), slots.cache.length

  def write(x_BT, value_S):
    return x_BT.at[at].set(value_S, mode="drop")

  embeds = qwen25_vl.embed(model, params, drawn.token[:, None], None, None)
  position_S = prompts.position[_place(slots, prompts, group)]
  positions = jnp.broadcast_to((position_S + slots.cache.length)[:, None], (3, len(at[0]), 1))
  return slots.replace(
    tokens=write(slots.tokens, drawn.token),
    length=slots.length.at[slots.row].set(slots.cache.length + 1, mode="drop"),
    logprob=write(slots.logprob, drawn.logprob),
    entropy=write(slots.entropy, drawn.entropy)), embeds, positions
