"""Packs several sequences into one row: R packed rows, C tokens a row.

Sequences follow each other. Those of a family begin with the same tokens, the head, which a row may
hold once, before what is left of each of them:

    | head | rest of sequence 0 | rest of sequence 1 | head and rest of a sequence of its own |
"""

import collections
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Families:
  """Which of B sequences begin alike, and where what is left of them may stand."""

  number: np.ndarray  # int [B]: the family of the sequence
  head: np.ndarray  # int [B]: tokens that its family has in common, fewer than any sequence has
  step: int  # heads that are shared and rests behind them begin at its multiples

  def take(self, indices):
    """The Families of some of the sequences."""
    return dataclasses.replace(self, number=self.number[indices], head=self.head[indices])

  def groups(self, row):
    """Lists of the sequences of a `row`, those that share a head there in one list, and first."""
    found = collections.defaultdict(list)
    for index in row:
      # Longer heads never cost more in gaps between the rests than sharing them saves.
      shared = self.head[index] >= max(1, 3 * (self.step - 1))
      found[(self.number[index],) if shared else index].append(index)
    return sorted(found.values(), key=lambda members: len(members) == 1)

  def shared_tokens(self, row):
    """Tokens that the sequences of a `row` do not take because they share heads."""
    return sum((len(members) - 1) * int(self.head[members[0]]) for members in self.groups(row))


@dataclasses.dataclass(frozen=True)
class Layout:
  """The sequence and token at each position of packed rows."""

  sequence: np.ndarray  # int32 [R, C]: index of the sequence, 0 where padding
  index: np.ndarray  # int32 [R, C]: index of the token in its sequence, 0 where padding
  segment: np.ndarray  # int32 [R, C]: 0 = padding, else 1 + index of the head or rest in its row
  head: np.ndarray  # int32 [R, C]: the segment of the head that a rest goes on from, else `segment`


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


def fit_families(lengths, families, row_tokens):
  """Rows of sequences that share heads: a list of lists of indices.

  A sequence goes to the first row with its family that has room, else to the first that has, the
  longest first, or those of the largest family: the order with fewer rows is taken. No sequence
  takes more room than it has tokens.
  """
  members = np.bincount(families.number, lengths)[families.number]
  orders = np.lexsort([-lengths]), np.lexsort([-lengths, families.number, -members])
  return min((_fit_in_order(order.tolist(), lengths, families, row_tokens) for order in orders),
             key=len)


def _fit_in_order(order, lengths, families, row_tokens):
  rows, left = [], np.full(len(lengths), row_tokens)
  rows_of = collections.defaultdict(list)  # {family: numbers of its rows}
  for index in order:
    family = families.number[index]
    for number in rows_of[family]:
      siblings = [other for other in rows[number] if families.number[other] == family]
      more = (_tokens([*siblings, index], lengths, families)
              - _tokens(siblings, lengths, families))
      if more <= left[number]:
        break
    else:
      more, fits = lengths[index], left[:len(rows)] >= lengths[index]
      number = int(fits.argmax()) if fits.any() else len(rows)
      if number == len(rows):
        rows.append([])
      rows_of[family].append(number)
    rows[number].append(index)
    left[number] -= more
  return rows


def _tokens(row, lengths, families):
  """Tokens that the sequences of a row take, gaps included."""
  return sum(-(-(last - first) // step) * step for step, pieces in _pieces(row, lengths, families)
             for _, first, last in pieces)


def _pieces(row, lengths, families):
  """(step, [(sequence, its first token, its last + 1)]) of sequences that share a head, or of one.

  The first piece of several is the head.
  """
  for members in [[index] for index in row] if families is None else families.groups(row):
    if len(members) == 1:
      yield 1, [(members[0], 0, lengths[members[0]])]
    else:
      head = families.head[members[0]]
      yield families.step, [(members[0], 0, head),
                            *((index, head, lengths[index]) for index in members)]


def lay_out(rows, lengths, row_tokens, families=None):
  """The Layout of `rows`, R lists of indices of sequences with these `lengths`; C is `row_tokens`.

  With `families` those of one family in a row share its head.

  Raises:
    ValueError: the sequences of a row have more than C tokens.
  """
  layout = Layout(*(np.zeros((len(rows), row_tokens), np.int32) for _ in range(4)))
  for number, row in enumerate(rows):
    total = _tokens(row, lengths, families)
    if total > row_tokens:
      raise ValueError(f"sequences of {total} tokens do not fit a row of {row_tokens}; raise "
                       "row_tokens")
    start = order = 0
    for step, pieces in _pieces(row, lengths, families):
      head = order + 1
      for index, first, last in pieces:
        start, order = -(-start // step) * step, order + 1
        here = number, slice(start, start + last - first)
        layout.sequence[here], layout.index[here] = index, np.arange(first, last)
        layout.segment[here], layout.head[here] = order, head
        start += last - first
  return layout
