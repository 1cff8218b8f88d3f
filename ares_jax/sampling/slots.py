"""Continuous batching on the device: a decoding slot takes the next row as soon as its row ends.

P prompts, R prompts in one read, G group, B = P*G rows (row b = p*G + g), S decoding slots, M pages
of a slot's table, T response tokens, V vocabulary, D embed. The mesh axes ROWS, "slice" and "data",
split prompts, rows, slots and pages: the slots of a device answer its own prompts from its own
pages. Sizes in this file are those of one device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ares_jax.models import paged, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.ops.sampling import next_token
from ares_jax.sampling import branching as branching_lib
from ares_jax.sampling import pages
from ares_jax.sampling.state import Status, kv_axis, specs
from ares_jax.system import compiling
from ares_jax.system.mesh import ROWS, abstract, shard, size


def abstract_prompts(model, prompts, tokens, windows):
  """The shapes of `read_prompts`'s `prompts` on the current mesh: R prompts of such sizes."""
  ints = abstract(jnp.int32, (prompts, tokens), ROWS)
  one = abstract(jnp.int32, (prompts,), ROWS)
  return dict(tokens=ints, unit=ints, length=one, prompt_id=one,
              positions=abstract(jnp.int32, (3, prompts, tokens), None, ROWS),
              vision=VisionInput.abstract(model.images, prompts, windows))


@compiling.Announced
@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def read_prompts(model, params, state, prompts, prompt_R):
  """State, whose old one is donated, after one pass of vision tower and decoder.

  Args:
    model: ModelConfig.
    params: from `sampler.rollout_weights`.
    state: State; enough of its pages are free.
    prompts: `sample`'s dict of arrays, of R prompts.
    prompt_R: int32, their numbers among the device's P prompts; P = none.
  """
  features = qwen25_vl.vision_features(model, params, prompts["vision"])
  embeds = qwen25_vl.embed(model, params, prompts["tokens"], prompts["unit"], features)
  hidden, k, v = qwen25_vl.prefill(model, params, embeds, prompts["positions"], prompts["length"])
  scales = None
  if state.prompts.scales is not None:
    scales = paged.prompt_scales(k, v, prompts["length"])
    k, v = (paged.to_int8(x, jnp.moveaxis(scale, 1, 0)[:, :, None])
            for x, scale in ((k, scales.k), (v, scales.v)))
  k, v = (shard(x, None, ROWS, None, kv_axis(model)) for x in (k, v))
  # M-RoPE counts on from the largest prompt position on all three axes.
  new = dict(length=prompts["length"], hidden=hidden, prompt_id=prompts["prompt_id"],
             scales=scales, position=prompts["positions"].max((0, 2)) + 1)
  new = jax.tree.map(lambda x: shard(x, ROWS), new)
  cache, rows = PartitionSpec(None, ROWS), PartitionSpec(ROWS)
  return jax.shard_map(
    _write_prompts, axis_names=set(ROWS), check_vma=False,
    in_specs=(specs(state), cache, cache, jax.tree.map(lambda _: rows, new), rows),
    out_specs=specs(state))(state, k, v, new, prompt_R)


def _write_prompts(state, k, v, new, prompt_R):
  prompts, pool = state.prompts, state.pool
  count_R = jnp.where(prompt_R < len(prompts.read), pages.count(pool.tokens, new["length"]), 0)
  pool, table_RM = pages.take_prompts(pool, count_R, prompts.table.shape[1])
  new = new | {"table": table_RM, "read": count_R > 0}
  written = jax.tree.map(lambda old, value: old.at[prompt_R].set(value, mode="drop"),
                         {name: getattr(prompts, name) for name in new}, new)
  return state.replace(
    pool=pool.replace(pages=paged.write_prompts(pool.pages, table_RM, k, v)),
    prompts=prompts.replace(**written))


@compiling.Announced
@functools.partial(
  jax.jit, donate_argnames="state", static_argnames=("model", "tokens", "steps", "live"))
