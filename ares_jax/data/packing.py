"""Sequences to packed rows: several share a row, one behind the other.

R packed rows, C tokens a row.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which token of which sequence stands where in packed rows."""

  sequence: np.ndarray  # int32 [R, C]: index of the sequence, 0 where padding
  place: np.ndarray  # int32 [R, C]: index of the token in its sequence, 0 where padding
  segment: np.ndarray  # int32 [R, C]: 0 = padding, else 1 + place of the sequence in its row


def first_fit(sizes, room):
  """First-fit-decreasing bins: a list of lists of indices, ties by index.

  Args:
    sizes: a tuple of sizes for every item; the first one orders them.
    room: the tuple of what a bin holds.
  """
  bins = []
  left = np.tile(np.asarray(room), (len(sizes), 1))  # of every bin there may be
  for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index][0], index)):
    fits = (left[: len(bins)] >= sizes[index]).all(1)
    number = int(fits.argmax()) if fits.any() else len(bins)
    if number == len(bins):
      bins.append([])
    bins[number].append(index)
    left[number] -= sizes[index]
  return bins


def lay_out(rows, lengths, row_tokens):
  """Layout of `rows`.

  Args:
    rows: a list of indices of sequences for every row; R rows.
    lengths: tokens of every sequence.
    row_tokens: C.

  Raises:
    ValueError: the sequences of a row are longer than it.
  """
  layout = Layout(*(np.zeros((len(rows), row_tokens), np.int32) for _ in range(3)))
  for number, row in enumerate(rows):
    total = sum(int(lengths[index]) for index in row)
    if total > row_tokens:
      raise ValueError(f"sequences of {total} tokens do not fit a row of {row_tokens}; raise "
                       "row_tokens")
    start = 0
    for order, index in enumerate(row):
      end = start + int(lengths[index])
      layout.sequence[number, start:end] = index
      layout.place[number, start:end] = np.arange(end - start)
      layout.segment[number, start:end] = 1 + order
      start = end
  return layout
