"""Continuous batching on the device: a decoding slot takes the next row as soon as its row ends.

P prompts, C prompt slots, R prompts in one read, G group, B = P*G rows (row b = p*G + g), S
decoding slots, T response tokens, V vocabulary, D embed. The mesh axes ROWS, "slice" and "data",
split prompts, rows and slots: the slots of a device answer its own prompts. Sizes in this file are
those of one device.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ares_jax.models import qwen25_vl
from ares_jax.models.decoder import KVCache
from ares_jax.models.vision import VisionInput
from ares_jax.ops.sampling import next_token
from ares_jax.sampling import branching as branching_lib
from ares_jax.system import compiling
from ares_jax.system.mesh import ROWS, abstract, shard, size


@flax.struct.dataclass
class PromptSlots:
  """Prompts that have been read: everything the G rows of a prompt share.

  A prompt slot is reused for another prompt when all rows of its prompt have ended.
  """

  cache: KVCache  # of C prompts
  hidden: jax.Array  # [C, D]: of the last prompt token
  position: jax.Array  # int32 [C]: M-RoPE position of the first response token, all three axes
  prompt_id: jax.Array  # int32 [C]
  slot: jax.Array  # int32 [P]: the prompt slot of each prompt; C = not read yet


@flax.struct.dataclass
class Slots:
  """The decoding slots, and the responses written so far."""

  row: jax.Array  # int32 [S]: the row being decoded; B = idle
  hidden: jax.Array  # [S, D]: from which the next token is drawn
  cache: KVCache  # of the response so far; `length` counts its tokens
  waiting: jax.Array  # bool [B]: rows that no slot has taken yet
  ended: jax.Array  # bool [B]
  tokens: jax.Array  # int32 [B, T]
  length: jax.Array  # int32 [B]: tokens of each response
  logprob: jax.Array  # float32 [B, T]
  entropy: jax.Array  # float32 [B, T]
  fork: jax.Array  # int32 [B]: tokens shared with the parent; 0 = the row starts at its prompt
  forks: jax.Array  # int32 [S]: forks noted in the sequence of each slot
  given: jax.Array  # int32 [S]: forks of them that other slots took over, the first ones


_ROWS, _CACHE = PartitionSpec(ROWS), PartitionSpec(None, ROWS)
_CACHES = KVCache(k=_CACHE, v=_CACHE, length=_ROWS)
_PROMPTS = PromptSlots(_CACHES, *[_ROWS] * 4)
_SLOTS = Slots(_ROWS, _ROWS, _CACHES, *[_ROWS] * 9)


@functools.partial(jax.jit, static_argnames=("model", "prompts", "prompt_slots", "tokens"))
def empty_prompt_slots(model, *, prompts, prompt_slots, tokens):
  """PromptSlots of `tokens` tokens each, nothing read; all sizes are those of the whole mesh."""
  return _lay_out(model, shard, PromptSlots(
    cache=qwen25_vl.empty_cache(model, prompt_slots, tokens),
    hidden=jnp.zeros((prompt_slots, model.embed), model.compute_dtype),
    position=jnp.zeros(prompt_slots, jnp.int32), prompt_id=jnp.zeros(prompt_slots, jnp.int32),
    slot=jnp.full(prompts, prompt_slots // size(*ROWS), jnp.int32)))


@compiling.Announced
@functools.partial(jax.jit, static_argnames="model", donate_argnames="prompt_slots")
def read_prompts(model, params, prompt_slots, prompts, prompt_R, slot_R):
  """PromptSlots, whose old ones are donated, after one pass of vision tower and decoder.

  Args:
    model: ModelConfig.
    params: from `sampler.rollout_weights`.
    prompt_slots: PromptSlots.
    prompts: `sample`'s dict of arrays, of R prompts.
    prompt_R: int32, their numbers among the device's P prompts; P = none.
    slot_R: int32, free prompt slots they are read into, all different; C = none.
  """
  features = qwen25_vl.vision_features(model, params, prompts["vision"])
  embeds = qwen25_vl.embed(model, params, prompts["tokens"], prompts["unit"], features)
  hidden, cache = qwen25_vl.prefill(model, params, embeds, prompts["positions"], prompts["length"])
  # M-RoPE counts on from the largest prompt position on all three axes.
  position = prompts["positions"].max((0, 2)) + 1
  new = _lay_out(model, shard, PromptSlots(cache, hidden, position, prompts["prompt_id"], None))
  return jax.shard_map(
    _write_prompts, axis_names=set(ROWS), check_vma=False,
    in_specs=(_PROMPTS, _PROMPTS.replace(slot=None), _ROWS, _ROWS),
    out_specs=_PROMPTS)(prompt_slots, new, prompt_R, slot_R)


def _write_prompts(prompt_slots, new, prompt_R, slot_R):
  def write(x_C, new_R):
    return x_C.at[slot_R].set(new_R, mode="drop")

  old, cache = prompt_slots.cache, new.cache
  return PromptSlots(
    cache=KVCache(k=old.k.at[:, slot_R].set(cache.k, mode="drop"),
                  v=old.v.at[:, slot_R].set(cache.v, mode="drop"),
                  length=write(old.length, cache.length)),
    hidden=write(prompt_slots.hidden, new.hidden),
    position=write(prompt_slots.position, new.position),
    prompt_id=write(prompt_slots.prompt_id, new.prompt_id),
    slot=prompt_slots.slot.at[prompt_R].set(slot_R, mode="drop"))


def _lay_out(model, place, slots):
  """PromptSlots or Slots of `place(array, *mesh axes)` for every array."""
  k, v = (place(x, None, ROWS, None, kv_axis(model)) for x in (slots.cache.k, slots.cache.v))
  others = jax.tree.map(lambda x: place(x, ROWS), slots.replace(cache=None))
  return others.replace(cache=KVCache(k, v, place(slots.cache.length, ROWS)))


def abstract_slots(model, slots):
  """PromptSlots or Slots in shapes, with their layout on the current mesh."""
  return _lay_out(model, lambda x, *spec: abstract(x.dtype, x.shape, *spec), slots)


def abstract_prompts(model, prompts, tokens, windows):
  """The shapes of `read_prompts`'s `prompts` on the current mesh: R prompts of such sizes."""
  ints = abstract(jnp.int32, (prompts, tokens), ROWS)
  one = abstract(jnp.int32, (prompts,), ROWS)
  return dict(tokens=ints, unit=ints, length=one, prompt_id=one,
              positions=abstract(jnp.int32, (3, prompts, tokens), None, ROWS),
              vision=VisionInput.abstract(model.images, prompts, windows))


