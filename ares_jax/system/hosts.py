"""What the processes of one run tell each other.

A run of several processes is one program: all reach the same collectives in the same order. So
what one of them learns alone (a row it cannot read, a signal, a full disk) is told to all before
anything follows from it: `exchange`, `leader`, `agree`. One process does without any of this.

Rows are read and answers are graded in shares, `share`; everything else that the host computes,
all compute alike, from the same numbers.
"""

import itertools
import json
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from ares_jax.system import heartbeat
from ares_jax.system.private_jax import coordination_client

_PIECE = 1 << 28  # bytes of all processes that a device holds while they are exchanged
_numbers = itertools.count()  # of what process 0 said; the same on all
left = threading.Event()  # this process waits for no other any more


def allgather_bytes(data):
  """The bytes that every process gives, in their order; all call it at the same point."""
  count = jax.process_count()
  if count == 1:
    return [data]
  high, low = divmod(len(data), 1 << 31)
  sizes = [(int(high) << 31) + int(low) for high, low in _stacked(np.int32([high, low]))]
  parts, piece = [bytearray() for _ in sizes], max(1 << 16, _PIECE // count)
  for start in range(0, max(sizes), piece):
    # A power of two: few programs are compiled.
    room = 1 << max(10, (min(piece, max(sizes) - start) - 1).bit_length())
    own = np.zeros(room, np.uint8)
    some = np.frombuffer(data[start:start + piece], np.uint8)
    own[:len(some)] = some
    for part, size, row in zip(parts, sizes, _stacked(own), strict=True):
      part += row[:max(0, min(piece, size - start))].tobytes()
  return [bytes(part) for part in parts]


def allgather(call):
  """What `call` returns on every process, bytes, in their order.

  Raises:
    ValueError: on all of them, where `call` raised it on one; names the process.
  """
  try:
    said = b"+" + call()
  except ValueError as error:
    if jax.process_count() == 1:
      raise
    said = b"-" + str(error).encode()
  parts = allgather_bytes(said)
  for number, part in enumerate(parts):
    if part[:1] == b"-":
      raise ValueError(f"process {number}: {part[1:].decode()}")
  return [part[1:] for part in parts]


def on_process_0(call):
  """What `call` returns on process 0, as JSON has it, on all; only process 0 calls it.

  The others wait without a device, for as long as it takes.

  Raises:
    ValueError: on all, where `call` raised it.
    pulse.Stopped: likewise.
  """
  if jax.process_count() == 1:
    return call()
  client, key, said = coordination_client(), f"ares/leader/{next(_numbers)}", b""
  if jax.process_index() == 0:
    try:
      said = json.dumps(call()).encode()
    except ValueError as error:
      client.key_value_set(key, f"-{error}")
      raise
    except heartbeat.StopRequested:
      text = "!"
    else:
      text = "+"
    client.key_value_set(key, text)
  else:
    text = _await(client, key)
    if text[0] == "-":
      raise ValueError(text[1:])
  if text == "!":
    heartbeat.heartbeat(collective=True)  # process 0 was asked to stop: all do
  return json.loads(allgather_bytes(said)[0])


def check_same(values, what):
  """Refuses processes that do not have the same {name: JSON value}.

  Args:
    values: of this process.
    what: ends the sentence "process 1 ...".

  Raises:
    ValueError: on all processes; names the process and what differs.
  """
  first, *others = map(json.loads, allgather_bytes(json.dumps(values).encode()))
  for number, other in enumerate(others, start=1):
    different = sorted(key for key in first.keys() | other.keys()
                       if key not in first or key not in other or first[key] != other[key])
    if different:
      shown = "; ".join(f"{key} is {other.get(key)!r}, process 0 has {first.get(key)!r}"
                        for key in different[:4])
      raise ValueError(f"process {number} {what}: {shown}"
                       + (f" and {len(different) - 4} more" if len(different) > 4 else "")
                       + "; start the same command on every host")


def local_name(name):
  """A file name of this process: NAME of the first, NAME.1 ... of the others."""
  number = jax.process_index()
  return f"{name}.{number}" if number else name


def any_process(flag):
  """Whether `flag` is true on any process; all call it at the same point."""
  return bool(flag) if jax.process_count() == 1 else bool(_stacked(np.int32(bool(flag))).any())


def gather_errors(name, error):
  """The errors, "" for none, of all processes about `name`, which is used once.

  For threads beside the main one, whose collectives would mix with its own.
  """
  if jax.process_count() == 1:
    return [error]
  client = coordination_client()
  client.key_value_set(f"ares/vote/{name}/{jax.process_index()}", f"={error}")
  return [_await(client, f"ares/vote/{name}/{number}", beat=False)[1:]
          for number in range(jax.process_count())]


def barrier(name, seconds):
  """Whether all processes come to this point within so many seconds; `name` is used once."""
  if jax.process_count() == 1:
    return True
  try:
    coordination_client().wait_at_barrier(f"ares/together/{name}", int(1000 * seconds))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def local_shard(items):
  """The part of a sequence that this process works on; `whole` puts the parts together."""
  return items[jax.process_index()::jax.process_count()]


def join_shards(parts):
  """The sequence of which `parts` are every process's `share`."""
  return [item for row in itertools.zip_longest(*parts, fillvalue=_NONE) for item in row
          if item is not _NONE]


_NONE = object()


def _stacked(array):
  return np.asarray(multihost_utils.process_allgather(array))


def _await(client, key, *, beat=True):
  """The value of a key, when it is there."""
  while True:
    if left.is_set():
      raise RuntimeError("this process has left the run")
    if beat:
      heartbeat.heartbeat()
    try:
      return client.blocking_key_value_get(key, 5000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
