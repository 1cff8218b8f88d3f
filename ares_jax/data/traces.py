"""Packs rows that have a response for supervised fine-tuning.

R packed rows, T tokens a row. Several examples share a row; segment ids keep them apart.
"""

import dataclasses

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.packing import first_fit
from ares_jax.data.prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class TraceBatch:
  """Packed examples; of the R rows this process has those that its devices compute with."""

  tokens: np.ndarray  # int32 [R, T]
  segment: np.ndarray  # int32 [R, T]: 0 = padding, else 1 + index of the example in its row
  loss_mask: np.ndarray  # bool [R, T]: True on the tokens of answers
  positions: np.ndarray  # int32 [3, R, T]
  unit: np.ndarray  # int32 [R, T]
  vision: dict
  rows: int  # R over all processes
  sizes: np.ndarray  # int64 [examples, 4], of all processes: `Encoder.sizes`
  learnt: int  # tokens of all answers


def encode_example(encoder, row, *, row_tokens, row_windows):
  """EncodedPrompt of a row with its "response"; all answers of a dialogue are learnt.

  BadRow where no packed row holds it, see `check_size`.
  """
  example = add_response(encoder, encoder.encode(row), row["response"])
  check_size(encoder, row, example, row_tokens=row_tokens, row_windows=row_windows)
  return example


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


def choose_rows(sizes, *, row_tokens, row_windows, row_multiple):
  """Packed rows of examples by first-fit-decreasing: T, and lists of indices of examples.

  Args:
    sizes: int [examples, 2], tokens and vision windows of each.
    row_tokens: allowed values of T; the one with the fewest tokens in all is taken.
    row_windows: vision windows of a packed row.
    row_multiple: the number of rows is rounded up to a multiple, so that few shapes occur and
      devices divide it.
  """
  def packed_rows(length):
    rows = first_fit(sizes, (length, row_windows))
    return rows + [[] for _ in range(-len(rows) % row_multiple)]

  packings = [(length, packed_rows(length)) for length in row_tokens if length >= sizes[:, 0].max()]
  return min(packings, key=lambda packing: packing[0] * len(packing[1]))


def pack_rows(encoder, rows, length, row_windows):
  """The arrays of a TraceBatch of rows of T = `length` tokens, R lists of EncodedPrompt."""
  tokens, _, positions, unit = encoder.pack_texts(rows, length)
  vision, _ = encoder.vision_shape(row_windows).pack(
    [[image for example in row for image in example.images] for row in rows])
  segment, learnt = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
  for index, row in enumerate(rows):
    start = 0
    for order, example in enumerate(row, start=1):
      end = start + len(example.tokens)
      segment[index, start:end], learnt[index, start:end] = order, example.learnt
      start = end
  return dict(tokens=tokens, segment=segment, loss_mask=learnt, positions=positions, unit=unit,
              vision=vision)