def kv_axis(model):
  """The mesh axis that splits the kv heads of a cache, or None if it does not divide them."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if model.kv_heads % mesh.shape["model"] else "model"


@functools.partial(
  jax.jit, static_argnames=("model", "rows", "slots", "tokens", "group", "branches"))
def idle_slots(model, *, rows, slots, tokens, group, branches):
  """Slots that are all idle; `rows` and `slots` are those of the whole mesh.

  All rows wait for a slot but the last `branches` of each group, which may fork from the others.
  """
  return _lay_out(model, shard, Slots(
    cache=qwen25_vl.empty_cache(model, slots, tokens),
    row=jnp.full(slots, rows // size(*ROWS), jnp.int32),
    hidden=jnp.zeros((slots, model.embed), model.compute_dtype),
    waiting=jnp.arange(rows) % group < group - branches,
    ended=jnp.zeros(rows, bool), fork=jnp.zeros(rows, jnp.int32),
    forks=jnp.zeros(slots, jnp.int32), given=jnp.zeros(slots, jnp.int32),
    tokens=jnp.zeros((rows, tokens), jnp.int32), length=jnp.zeros(rows, jnp.int32),
    logprob=jnp.zeros((rows, tokens)), entropy=jnp.zeros((rows, tokens))))


@compiling.Announced
@functools.partial(
  jax.jit, donate_argnames="slots",
  static_argnames=("model", "group", "sampling", "end", "steps", "live"))
def decode(model, params, prompt_slots, slots, key, allowed_V, branching, *, group, sampling, end,
           steps, live):
  """Decodes up to `steps` tokens in every slot; idle slots take waiting rows in between.

  Args:
    model, sampling: ModelConfig, SamplingConfig.
    params: from `sampler.rollout_weights`.
    prompt_slots: PromptSlots.
    slots: Slots; donated.
    key: typed PRNG key.
    allowed_V: bool, tokens that may be drawn.
    branching: Branching, or None.
    group: G.
    end: tuple of end-of-turn token ids.
    steps: tokens per slot.
    live: response tokens that attention reads, at least `steps` more than any slot has now.

  Returns:
    Slots; bool [B], rows that have ended; int32 [1], tokens of the longest row in a slot. The last
    two are complete on every device, for every host to read.
  """
  one_device = functools.partial(_decode, model, group=group, sampling=sampling, end=end,
                                 steps=steps, live=live)
  slots, ended_B, longest = jax.shard_map(
    one_device, axis_names=set(ROWS), check_vma=False,
    in_specs=(PartitionSpec(), _PROMPTS, _SLOTS, *[PartitionSpec()] * 3),
    out_specs=(_SLOTS, _ROWS, _ROWS))(params, prompt_slots, slots, key, allowed_V, branching)
  return slots, shard(ended_B), shard(longest)


def _decode(model, params, prompt_slots, slots, key, allowed_V, branching, *, group, sampling, end,
            steps, live):
  rows = len(slots.tokens)
  # In the hidden state's dtype, as the trainer's logprob_and_entropy has it.
  unembedding = qwen25_vl.unembedding(model, params).astype(slots.hidden.dtype)

  def step(slots):
    slots = _refill(slots, prompt_slots, group)
    drawn = _draw(slots, prompt_slots, unembedding, key, allowed_V, group, sampling, end)
    token_S, replayed_S = branching_lib.replay_parent(slots, drawn.token, group, branching)
    slots = _record(slots, token_S, drawn, replayed_S)
    slots = branching_lib.note_forks(slots, group, branching)
    at_limit_S = slots.cache.length + 1 >= sampling.max_tokens
    ended_S = (at_limit_S | jnp.isin(token_S, jnp.array(end))) & (slots.row < rows)
    slots = _read_tokens(model, params, slots, prompt_slots, token_S, group, live)
    slots = slots.replace(
      ended=slots.ended.at[jnp.where(ended_S, slots.row, rows)].set(True, mode="drop"))
    return branching_lib.release_slots(slots, ended_S, group, branching)

  def busy(slots):
    # A device whose loop ended earlier would leave the others waiting in their collectives, so
    # devices of a slice loop as long as one of them has work. Slices would ask each other at every
    # token, over their network; they all finish the chunk instead.
    if size("slice") > 1:
      return jnp.int32(1)
    here = jnp.any(_ready(slots, prompt_slots, group)) | jnp.any(slots.row < rows)
    return jax.lax.pmax(here.astype(jnp.int32), "data")

  def cond(carry):
    done, some_busy, _ = carry
    return (done < steps) & (some_busy > 0)

  def body(carry):
    done, _, slots = carry
    slots = step(slots)
    return done + 1, busy(slots), slots

  if branching is not None:
    slots = branching_lib.hand_over_forks(_refill(slots, prompt_slots, group), group, branching,
                                          live)
  *_, slots = jax.lax.while_loop(cond, body, (jnp.int32(0), busy(slots), slots))
  return slots, slots.ended, jnp.where(slots.row < rows, slots.cache.length, 0).max()[None]


@functools.partial(jax.jit, static_argnames=("group", "branches"))
def responses(slots, row_R, *, group, branches):
  """(int32 [R, T] tokens, int32 [R] lengths) of rows that have ended, complete on every device."""
  tokens_RT = slots.tokens[row_R]
  if branches:
    parent_G = jnp.asarray(branching_lib.parents(group, branches))
    shared_RT = jnp.arange(tokens_RT.shape[1]) < slots.fork[row_R][:, None]
    parent_R = row_R - row_R % group + parent_G[row_R % group]
    tokens_RT = jnp.where(shared_RT, slots.tokens[parent_R], tokens_RT)
  return shard(tokens_RT), shard(slots.length[row_R])


def _refill(slots, prompt_slots, group):
  """Lets idle slots take the first rows that are ready."""
  rows = len(slots.tokens)
  idle_S = slots.row >= rows
  (next_S,) = jnp.nonzero(_ready(slots, prompt_slots, group), size=len(idle_S), fill_value=rows)
  row_S = jnp.where(idle_S, next_S[jnp.cumsum(idle_S) - 1], slots.row)
  slots = slots.replace(row=row_S.astype(jnp.int32))
  first_SD = prompt_slots.hidden[_prompt_slot(slots, prompt_slots, group)]
  return slots.replace(
    hidden=jnp.where(idle_S[:, None], first_SD, slots.hidden),
    cache=slots.cache.replace(length=jnp.where(idle_S, 0, slots.cache.length)),
    waiting=slots.waiting.at[row_S].set(False, mode="drop"),
    forks=jnp.where(idle_S, 0, slots.forks), given=jnp.where(idle_S, 0, slots.given))


def _ready(slots, prompt_slots, group):
  """bool [B]: waiting rows whose prompt has been read."""
  return slots.waiting & jnp.repeat(prompt_slots.slot < len(prompt_slots.hidden), group)


def _prompt_slot(slots, prompt_slots, group):
  """int32 [S]: the prompt slot that each decoding slot continues; meaningless for an idle one."""
  return prompt_slots.slot[jnp.minimum(slots.row, len(slots.tokens) - 1) // group]


def _draw(slots, prompt_slots, unembedding, key, allowed_V, group, sampling, end):
  """The next token of every slot; its random number is of (key, prompt id, sample, position)."""
  fold = jax.vmap(jax.random.fold_in)
  prompt_id_S = prompt_slots.prompt_id[_prompt_slot(slots, prompt_slots, group)]
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


def _record(slots, token_S, drawn, replayed_S):
  """Slots with the tokens and their statistics written, but for replayed ones."""
  at = jnp.where(replayed_S, len(slots.tokens), slots.row), slots.cache.length

  def write(x_BT, value_S):
    return x_BT.at[at].set(value_S, mode="drop")

  return slots.replace(
    tokens=write(slots.tokens, token_S),
    length=slots.length.at[slots.row].set(slots.cache.length + 1, mode="drop"),
    logprob=write(slots.logprob, drawn.logprob), entropy=write(slots.entropy, drawn.entropy))


def _read_tokens(model, params, slots, prompt_slots, token_S, group, live):
  """Slots whose model has read one more token."""
  prompt_slot_S = _prompt_slot(slots, prompt_slots, group)
  embeds = qwen25_vl.embed(model, params, token_S[:, None], None, None)
  position_S = prompt_slots.position[prompt_slot_S] + slots.cache.length
  positions = jnp.broadcast_to(position_S[:, None], (3, len(position_S), 1))
  idle = len(prompt_slots.hidden) * group
  query_S = jnp.where(slots.row < len(slots.tokens),
                      prompt_slot_S * group + slots.row % group, idle)
  hidden, cache = qwen25_vl.decode_step(model, params, embeds, positions, prompt_slots.cache,
                                        query_S, slots.cache, group=group, live=live)
  return slots.replace(hidden=hidden, cache=cache)
