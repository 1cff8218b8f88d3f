"""Packs several sequences into one row, one after the other: R packed rows, C tokens a row."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """The sequence and token at each position of packed rows."""

  sequence: np.ndarray  # int32 [R, C]: index of the sequence, 0 where padding
  index: np.ndarray  # int32 [R, C]: index of the token in its sequence, 0 where padding
  segment: np.ndarray  # int32 [R, C]: 0 = padding, else 1 + index of the sequence in its row


def first_fit(sizes, capacity):
  """First-fit-decreasing bins: a list of lists of item indices, ties by index.

  Every item has a tuple of `sizes`, a bin a `capacity` for each; the first size orders the items.
  """
  bins = []
  left = np.tile(np.asarray(capacity), (len(sizes), 1))  # of as many bins as there can be
  for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index][0], index)):
    fits = (left[: len(bins)] >= sizes[index]).all(1)
    number = int(fits.argmax()) if fits.any() else len(bins)
    if number == len(bins):
      bins.append([])
    bins[number].append(index)
    left[number] -= sizes[index]
  return bins


def lay_out(rows, lengths, row_tokens):
  """The Layout of `rows`, R lists of indices of sequences with these `lengths`; C is `row_tokens`.

  Raises:
    ValueError: the sequences of a row have more than C tokens.
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
      layout.index[number, start:end] = np.arange(end - start)
      layout.segment[number, start:end] = 1 + order
      start = end
  return layout
