"""The device mesh, made once, and the few ways arrays get onto it.

Two axes: "data" (rows of a batch, and FSDP shards of the weights) and "model" (tensor parallel).
Every other room uses the mesh that `jax.set_mesh` made current.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model")


def make_mesh(data, model, devices=None):
  """Arranges all devices as a (data, model) mesh.

  Args:
    data: devices on the data axis, >= 1; -1 = all that `model` leaves.
    model: devices on the model axis, >= 1.
    devices: devices to use; None is `jax.devices()`.

  Raises:
    ValueError: the product is not exactly the number of devices.
  """
  count = len(jax.devices() if devices is None else devices)
  if model < 1 or (data < 1 and data != -1):
    raise ValueError(f"mesh data={data} model={model}: sizes are >= 1; only data may be -1 (rest)")
  if data == -1:
    if count % model:
      raise ValueError(f"mesh model={model} does not divide {count} devices; change config.mesh")
    data = count // model
  # jax.make_mesh((3,)) on 4 devices takes 3 of them and says nothing.
  if data * model != count:
    raise ValueError(
      f"mesh data={data} x model={model} = {data * model}, but there are {count} devices; "
      "change config.mesh (data=-1 takes all that is left)"
    )
  # jax.make_mesh splits a slice's own axes on v5e alone: it refuses 16 x 4 on v6e:8x8.
  arranged = mesh_utils.create_device_mesh(
    (data, model), jax.devices() if devices is None else devices, allow_split_physical_axes=True)
  # Explicit axes need edits wherever arrays are gathered or scanned.
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 2)


def shard(x, *spec):
  """Constrains `x` to `PartitionSpec(*spec)` on the current mesh, on CPU as on TPU.

  Without a current mesh (`jax.set_mesh`) there is nothing to shard over and `x` is returned. Axes
  of a surrounding `jax.shard_map` are split already and drop out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  left = [None if axis in mesh.manual_axes else axis for axis in spec]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*left))


def sharding(*spec):
  """`NamedSharding` of `PartitionSpec(*spec)` on the current mesh.

  Raises:
    ValueError: no mesh is current.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    raise ValueError("no mesh is current; enter jax.set_mesh(make_mesh(data, model)) first")
  return NamedSharding(mesh, PartitionSpec(*spec))


def size(axis):
  """Devices along `axis` of the current mesh."""
  return sharding().mesh.shape[axis]


def put(tree, *spec):
  """Moves every leaf of `tree` to `PartitionSpec(*spec)` on the current mesh; no spec replicates.

  Several processes call it together, with equal leaves.

  Raises:
    ValueError: no mesh is current, or a leaf's axis does not divide over its mesh axis; names
      the leaf.
  """
  target = sharding(*spec)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    _check_divides(jax.tree_util.keystr(path), leaf.shape, target)
  if jax.process_count() == 1:
    return jax.device_put(tree, target)
  return jax.tree.map(lambda leaf: _put_own(leaf, target), tree)


def _put_own(leaf, target):
  """`leaf`, which is the same on all processes: each gives its devices their parts."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.device_put(leaf, target)
  # jax.device_put would first compare all of it between the processes.
  own = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
  return jax.make_array_from_callback(own.shape, target, lambda index: own[index])


def fetch(tree):
  """`tree` as numpy arrays, whole on every process; all of a run's processes call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_fetched, tree)


def _fetched(leaf):
  if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
    return np.asarray(leaf)
  return multihost_utils.process_allgather(leaf, tiled=True)


def _check_divides(name, shape, target):
  if len(target.spec) > len(shape):
    raise ValueError(f"{name or 'array'} {shape} has fewer axes than {target.spec}")
  for axis, axes in enumerate(target.spec):
    if axes is None:
      continue
    parts = math.prod(target.mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes))
    if shape[axis] % parts:
      raise ValueError(
        f"{name or 'array'} {shape}: axis {axis} does not divide over {parts} devices "
        f"({axes}); change the batch or config.mesh"
      )
