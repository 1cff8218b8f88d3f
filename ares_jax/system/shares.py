"""Shares of a batch: each process holds the rows that its own devices compute with.

Devices of mesh.ROWS split the rows of an array (prompts, responses, packed rows); each takes a
block of them. If the "model" axis crosses hosts, several processes hold the same rows. Every
process knows the sizes and grades of all rows, so all of them decide alike; tokens and images are
with the holders of a row alone.
"""

import dataclasses
import json

import jax
import numpy as np

from ares_jax.system import hosts, mesh


@dataclasses.dataclass(frozen=True)
class Share:
  """Which processes hold which rows of a batch; the same on every process."""

  holders: tuple  # of each row: the processes that hold it, a tuple of ascending numbers

  @property
  def held(self):
    """int: the rows of this process, ascending."""
    return np.flatnonzero([jax.process_index() in each for each in self.holders])

  @property
  def owner(self):
    """int, for each row: the one of its holders that grades and sends it."""
    return np.array([each[row % len(each)] for row, each in enumerate(self.holders)], int)


def share(rows):
  """The Share of a batch of `rows` on the current mesh.

  If the devices of mesh.ROWS do not divide the rows, the first rows follow the last ones again, as
  often as needed.
  """
  if jax.process_count() == 1:
    return Share(((0,),) * rows)
  shards = _processes_of_shards()
  each, holders = -(-rows // len(shards)), [set() for _ in range(rows)]
  for position in range(each * len(shards)):
    holders[position % rows] |= shards[position // each]
  return Share(tuple(tuple(sorted(each)) for each in holders))


def local_shards():
  """int: the numbers of the devices of mesh.ROWS, in order, that are this process's; ascending."""
  if jax.process_count() == 1:
    return np.arange(mesh.size(*mesh.ROWS))
  return np.flatnonzero([jax.process_index() in each for each in _processes_of_shards()])


def _processes_of_shards():
  devices = jax.sharding.get_mesh().devices
  return [{device.process_index for device in shard}
          for shard in devices.reshape(-1, devices.shape[-1])]


def gather(share, values):
  """The values of all rows, on every process; `values` is an array of those held. Collective."""
  if jax.process_count() == 1:
    return values
  values = np.ascontiguousarray(values)
  own = share.owner[share.held] == jax.process_index()
  whole = np.zeros((len(share.holders), *values.shape[1:]), values.dtype)
  for number, data in enumerate(hosts.allgather_bytes(values[own].tobytes())):
    rows = np.flatnonzero(share.owner == number)
    whole[rows] = np.frombuffer(data, values.dtype).reshape(len(rows), *values.shape[1:])
  return whole


def put_rows(tree, rows, *spec):
  """`mesh.put` of leaves of which each process has the rows of its own devices alone, or all rows.

  `rows` is their number over all processes; `spec` has mesh.ROWS on their axis.
  """
  if jax.process_count() == 1:
    return mesh.put(tree, *spec)
  axis, target = spec.index(mesh.ROWS), mesh.sharding(*spec)

  def put_leaf(path, leaf):
    shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1:])
    mesh.check_divides(jax.tree_util.keystr(path), shape, target)
    array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return jax.make_array_from_process_local_data(target, array, shape)

  return jax.tree_util.tree_map_with_path(put_leaf, tree)


def fetch_rows(tree):
  """numpy arrays of the rows that this process's devices have, of arrays split over mesh.ROWS."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def fetch_leaf(leaf):
    parts = {part.index[0].start or 0: part for part in leaf.addressable_shards}
    return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])

  return jax.tree.map(fetch_leaf, tree)


def fetch_on_process_0(leaf):
  """The complete numpy array on process 0, None on the others; collective."""
  if jax.process_count() == 1 or not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  # By the replicas with number 0 every element comes once.
  local = [part for part in leaf.addressable_shards if part.replica_id == 0]
  blocks = [[(each.start or 0, size if each.stop is None else each.stop)
             for each, size in zip(part.index, leaf.shape, strict=True)] for part in local]
  where = map(json.loads, hosts.allgather_bytes(json.dumps(blocks).encode()))
  sent = b"".join(np.asarray(part.data).tobytes() for part in local)
  received = hosts.exchange_bytes([sent] + [b""] * (jax.process_count() - 1))
  if jax.process_index():
    return None
  whole = np.empty(leaf.shape, leaf.dtype)
  for parts, data in zip(where, received, strict=True):
    start = 0
    for part in parts:
      into = whole[(*(slice(*each) for each in part), ...)]
      into[...] = np.frombuffer(data, whole.dtype, into.size, start).reshape(into.shape)
      start += into.nbytes
  return whole