def decode(model, params, state, drawing, limit, *, tokens, steps, live):
  """Decodes up to `steps` tokens in every slot; idle slots take waiting rows in between.

  Args:
    model: ModelConfig.
    params: from `sampler.rollout_weights`.
    state: State; donated.
    drawing: Drawing.
    limit: int32 [devices], slots of each device that may be busy.
    tokens: of the longest prompt, padding included.
    steps: tokens per slot.
    live: response tokens that attention reads without a kernel, at least `steps` more than any slot
      has now.

  Returns:
    State and Status.
  """
  one_device = functools.partial(_decode, model, tokens=tokens, steps=steps, live=live)
  rows, whole = PartitionSpec(ROWS), PartitionSpec()
  state = state.replace(slots=state.slots.replace(limit=limit))
  state, status = jax.shard_map(
    one_device, axis_names=set(ROWS), check_vma=False, in_specs=(whole, specs(state), whole),
    out_specs=(specs(state), Status(*[rows] * 4)))(params, state, drawing)
  return state, jax.tree.map(shard, status)


def _decode(model, params, state, drawing, *, tokens, steps, live):
  rows, group, branching = len(state.slots.tokens), drawing.group, drawing.branching
  # In the hidden state's dtype, as the trainer's logprob_and_entropy has it.
  unembedding = qwen25_vl.unembedding(model, params).astype(state.slots.hidden.dtype)

  def step(state):
    state = _give_pages(model, _refill(state, group), drawing)
    slots = state.slots
    drawn = _draw(slots, state.prompts, unembedding, drawing)
    token_S, replayed_S = branching_lib.replay_parent(slots, drawn.token, group, branching)
    slots = _record(slots, token_S, drawn, replayed_S)
    slots = branching_lib.note_forks(slots, group, branching)
    at_limit_S = slots.done + 1 >= drawing.sampling.max_tokens
    ended_S = (at_limit_S | jnp.isin(token_S, jnp.array(drawing.end))) & (slots.row < rows)
    state = _read_tokens(model, params, state.replace(slots=slots), token_S, group, tokens, live,
                         branching is not None)
    return _release(state, ended_S, group, branching)

  def busy(state):
    # A device whose loop ended earlier would leave the others waiting in their collectives, so
    # devices of a slice loop as long as one of them has work. Slices would ask each other at every
    # token, over their network; they all finish the chunk instead.
    if size("slice") > 1:
      return jnp.int32(1)
    here = jnp.any(_ready(state, group)) | jnp.any(state.slots.row < rows)
    return jax.lax.pmax(here.astype(jnp.int32), "data")

  def cond(carry):
    done, some_busy, _ = carry
    return (done < steps) & (some_busy > 0)

  def body(carry):
    done, _, state = carry
    state = step(state)
    return done + 1, busy(state), state

  if branching is not None:
    state = branching_lib.hand_over_forks(_refill(state, group), group, branching)
  *_, state = jax.lax.while_loop(cond, body, (jnp.int32(0), busy(state), state))
  state, slots = _release_prompts(state, group), state.slots
  return state, Status(slots.ended, slots.length, jnp.where(slots.row < rows, slots.done, -1),
                       slots.redrawn)


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


def _refill(state, group):
  """Lets idle slots take the first rows that are ready, while fewer than the limit are busy."""
  slots, prompts, rows = state.slots, state.prompts, len(state.slots.tokens)
  idle_S = slots.row >= rows
  number_S = jnp.cumsum(idle_S) - 1  # among the idle slots
  (next_S,) = jnp.nonzero(_ready(state, group), size=len(idle_S), fill_value=rows)
  free_S = idle_S & (number_S < slots.limit[0] - (~idle_S).sum())
  row_S = jnp.where(free_S, next_S[number_S], slots.row).astype(jnp.int32)
  started_S = idle_S & (row_S < rows)
  prompt_S = _prompt(row_S, rows, group)
  width = slots.table.shape[1] - prompts.table.shape[1]
  table_SM = jnp.pad(prompts.table[prompt_S], ((0, 0), (0, width)),
                     constant_values=len(state.pool.holders))
  empty_SM = jnp.full_like(table_SM, len(state.pool.holders))
  pool = pages.hold(state.pool, jnp.where(started_S[:, None], table_SM, empty_SM), 1)
  return state.replace(pool=pool, slots=slots.replace(
    row=row_S, table=jnp.where(started_S[:, None], table_SM, slots.table),
    hidden=jnp.where(started_S[:, None], prompts.hidden[prompt_S], slots.hidden),
    done=jnp.where(started_S, 0, slots.done), forks=jnp.where(started_S, 0, slots.forks),
    waiting=slots.waiting.at[jnp.where(started_S, row_S, rows)].set(False, mode="drop")))


