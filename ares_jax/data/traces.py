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
  loss_mask: np.ndarray  # bool [R, T]: True on response tokens
  positions: np.ndarray  # int32 [3, R, T]
  unit: np.ndarray  # int32 [R, T]
  vision: dict


def encode_example(encoder, row):
  """(EncodedPrompt of prompt + response, prompt length) of a row that has a "response"."""
  prompt = encoder.encode(row)
  response = np.int32(encoder.chat.response(row["response"]))
  after = prompt.positions.max(initial=-1) + 1 + np.arange(len(response), dtype=np.int32)
  tokens = np.concatenate([prompt.tokens, response])
  positions = np.concatenate([prompt.positions, np.broadcast_to(after, (3, len(after)))], axis=1)
  return EncodedPrompt(tokens, positions, prompt.images), len(prompt.tokens)


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
  sizes = [(len(sequence.tokens), encoder.count_windows(sequence)) for sequence, _ in examples]
  for row, (tokens, windows) in zip(rows, sizes, strict=True):
    if tokens > max(row_tokens) or windows > row_windows:
      raise BadRow(row["id"], "length", f"{tokens} tokens and {windows} vision windows, a packed "
                   f"row holds {max(row_tokens)} and {row_windows}; raise row_tokens or "
                   "row_windows")

  def packed_rows(length):
    rows = first_fit(sizes, (length, row_windows))
    return rows + [[] for _ in range(-len(rows) % row_multiple)]

  longest = max(tokens for tokens, _ in sizes)
  packings = [(length, packed_rows(length)) for length in row_tokens if length >= longest]
  length, packed = min(packings, key=lambda packing: packing[0] * len(packing[1]))
  tokens, positions, unit, vision = encoder.pack(
    [[examples[index][0] for index in row] for row in packed], length, row_windows)
  layout = lay_out(packed, [tokens for tokens, _ in sizes], length)
  prompt_length = np.int32([length for _, length in examples])
  loss_mask = (layout.segment > 0) & (layout.index >= prompt_length[layout.sequence])
  return TraceBatch(tokens, layout.segment, loss_mask, positions, unit, vision)
