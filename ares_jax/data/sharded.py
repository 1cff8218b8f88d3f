"""Reads batches of rows on all processes of a run together, each those that its devices need.

Every process learns the sizes of all rows of a batch, so that all lay it out alike. Rows, tokens
and images are with the processes that hold a row (system/shares.py), and move with it.
"""

import dataclasses

import jax
import numpy as np
from flax import serialization

from ares_jax.data import sources, traces
from ares_jax.data.images import VisionShape
from ares_jax.data.prompts import EncodedPrompt, PromptBatch
from ares_jax.system import hosts, shares


@dataclasses.dataclass(frozen=True)
class Part:
  """The rows of a batch that this process holds."""

  share: shares.Share
  rows: list
  encoded: list  # what `encode` made of each row

  def prompts(self, encoder, prompt_id):
    """PromptBatch of rows that were encoded by encoder.encode; collective.

    `prompt_id`: indices of all rows of the batch in the stream of prompts.
    """
    sizes = shares.gather(self.share, encoder.sizes(self.encoded))
    held = self.share.held
    return encoder.batch(self.rows, np.asarray(prompt_id)[held], self.encoded, held=held,
                         sizes=sizes)

  def traces(self, encoder, *, row_tokens, row_windows, row_multiple):
    """TraceBatch of rows that were encoded by traces.encode_example; collective.

    The examples move to the processes whose devices compute with their packed rows.
    """
    sizes = shares.gather(self.share, np.column_stack(
      [encoder.sizes(self.encoded), [example.learnt.sum() for example in self.encoded]]))
    length, packed = traces.choose_rows(sizes[:, :2], row_tokens=row_tokens,
                                        row_windows=row_windows, row_multiple=row_multiple)
    rows = shares.share(len(packed))
    held = dict(zip(self.share.held.tolist(), self.encoded, strict=True))
    examples = deliver(held, dict(enumerate(self.share.owner.tolist())), {
      index: to for row, to in zip(packed, rows.holders, strict=True) for index in row})
    arrays = traces.pack_rows(encoder, [[examples[index] for index in packed[row]]
                                        for row in rows.held], length, row_windows)
    return traces.TraceBatch(**arrays, rows=len(packed), sizes=sizes[:, :4],
                             learnt=sizes[:, 4].sum())


def sharded_stream(source, *, batch, seed, encode, start, threads, shuffle=True):
  """Yields the Part of each batch of `sources.stream`; `encode` is called in the reading threads.

  ValueError where a row cannot be used, on all processes.
  """
  share = shares.share(batch)
  local = sources.stream(source, batch=batch, seed=seed, start=start, threads=threads,
                         shuffle=shuffle, held=share.held, encode=lambda row: (row, encode(row)))
  while True:
    yield _part(share, hosts.agree(lambda: next(local)))


def read_sharded(source, numbers, encode):
  """Part of the rows of `source` with these numbers."""
  share = shares.share(len(numbers))

  def read():
    rows = [source[int(numbers[index])] for index in share.held]
    return [(row, encode(row)) for row in rows]

  return _part(share, hosts.agree(read))


def _part(share, pairs):
  return Part(share, [row for row, _ in pairs], [encoded for _, encoded in pairs])


def deliver(values, senders, receivers, *, kinds=(), at_once=2):
  """Moves values between processes: {key: value} of the keys that this process is to have.

  Args:
    values: {key: value} of this process, of kinds that `to_bytes` takes. A key is an int. What was
      sent is taken out, so that it can be freed.
    senders: {key: process that has the value}; the same on all processes.
    receivers: {key: processes that are to have it}; the same on all processes.
    kinds: dataclasses that the values consist of, beside those of this room.
    at_once: values that a process sends in one exchange. Images of 1080p take 13 MB.
  """
  count, local = jax.process_count(), jax.process_index()
  found = {key: values[key] for key, to in receivers.items() if local in to and key in values}
  if count == 1:
    return found
  queues = [[key for key in receivers if senders[key] == number] for number in range(count)]
  for start in range(0, max(map(len, queues)), at_once):
    keys = queues[local][start:start + at_once]
    parts = [to_bytes([(key, values[key]) for key in keys
                       if number in receivers[key] and number != local])
             for number in range(count)]
    for key in keys:
      del values[key]
    for part in hosts.exchange_bytes(parts):
      found |= dict(from_bytes(part, kinds))
  return found


def gather(share, values):
  """A value for each row of a batch, on every process; `values` are those of the rows held."""
  if jax.process_count() == 1:
    return values
  own = [value for row, value in zip(share.held, values, strict=True)
         if share.owner[row] == jax.process_index()]
  parts = [iter(from_bytes(data)) for data in hosts.allgather_bytes(to_bytes(own))]
  return [next(parts[number]) for number in share.owner]


def to_bytes(value):
  """Bytes of nested lists, dicts, strings, numbers, bytes, arrays and dataclasses.

  Tuples come back as lists: msgpack knows no tuples.
  """
  def plain(x):
    if dataclasses.is_dataclass(x):
      return {type(x).__name__: [plain(getattr(x, field.name)) for field in dataclasses.fields(x)]}
    if isinstance(x, dict):
      return {key: plain(each) for key, each in x.items()}
    return [plain(each) for each in x] if isinstance(x, list | tuple) else x

  return serialization.msgpack_serialize(plain(value), in_place=True)


def from_bytes(data, kinds=()):
  """The value that `to_bytes` was given; `kinds` are dataclasses beside those of this room."""
  kinds = {kind.__name__: kind for kind in (EncodedPrompt, PromptBatch, VisionShape, *kinds)}

  def restore(x):
    if isinstance(x, dict) and len(x) == 1 and (name := next(iter(x))) in kinds:
      return kinds[name](*map(restore, x[name]))
    if isinstance(x, dict):
      return {key: restore(each) for key, each in x.items()}
    return [restore(each) for each in x] if isinstance(x, list) else x

  return restore(serialization.msgpack_restore(data))