def _ready(state, group):
  """bool [B]: waiting rows whose prompt has been read."""
  return state.slots.waiting & jnp.repeat(state.prompts.read, group)


def _prompt(row_S, rows, group):
  """int32 [S]: the prompt that each slot's row answers; meaningless for an idle slot."""
  return jnp.minimum(row_S, rows - 1) // group


def _cached(state, group):
  """int32 [S]: tokens of each slot in its pages, prompt included."""
  prompt_S = _prompt(state.slots.row, len(state.slots.tokens), group)
  return state.prompts.length[prompt_S] + state.slots.done


def _give_pages(model, state, drawing):
  """Gives every busy slot the page it writes next; where too few are free, rows are put back."""
  rows, group = len(state.slots.tokens), drawing.group

  def wanting(state):
    slots = state.slots
    return pages.wanting(state.pool, slots.table, _cached(state, group), slots.row < rows)

  state = jax.lax.while_loop(
    lambda state: wanting(state).sum() > (state.pool.holders == 0).sum(),
    functools.partial(_put_back_youngest, group=group, branching=drawing.branching), state)
  pool, table_SM = pages.take(state.pool, state.slots.table, _cached(state, group), wanting(state),
                              model.layers)
  return state.replace(pool=pool, slots=state.slots.replace(table=table_SM))


def _put_back_youngest(state, *, group, branching):
  """Puts the row with the fewest tokens back: it waits again, and its pages are free.

  The longest one stays, and a CachePlan has pages for it, so every round of rows gets further.
  """
  slots, rows = state.slots, len(state.slots.tokens)
  busy_S = slots.row < rows
  done_S = jnp.where(busy_S, slots.done, jnp.iinfo(jnp.int32).max)
  youngest_S = jnp.arange(len(done_S)) == len(done_S) - 1 - jnp.argmin(done_S[::-1])
  waiting_B = slots.waiting.at[jnp.where(youngest_S, slots.row, rows)].set(True, mode="drop")
  slots = branching_lib.put_back_forks(slots.replace(waiting=waiting_B), youngest_S, group,
                                       branching)
  return _empty_tables(state, jnp.where(youngest_S, 0, slots.table.shape[1]), slots.replace(
    row=jnp.where(youngest_S, rows, slots.row), done=jnp.where(youngest_S, 0, slots.done),
    limit=jnp.full_like(slots.limit, busy_S.sum() - 1),
    redrawn=slots.redrawn + jnp.where(youngest_S, slots.done, 0).sum()))


def _empty_tables(state, kept_S, slots):
  """State with `slots`, whose tables keep their first `kept_S` entries."""
  table_SM = pages.first_entries(slots.table, kept_S, state.pool)
  pool = pages.replace_table(state.pool, slots.table, table_SM)
  return state.replace(pool=pool, slots=slots.replace(table=table_SM))


def _release(state, ended_S, group, branching):
  """Releases the pages of slots whose sequences ended, but those before a fork to return to."""
  rows, width = len(state.slots.tokens), state.slots.table.shape[1]
  slots = state.slots
  slots = slots.replace(
    ended=slots.ended.at[jnp.where(ended_S, slots.row, rows)].set(True, mode="drop"))
  slots = branching_lib.release_slots(slots, ended_S, group, branching)
  kept_S = jnp.where(slots.row < rows,
                     pages.count(state.pool.tokens, _cached(state.replace(slots=slots), group)), 0)
  return _empty_tables(state, jnp.where(ended_S, kept_S, width), slots)


def _release_prompts(state, group):
  """Releases the pages of prompts whose rows have all ended."""
  prompts = state.prompts
  read_P = prompts.read & ~state.slots.ended.reshape(-1, group).all(1)
  width = prompts.table.shape[1]
  table_PM = pages.first_entries(prompts.table, jnp.where(read_P, width, 0), state.pool)
  return state.replace(pool=pages.replace_table(state.pool, prompts.table, table_PM),
                       prompts=prompts.replace(read=read_P, table=table_PM))


