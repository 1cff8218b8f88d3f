"""Batches of rows that the processes of a run read together: each a share, all get the whole.

Reading rows and decoding their images is what a host is slow at, so it is split. What comes out is
exchanged, and padded and packed by all alike: every process has the batch that one alone would
have.
"""

import itertools
import json

import jax
import numpy as np

from ares_jax.data import sources
from ares_jax.data.prompts import EncodedPrompt
from ares_jax.system import heartbeat, hosts


def sharded_stream(source, *, batch, seed, encode, collate, start, threads, shuffle=True):
  """`data.sources.stream` for all processes of a run: each reads and encodes its share of a batch.

  Args:
    source, batch, seed, start, threads, shuffle: as there; processes divide the batch.
    encode: function of a row: EncodedPrompt, or a tuple of such and numbers; in reading threads.
    collate: function of (rows, what encode gave for each, batch number); on every process alike.

  Returns:
    an iterator of what `collate` returns.

  Raises:
    ValueError: a row cannot be used; on all processes, whoever read it.
  """
  def stream_of(collate, shard):
    return sources.stream(source, batch=batch, seed=seed, collate=collate, start=start,
                          threads=threads, shuffle=shuffle, shard=shard)

  if jax.process_count() == 1:
    return stream_of(lambda rows, number: collate(rows, [encode(row) for row in rows], number),
                     (0, 1))
  own = stream_of(lambda rows, _: dumps([(row, encode(row)) for row in rows]),
                  (jax.process_index(), jax.process_count()))
  return (collate(*_joined(lambda: next(own)), number) for number in itertools.count(start))


def read_sharded(source, places, encode):
  """(rows, what `encode` gives for each) of the rows of `source` at `places`, read in shares."""
  def own():
    rows = [source[int(place)] for place in hosts.local_shard(places)]
    return [(row, encode(row)) for row in rows]

  if jax.process_count() == 1:
    return tuple(map(list, zip(*own(), strict=True)))
  return _joined(lambda: dumps(own()))


def grade_sharded(call):
  """(texts, correct, format_ok, answers that timed out) of all, of each process's share of them.

  Args:
    call: returns the same for `hosts.share`; raises ValueError or pulse.Stopped on all processes
      where it does on one.
  """
  if jax.process_count() == 1:
    return call()

  def told():
    try:
      return dumps(call())
    except heartbeat.StopRequested:
      return b""

  parts = hosts.allgather(told)
  if not all(parts):
    heartbeat.heartbeat(common=True)  # one was asked to stop: all do
  texts, correct, format_ok, late = zip(*map(loads, parts), strict=True)
  return (hosts.join_shards(texts), np.float32(hosts.join_shards(correct)),
          np.float32(hosts.join_shards(format_ok)), sum(late))


def _joined(call):
  pairs = hosts.join_shards([loads(part) for part in hosts.allgather(call)])
  return [row for row, _ in pairs], [encoded for _, encoded in pairs]


def dumps(value):
  """Bytes of nested lists, tuples, dicts, texts, numbers, bytes, arrays and EncodedPrompts."""
  buffers = []

  def plain(x):
    if isinstance(x, EncodedPrompt):
      return {"prompt": [plain(part) for part in (x.tokens, x.positions, x.images)]}
    if isinstance(x, bytes | np.ndarray):
      data = np.frombuffer(x, np.uint8) if isinstance(x, bytes) else np.ascontiguousarray(x)
      buffers.append(data.tobytes())
      return {"array": [data.dtype.str, list(data.shape), isinstance(x, bytes)]}
    if isinstance(x, np.generic):
      return x.item()
    if isinstance(x, dict):
      return {"dict": [[key, plain(each)] for key, each in x.items()]}
    if isinstance(x, tuple):
      return {"tuple": [plain(each) for each in x]}
    return [plain(each) for each in x] if isinstance(x, list) else x

  head = json.dumps(plain(value)).encode()
  return b"".join([len(head).to_bytes(8, "little"), head, *buffers])


def loads(data):
  """What `dumps` was given. Arrays are read-only views of `data`."""
  end = 8 + int.from_bytes(data[:8], "little")
  place = [end]

  def array(dtype, shape, is_bytes):
    found = np.frombuffer(data, dtype, int(np.prod(shape)), place[0])
    place[0] += found.nbytes
    return found.tobytes() if is_bytes else found.reshape(shape)

  def whole(x):
    if isinstance(x, list):
      return [whole(each) for each in x]
    if not isinstance(x, dict):
      return x
    (kind, content), = x.items()
    if kind == "array":
      return array(*content)
    if kind == "dict":
      return {key: whole(each) for key, each in content}
    parts = [whole(each) for each in content]
    return EncodedPrompt(*parts) if kind == "prompt" else tuple(parts)

  return whole(json.loads(data[8:end]))
