"""The pool of pages on each device: who holds which page, and which pages are free.

    prompt of 10 tokens     [ 4 ][ 7 ][ 2.]                         pages of 4 tokens
    sample 0 of it          [ 4 ][ 7 ][ 9 ][ 1 ][ 5.]               4, 7 shared; 9 a copy of 2
    sample 1 of it          [ 4 ][ 7 ][ 3 ][ 8.]                    4, 7 shared; 3 a copy of 2
    a fork of sample 0      [ 4 ][ 7 ][ 9 ][ 6.]                    9 shared; 6 a copy of 1

A table lists the pages of a prompt or of a slot, first token first, and holds each of them. A slot
writes only to a page that it alone holds: at the first token of a page it takes a free one, and it
replaces a shared page by a copy before it writes there. This one rule serves the first sample of a
prompt, the others, and forks. A page that no table holds is free.

Z pages of a device, M entries of a table; an entry of Z is empty. X tables. All functions run on
the device, those of one device each.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from ares_jax.models import paged
from ares_jax.models.paged import Pages


@flax.struct.dataclass
class Pool:
  """Pages and the number of tables that hold each of them."""

  pages: Pages
  holders: jax.Array  # int32 [Z]; 0 = free

  @property
  def tokens(self):
    """Tokens of a page."""
    return self.pages.k.shape[2]


def count(tokens, length):
  """Pages of `length` tokens, of `tokens` each."""
  return -(-length // tokens)


def first_entries(table_XM, count_X, pool):
  """Tables with their first `count_X` entries alone."""
  return jnp.where(jnp.arange(table_XM.shape[1]) < count_X[:, None], table_XM, len(pool.holders))


def hold(pool, table_XM, added):
  """Pool whose pages in the tables have `added` holders more: 1 or -1."""
  # A scatter of thousands of numbers: most steps have none.
  some = (table_XM < len(pool.holders)).any()
  return pool.replace(holders=lax.cond(
    some, lambda x: x.at[table_XM].add(added, mode="drop"), lambda x: x, pool.holders))


def replace_table(pool, old_XM, new_XM):
  """Pool after tables became `new_XM`, which keep some of their entries and lose the others."""
  return hold(pool, jnp.where(new_XM == old_XM, len(pool.holders), old_XM), -1)


def take_prompts(pool, count_X, width):
  """(Pool, tables [X, width]) with `count_X` free pages for each prompt; there must be enough."""
  (free,) = jnp.nonzero(pool.holders == 0, size=len(count_X) * width, fill_value=len(pool.holders))
  start_X = jnp.cumsum(count_X) - count_X
  table_XM = free[start_X[:, None] + jnp.arange(width)].astype(jnp.int32)
  table_XM = first_entries(table_XM, count_X, pool)
  return hold(pool, table_XM, 1), table_XM


def wanting(pool, table_SM, length_S, active_S):
  """bool [S]: slots that cannot write their next token to the page they have there, if any."""
  page_S = jnp.take_along_axis(table_SM, (length_S // pool.tokens)[:, None], 1)[:, 0]
  shared_S = pool.holders.at[page_S].get(mode="fill", fill_value=0) > 1
  return active_S & ((length_S % pool.tokens == 0) | shared_S)


def take(pool, table_SM, length_S, wanting_S, layers):
  """(Pool, tables) in which each wanting slot can write its next token; there must be enough free.

  A page that others hold too is copied.
  """
  slots, empty = jnp.arange(len(table_SM)), len(pool.holders)
  at_S = length_S // pool.tokens
  (free,) = jnp.nonzero(pool.holders == 0, size=len(slots), fill_value=empty)
  old_S = jnp.take_along_axis(table_SM, at_S[:, None], 1)[:, 0]
  new_S = jnp.where(wanting_S, free[jnp.cumsum(wanting_S) - 1], old_S).astype(jnp.int32)
  copied_S = wanting_S & (length_S % pool.tokens > 0)
  (to_copy,) = jnp.nonzero(copied_S, size=len(slots), fill_value=0)

  def copy(carry):
    done, pages = carry
    slot = to_copy[done]
    return done + 1, paged.copy_page(pages, layers, old_S[slot], new_S[slot])

  _, pages = lax.while_loop(lambda carry: carry[0] < copied_S.sum(), copy,
                            (jnp.int32(0), pool.pages))
  holders = pool.holders.at[jnp.where(copied_S, old_S, empty)].add(-1, mode="drop")
  holders = holders.at[jnp.where(wanting_S, new_S, empty)].add(1, mode="drop")
  return Pool(pages, holders), table_SM.at[slots, at_S].set(new_S, mode="drop")