def _draw(slots, prompts, unembedding, drawing):
  """The next token of every slot; its random number is of (key, prompt id, sample, position)."""
  fold, sampling = jax.vmap(jax.random.fold_in), drawing.sampling
  prompt_id_S = prompts.prompt_id[_prompt(slots.row, len(slots.tokens), drawing.group)]
  keys_S = jax.vmap(jax.random.fold_in, (None, 0))(drawing.key, prompt_id_S)
  keys_S = fold(fold(keys_S, slots.row % drawing.group), slots.done)
  logits_SV = jnp.einsum("SD,VD->SV", slots.hidden, unembedding,
                         preferred_element_type=jnp.float32)
  allowed_SV = drawing.allowed_V[None]
  if sampling.min_tokens:
    is_end_V = jnp.isin(jnp.arange(len(drawing.allowed_V)), jnp.array(drawing.end))
    early_S = slots.done + 1 < sampling.min_tokens
    allowed_SV = allowed_SV & ~(is_end_V & early_S[:, None])
  return next_token(logits_SV, jax.vmap(jax.random.uniform)(keys_S), allowed_SV,
                    temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)


def _record(slots, token_S, drawn, replayed_S):
  """Slots with the tokens and their statistics written, but for replayed ones."""
  at = jnp.where(replayed_S, len(slots.tokens), slots.row), slots.done

  def write(x_BT, value_S):
    return x_BT.at[at].set(value_S, mode="drop")

  return slots.replace(
    tokens=write(slots.tokens, token_S),
    length=slots.length.at[slots.row].set(slots.done + 1, mode="drop"),
    logprob=write(slots.logprob, drawn.logprob), entropy=write(slots.entropy, drawn.entropy))


def _read_tokens(model, params, state, token_S, group, tokens, live, forks):
  """State whose model has read one more token in each slot."""
  slots, prompts = state.slots, state.prompts
  embeds = qwen25_vl.embed(model, params, token_S[:, None], None, None)
  position_S = prompts.position[_prompt(slots.row, len(slots.tokens), group)] + slots.done
  positions = jnp.broadcast_to(position_S[:, None], (3, len(position_S), 1))
  hidden, held = qwen25_vl.decode_step(model, params, embeds, positions, state.pool.pages,
                                       _reads(state, group, tokens, live, forks))
  return state.replace(pool=state.pool.replace(pages=held),
                       slots=slots.replace(hidden=hidden, done=slots.done + 1))


def _reads(state, group, tokens, live, forks):
  slots, prompts = state.slots, state.prompts
  active_S = slots.row < len(slots.tokens)
  prompt_S = _prompt(slots.row, len(slots.tokens), group)
  count, among_S = len(prompts.read), prompt_S
  tables, lengths = prompts.table, prompts.length
  if count > len(slots.row):
    # Only the prompts that slots continue, of which there are no more than slots.
    used_P = jnp.zeros(count, bool).at[jnp.where(active_S, prompt_S, count)].set(True, mode="drop")
    count = len(slots.row)
    (used_C,) = jnp.nonzero(used_P, size=count, fill_value=0)
    tables, lengths = tables[used_C], lengths[used_C]
    among_S = (jnp.cumsum(used_P) - 1)[prompt_S]
  length_S, prompt_length_S = _cached(state, group), prompts.length[prompt_S]
  held, page_tokens = len(state.pool.holders), state.pool.tokens
  # Forks share pages that no single slot owns.
  by_pages = not forks and held * page_tokens < len(slots.row) * live
  own = paged.own_pages(slots.table, length_S, prompt_length_S, active_S, held,
                        page_tokens) if by_pages else None
  return paged.Reads(
    table=slots.table, length=length_S, active=active_S, own=own,
    prompt_length=prompt_length_S, prompts=tables, prompts_length=lengths,
    query=jnp.where(active_S, among_S * group + slots.row % group, count * group), group=group,
    prompt_tokens=tokens, live=live,
    scales=jax.tree.map(lambda x: jnp.moveaxis(x[prompt_S], 1, 0), prompts.scales))
