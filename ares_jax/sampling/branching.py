"""Entropy-triggered branching: sequences fork where the window entropy rises (section 3.2.1).

The first G - branches sequences of a group start at the prompt. Where the window entropy of one of
them rises to the threshold, another sequence forks from the first token of that window: it shares
the tokens before and draws the rest itself. Which sequence may fork from which is fixed, and one
that found no fork starts at the prompt. So a group has G sequences, and none of them depends on
when a slot became free.

Keys and values are not computed twice. When a sequence ends, its slot returns to its last fork and
continues there; an idle slot without a waiting row takes over a fork and shares the pages before
it. Where pages run out and a sequence is put back, its forks read the parent's tokens again.
Functions that take `branching` do nothing where it is None.

G group, B rows (row b = p*G + g), S slots, T response tokens. Sizes are those of one device.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ares_jax.sampling import pages


@flax.struct.dataclass
class Branching:
  """When sequences fork, and how many of them."""

  threshold: jax.Array  # float32 [], tau in nats; nan = no forks
  branches: int = flax.struct.field(pytree_node=False)  # sequences per group that may be forks
  window: int = flax.struct.field(pytree_node=False)  # tokens


def parents(group, branches):
  """int [G]: the sample that each sample of a group may fork from; itself for the first ones."""
  return np.arange(group) % (group - branches)


def replay_parent(slots, token_S, group, branching):
  """(int32 [S] tokens to read, bool [S] where they are the parent's instead of the drawn ones).

  A slot that returned to a fork reads the parent's last token before it once more, to get its
  hidden state; a fork that was put back reads all of the parent's tokens before it.
  """
  if branching is None:
    return token_S, jnp.zeros_like(slots.row, bool)
  rows = len(slots.tokens)
  row_S = jnp.minimum(slots.row, rows - 1)
  replayed_S = (slots.row < rows) & (slots.done < slots.fork[row_S])
  parent_token_S = slots.tokens[_first(row_S, group, branching), slots.done]
  return jnp.where(replayed_S, parent_token_S, token_S), replayed_S


def note_forks(slots, group, branching):
  """Notes a fork in slots whose newest token completes a window that rises to the threshold.

  Call it when entropies are written, while `done` is the newest token's index.
  """
  if branching is None:
    return slots
  rows, window, last_S = len(slots.tokens), branching.window, slots.done
  row_S = jnp.minimum(slots.row, rows - 1)
  entropy_SW = slots.entropy[row_S[:, None], last_S[:, None] + jnp.arange(-window, 1)]
  rises_S = ((entropy_SW[:, 1:].mean(1) >= branching.threshold)
             & (entropy_SW[:, :-1].mean(1) < branching.threshold))
  child_S = _child(row_S, slots.forks, group, branching)
  # A window that starts at the first token has none before it: a fork there would share nothing.
  forks_S = (rises_S & (last_S >= window) & (slots.row < rows) & (child_S < rows)
             & (row_S % group < group - branching.branches))
  fork_B = slots.fork.at[jnp.where(forks_S, child_S, rows)].set(last_S - window + 1, mode="drop")
  return slots.replace(fork=fork_B, forks=slots.forks + forks_S)


def release_slots(slots, ended_S, group, branching):
  """Slots after their sequences ended: each is idle, or returns to its last fork.

  The end of a first sequence lets those that might have forked from it start at the prompt.
  """
  rows = len(slots.tokens)
  if branching is None:
    return slots.replace(row=jnp.where(ended_S, rows, slots.row))
  waiting_B, row_S = slots.waiting, jnp.minimum(slots.row, rows - 1)
  first_S = ended_S & (row_S % group < group - branching.branches)
  for number in range(branching.branches):
    child_S = _child(row_S, number, group, branching)
    unused_S = first_S & (number >= slots.forks)
    waiting_B = waiting_B.at[jnp.where(unused_S, child_S, rows)].set(True, mode="drop")
  back_S = ended_S & (slots.forks > slots.given[_first(row_S, group, branching)])
  # From the last fork to the first: a fork overwrites only tokens behind the forks before it.
  forks_S = slots.forks - back_S
  child_S = _child(row_S, forks_S, group, branching)
  length_S = slots.fork[jnp.minimum(child_S, rows - 1)] - 1
  return slots.replace(
    waiting=waiting_B, forks=forks_S,
    row=jnp.where(back_S, child_S, jnp.where(ended_S, rows, slots.row)),
    done=jnp.where(back_S, length_S, slots.done))


def put_back_forks(slots, put_back_S, group, branching):
  """Slots whose rows are put back, after their forks that no slot has taken over yet were too.

  A first sequence notes its forks again when it is drawn again.
  """
  if branching is None:
    return slots
  rows, row_S = len(slots.tokens), jnp.minimum(slots.row, len(slots.tokens) - 1)
  ended_S = put_back_S & (row_S % group >= group - branching.branches)  # the first sequence has
  waiting_B = slots.waiting
  for number in range(branching.branches):
    child_S = _child(row_S, number, group, branching)
    lost_S = (ended_S & (number < slots.forks)
              & (number >= slots.given[_first(row_S, group, branching)]))
    waiting_B = waiting_B.at[jnp.where(lost_S, child_S, rows)].set(True, mode="drop")
  return slots.replace(waiting=waiting_B, forks=jnp.where(put_back_S, 0, slots.forks))


def hand_over_forks(state, group, branching):
  """Lets idle slots take over forks that wait for the end of another slot's sequence."""
  rows = len(state.slots.tokens)

  def idle_and_waiting(slots):
    given_S = slots.given[_first(jnp.minimum(slots.row, rows - 1), group, branching)]
    idle_S = slots.row >= rows
    below_limit = (~idle_S).sum() < slots.limit[0]
    return idle_S & below_limit, ~idle_S & (slots.forks > given_S)

  def move(state):
    slots, pool = state.slots, state.pool
    to, source = (jnp.argmax(x) for x in idle_and_waiting(slots))
    row = slots.row[source]
    first = _first(row, group, branching)
    child = _child(row, slots.given[first], group, branching)
    done = slots.fork[child] - 1
    shared = pages.count(pool.tokens, state.prompts.length[row // group] + done)
    table_M = pages.first_entries(slots.table[source][None], shared[None], pool)[0]
    return state.replace(pool=pages.hold(pool, table_M, 1), slots=slots.replace(
      row=slots.row.at[to].set(child), given=slots.given.at[first].add(1),
      forks=slots.forks.at[to].set(0), done=slots.done.at[to].set(done),
      table=slots.table.at[to].set(table_M)))

  return lax.while_loop(
    lambda state: jnp.all(jnp.stack([x.any() for x in idle_and_waiting(state.slots)])), move, state)


def join_forks(x_BT, fork_B, group, branches):
  """Complete rows: those of forks start with the tokens of their parents."""
  if not branches:
    return x_BT
  x_PGT = x_BT.reshape(-1, group, x_BT.shape[1])
  shared_BT = jnp.arange(x_BT.shape[1]) < fork_B[:, None]
  return jnp.where(shared_BT, x_PGT[:, parents(group, branches)].reshape(x_BT.shape), x_BT)


def _first(row, group, branching):
  """The row of the first sequence that a row forks from; a first sequence's own row."""
  return row - row % group + row % group % (group - branching.branches)


def _child(row, number, group, branching):
  """The row of fork `number` of a row's first sequence; beyond all rows where there is none."""
  sample = row % group % (group - branching.branches) + (number + 1) * (group - branching.branches)
  return jnp.where(sample < group, row - row % group + sample, jnp.iinfo(jnp.int32).max)
