"""Reads batches of rows on all processes of a run together.

Each process reads and decodes its shard of a batch, which is slow. The processes then exchange
their shards, and each packs the complete batch, the one that a single process would have.
"""

import itertools

import jax
from flax import serialization

from ares_jax.data import sources
from ares_jax.data.prompts import EncodedPrompt
from ares_jax.system import hosts

_PROMPT = "EncodedPrompt"  # key under which a prompt's fields are sent


def sharded_stream(source, *, batch, seed, encode, collate, start, threads, shuffle=True):
  """`sources.stream` for all processes of a run: each reads and encodes its shard of a batch.

  The number of processes divides `batch`. ValueError where a row cannot be used, on all processes.

  Args:
    encode: function of a row, called in the reading threads; returns an EncodedPrompt, a number,
      or a tuple of these.
    collate: function of (rows, encoded rows, batch number), called on every process with the same
      arguments; the iterator yields its results.
  """
  def read(collate, shard):
    return sources.stream(source, batch=batch, seed=seed, collate=collate, start=start,
                          threads=threads, shuffle=shuffle, shard=shard)

  if jax.process_count() == 1:
    return read(lambda rows, number: collate(rows, [encode(row) for row in rows], number), (0, 1))
  local = read(lambda rows, _: to_bytes([(row, encode(row)) for row in rows]),
               (jax.process_index(), jax.process_count()))
  return (collate(*_exchange(lambda: next(local)), number) for number in itertools.count(start))


def read_sharded(source, numbers, encode):
  """(rows, encoded rows) of the rows of `source` with these numbers; each process reads a shard."""
  def read_local():
    rows = [source[int(number)] for number in hosts.local_shard(numbers)]
    return [(row, encode(row)) for row in rows]

  if jax.process_count() == 1:
    return tuple(map(list, zip(*read_local(), strict=True)))
  return _exchange(lambda: to_bytes(read_local()))


def _exchange(read):
  """(rows, encoded rows) of all processes; `read` returns the bytes of this one's pairs."""
  pairs = hosts.join_shards([from_bytes(part) for part in hosts.allgather(read)])
  return [row for row, _ in pairs], [encoded for _, encoded in pairs]


def to_bytes(value):
  """Bytes of nested lists, dicts, strings, numbers, bytes, arrays and EncodedPrompts.

  Tuples come back as lists: msgpack knows no tuples.
  """
  def plain(x):
    if isinstance(x, EncodedPrompt):
      return {_PROMPT: plain([x.tokens, x.positions, x.learnt, x.images])}
    if isinstance(x, dict):
      return {key: plain(each) for key, each in x.items()}
    return [plain(each) for each in x] if isinstance(x, list | tuple) else x

  return serialization.msgpack_serialize(plain(value), in_place=True)


def from_bytes(data):
  """The value that `to_bytes` was given."""
  def restore(x):
    if isinstance(x, dict) and _PROMPT in x:
      *arrays, images = x[_PROMPT]
      return EncodedPrompt(*arrays, [(patches, tuple(grid)) for patches, grid in images])
    if isinstance(x, dict):
      return {key: restore(each) for key, each in x.items()}
    return [restore(each) for each in x] if isinstance(x, list) else x

  return restore(serialization.msgpack_restore(data))
