"""Communication between the processes of one run.

A run of several processes is one program: all processes make the same collective calls in the same
order. So if one process alone learns something (an unreadable row, a signal, a full disk), it tells
the others before anyone acts on it. With one process every function here returns at once.
shares.py says which rows of a batch a process reads, grades and packs.
"""

import itertools
import json
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ares_jax.system import heartbeat
from ares_jax.system.private_jax import coordination_client

_CHUNK_BYTES = 1 << 28  # of all processes that a device holds during an allgather
_calls = itertools.count()  # of `on_process_0`; the same on all processes
left = threading.Event()  # set when this process no longer waits for others


def allgather_bytes(data):
  """The bytes of every process, in the order of processes; collective."""
  count = jax.process_count()
  if count == 1:
    return [data]
  sizes = _stack(np.frombuffer(np.int64(len(data)), np.uint8)).view(np.int64).ravel().tolist()
  parts = [bytearray() for _ in sizes]
  chunk = max(1 << 16, _CHUNK_BYTES // count)
  for start in range(0, max(sizes), chunk):
    # Sizes are powers of two, so that few programs are compiled.
    capacity = 1 << max(10, (min(chunk, max(sizes) - start) - 1).bit_length())
    some = np.frombuffer(data[start:start + chunk], np.uint8)
    local = np.pad(some, (0, capacity - len(some)))
    for part, size, row in zip(parts, sizes, _stack(local), strict=True):
      part += row[:max(0, min(chunk, size - start))].tobytes()
  return [bytes(part) for part in parts]


def _stack(array):
  return np.asarray(multihost_utils.process_allgather(array))


def exchange_bytes(parts):
  """The bytes that every process has for this one, in the order of processes; collective.

  `parts` are this process's bytes for each process. A process receives no more than its own.
  """
  count = jax.process_count()
  if count == 1:
    return list(parts)
  lengths = np.array([len(part) for part in parts], np.int64).view(np.uint8)
  sizes = _stack(lengths).view(np.int64)  # [from, to]
  largest = int(sizes.max())
  received = [bytearray() for _ in parts]
  chunk = max(1 << 16, _CHUNK_BYTES // count**2)
  for start in range(0, largest, chunk):
    capacity = 1 << max(10, (min(chunk, largest - start) - 1).bit_length())
    local = np.zeros((count, capacity), np.uint8)
    for row, part in zip(local, parts, strict=True):
      some = np.frombuffer(part[start:start + chunk], np.uint8)
      row[:len(some)] = some
    for of, size, row in zip(received, sizes[:, jax.process_index()], _all_to_all(local),
                             strict=True):
      of += row[:max(0, min(chunk, int(size) - start))].tobytes()
  return [bytes(part) for part in received]


def _all_to_all(rows):
  """uint8 [processes, n]: the row that each process has for this one; `rows` are those it sends."""
  count, local = jax.process_count(), jax.local_device_count()
  devices = np.array([[device for device in jax.devices() if device.process_index == number]
                      for number in range(count)])
  # Every device carries a part of each row: [from, device, to, bytes].
  pieces = np.pad(rows, ((0, 0), (0, -rows.shape[1] % local))).reshape(count, local, -1)
  pieces = pieces.swapaxes(0, 1)
  mesh = Mesh(devices, ("process", "device"))
  split = NamedSharding(mesh, PartitionSpec("process", "device"))
  with jax.set_mesh(mesh):
    sent = jax.make_array_from_callback((count, *pieces.shape), split,
                                        lambda index: pieces[None, index[1]])
    got = jax.jit(_swap, out_shardings=split)(sent)
  parts = {part.index[1].start or 0: np.asarray(part.data)[0, 0]
           for part in got.addressable_shards}
  return np.concatenate([parts[number] for number in range(local)], 1)[:, :rows.shape[1]]


def _swap(x):
  return x.swapaxes(0, 2)


def allgather(call):
  """The bytes that `call` returns on every process, in the order of processes; collective.

  If `call` raises ValueError on one process, all raise it, with the number of that process; so it
  is with StopRequested.
  """
  try:
    message = b"+" + call()
  except (ValueError, heartbeat.StopRequested) as error:
    if jax.process_count() == 1:
      raise
    message = b"-" + str(error).encode() if isinstance(error, ValueError) else b"!"
  parts = allgather_bytes(message)
  for number, part in enumerate(parts):
    if part[:1] == b"-":
      raise ValueError(f"process {number}: {part[1:].decode()}")
  if b"!" in parts:
    heartbeat.heartbeat(collective=True)  # one process was asked to stop, so all stop
  return [part[1:] for part in parts]


def agree(call):
  """What `call` returns on this process, once all have made theirs; collective.

  If it raises ValueError on one process, all raise it, with the number of that process.
  """
  found = []
  allgather(lambda: found.append(call()) or b"")
  return found[0]


def on_process_0(call):
  """Calls `call` on process 0 alone and returns its JSON value on all; collective.

  The others wait without a device, for any time. All processes raise the ValueError or the
  StopRequested of `call`.
  """
  if jax.process_count() == 1:
    return call()
  client, key = coordination_client(), f"ares/process_0/{next(_calls)}"
  value = b""
  if jax.process_index() == 0:
    outcome = "+"
    try:
      value = json.dumps(call()).encode()
    except ValueError as error:
      client.key_value_set(key, f"-{error}")
      raise
    except heartbeat.StopRequested:
      outcome = "!"
    client.key_value_set(key, outcome)
  else:
    outcome = _await(client, key)
    if outcome[0] == "-":
      raise ValueError(outcome[1:])
  if outcome == "!":
    heartbeat.heartbeat(collective=True)  # raises StopRequested on all processes
  return json.loads(allgather_bytes(value)[0])


def check_same(values, message):
  """Raises ValueError on all processes if their `values`, {name: JSON value}, differ; collective.

  `message` completes the sentence "process 1 ...".
  """
  first, *others = map(json.loads, allgather_bytes(json.dumps(values).encode()))
  for number, other in enumerate(others, start=1):
    different = sorted(key for key in first.keys() | other.keys()
                       if key not in first or key not in other or first[key] != other[key])
    if different:
      shown = "; ".join(f"{key} is {other.get(key)!r}, process 0 has {first.get(key)!r}"
                        for key in different[:4])
      more = f" and {len(different) - 4} more" if len(different) > 4 else ""
      raise ValueError(
        f"process {number} {message}: {shown}{more}; start the same command on every host")


def local_name(name):
  """A file name of this process: NAME on process 0, NAME.1, NAME.2, ... on the others."""
  number = jax.process_index()
  return f"{name}.{number}" if number else name


def any_process(flag):
  """Whether `flag` is true on any process; collective."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(_stack(np.int32(bool(flag))).any())


def gather_errors(name, error):
  """The error texts of all processes, "" for none; `name` is used once in a run.

  For threads beside the main one, whose device collectives would mix with those of the main thread.
  """
  if jax.process_count() == 1:
    return [error]
  client = coordination_client()
  client.key_value_set(f"ares/vote/{name}/{jax.process_index()}", f"={error}")
  return [_await(client, f"ares/vote/{name}/{number}", in_main_thread=False)[1:]
          for number in range(jax.process_count())]


def barrier(name, seconds):
  """Whether all processes make this call within `seconds`; `name` is used once in a run."""
  if jax.process_count() == 1:
    return True
  try:
    coordination_client().wait_at_barrier(f"ares/barrier/{name}", int(1000 * seconds))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def local_shard(items):
  """This process's items of a sequence: every n-th from its index on, with n processes."""
  return items[jax.process_index()::jax.process_count()]


def _await(client, key, *, in_main_thread=True):
  """The value of a key, once a process has set it."""
  while not left.is_set():
    if in_main_thread:
      heartbeat.heartbeat()
    try:
      return client.blocking_key_value_get(key, 5000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
  raise RuntimeError("this process has left the run")
