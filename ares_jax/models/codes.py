"""Which keys an answer reads in a packed row where several answers share a prompt.

    | prompt A | answer A0 | answer A1 | prompt B | answer B0 |

A token reads what stands before it in its own segment, and an answer its prompt too. Segment ids
alone cannot say so, for kernels compare them for equality. So all segments of a prompt get its id,
and a code in place of a query's index says which of their keys the query reads: 32 bits for the
index, where its prompt ends and how far behind its answer begins. The latter two are counted in
steps of `step_of(T)`, at whose multiples answers therefore begin.

B rows, T tokens of a row. A prompt here lacks its last token: each answer begins with that one,
whose hidden state predicts the answer's first token (training/batch.py).
"""

import functools

import jax.numpy as jnp
from jax import lax


def step_of(tokens):
  """A power of 2, at whose multiples answers begin in a row of `tokens`: 128 of 20480."""
  return 1 << _bits(tokens)[2]


def _bits(tokens):
  """Bits of an index, of a number of steps and of a step."""
  index = (tokens - 1).bit_length()
  steps = min(index, 8, (32 - index) // 2)
  return index, steps, index - steps


def codes(segment_BT, prompt_BT):
  """int32 [B, T], the code of each query; segments as for `attention`."""
  index, steps, step = _bits(segment_BT.shape[1])
  index_T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)
  first_BT = jnp.pad(segment_BT[:, 1:] != segment_BT[:, :-1], ((0, 0), (1, 0)))
  begin_BT = lax.cummax(jnp.where(first_BT, index_T, 0), axis=1)
  is_answer_BT = segment_BT != prompt_BT
  behind_BT = jnp.where(is_answer_BT | (segment_BT == 0), 0, index_T + 1)
  end_BT = lax.cummax(behind_BT, axis=1)
  # Where the end is rounded, the keys let in are padding.
  end_BT = end_BT + (1 << step) - 1 >> step
  between_BT = (begin_BT >> step) - end_BT
  return index_T | jnp.where(is_answer_BT, between_BT << index | end_BT << index + steps, 0)


@functools.cache
def reads(tokens):
  """The function of (codes, indices of keys) that says which keys of their ids queries read.

  A row has `tokens`. Cached, for a kernel is compiled for one function.
  """
  index, steps, step = _bits(tokens)

  def function(code, key):
    between = lax.shift_right_logical(code, index) & (1 << steps) - 1
    end = lax.shift_right_logical(code, index + steps)
    # 0 <= steps behind the prompt's end < between, in one comparison: less than 0 wraps around.
    least = jnp.int32(-2**31)
    hidden = lax.shift_right_logical(key, step) + least - end < between + least
    return (key <= code & (1 << index) - 1) & ~hidden

  return function


def until(index_T, code_BT, key_S, tokens):
  """Which keys of their ids queries read: those up to their index, or by their codes if any."""
  if code_BT is None:
    return index_T[:, None] >= key_S
  return reads(tokens)(code_BT[:, :, None], key_S)
