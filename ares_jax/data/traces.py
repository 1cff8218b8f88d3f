"""Packs rows that have a response for supervised fine-tuning.

R packed rows, T tokens a row. Several examples share a row; segment ids keep them apart.
"""

import dataclasses

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.packing import first_fit, lay_out
from ares_jax.data.prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class TraceBatch:
  """Packed examples."""

  tokens: np.ndarray  # int32 [R, T]
  segment: np.ndarray  # int32 [R, T]: 0 = padding, else 1 + index of the example in its row
  loss_mask: np.ndarray  # bool [R, T]: True on the tokens of answers
  positions: np.ndarray  # int32 [3, R, T]
  unit: np.ndarray  # int32 [R, T]
  vision: dict


def encode_example(encoder, row):
  """EncodedPrompt of a row with its "response"; all answers of a dialogue are learnt."""
  return add_response(encoder, encoder.encode(row), row["response"])


def add_response(encoder, prompt, text):
  """The EncodedPrompt followed by a response, which is learnt."""
  response = np.int32(encoder.chat.response(text))
  after = prompt.positions.max(initial=-1) + 1 + np.arange(len(response), dtype=np.int32)
  return EncodedPrompt(
    np.concatenate([prompt.tokens, response]),
    np.concatenate([prompt.positions, np.broadcast_to(after, (3, len(after)))], axis=1),
    np.concatenate([prompt.learnt, np.ones(len(response), bool)]), prompt.images)


def check_size(encoder, row, example, *, row_tokens, row_windows):
  """(tokens, vision windows) of a row's EncodedPrompt; BadRow where no packed row holds them."""
  tokens, windows = len(example.tokens), encoder.count_windows(example)
  if tokens > max(row_tokens) or windows > row_windows:
    raise BadRow(row["id"], "length", f"{tokens} tokens and {windows} vision windows, a packed "
                 f"row holds {max(row_tokens)} and {row_windows}; raise row_tokens or row_windows")
  return tokens, windows


def trace_batch(encoder, rows, *, row_tokens, row_windows, row_multiple, examples=None):
  """Packs rows with a "response" by first-fit-decreasing; BadRow where one alone does not fit.

  Args:
    row_tokens: allowed values of T; the one with the fewest tokens in all is taken.
    row_windows: vision windows of a packed row.
    row_multiple: the number of rows is rounded up to a multiple, so that few shapes occur and
      devices divide it.
    examples: `encode_example` of each row; None: computed here.
  """
  if examples is None:
    examples = [encode_example(encoder, row) for row in rows]
  sizes = [check_size(encoder, row, example, row_tokens=row_tokens, row_windows=row_windows)
           for row, example in zip(rows, examples, strict=True)]

  def packed_rows(length):
    rows = first_fit(sizes, (length, row_windows))
    return rows + [[] for _ in range(-len(rows) % row_multiple)]

  longest = max(tokens for tokens, _ in sizes)
  packings = [(length, packed_rows(length)) for length in row_tokens if length >= longest]
  length, packed = min(packings, key=lambda packing: packing[0] * len(packing[1]))
  tokens, positions, unit, vision = encoder.pack(
    [[examples[index] for index in row] for row in packed], length, row_windows)
  lengths = [tokens for tokens, _ in sizes]
  layout = lay_out(packed, lengths, length)
  starts = np.cumsum([0, *lengths[:-1]])
  learnt = np.concatenate([example.learnt for example in examples])
  loss_mask = (layout.segment > 0) & learnt[starts[layout.sequence] + layout.index]
  return TraceBatch(tokens, layout.segment, loss_mask, positions, unit, vision)
