"""The device mesh, made once, and the few ways arrays get onto it.

Three axes: "slice" (rows of a batch; slices of TPUs, joined by a data-centre network, each have all
weights), "data" (rows, and FSDP shards of the weights) and "model" (tensor parallel). Every other
room uses the mesh that `jax.set_mesh` made current.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("slice", "data", "model")
ROWS = ("slice", "data")  # axes that split the rows of a batch
_SLICES = "rows of a slice"  # name of the axis that `sum_of_slices` maps over


def make_mesh(data, model, devices=None, *, slices=1):
  """Arranges all devices as a (slices, data, model) mesh.

  Args:
    data: devices of a slice on the data axis, >= 1; -1 = all that `slices` and `model` leave.
    model: devices on the model axis, >= 1.
    devices: devices to use; None is `jax.devices()`.
    slices: groups of devices with a copy of the weights each, >= 1: the slices of TPUs, which know
      theirs; of other devices runs of equal length in the order of their processes.

  Raises:
    ValueError: the product is not exactly the number of devices, or TPUs have other slices.
  """
  devices = jax.devices() if devices is None else devices
  count, sizes = len(devices), f"slice={slices} " if slices != 1 else ""
  if min(slices, model) < 1 or (data < 1 and data != -1):
    raise ValueError(f"mesh {sizes}data={data} model={model}: sizes are >= 1; only data may be -1 "
                     "(rest)")
  # Devices of one slice alone may not name it.
  own = [getattr(device, "slice_index", 0) for device in devices]
  if devices[0].platform == "tpu" and len(set(own)) != slices:
    raise ValueError(f"mesh slice={slices}, but the {count} devices are of {len(set(own))} slices; "
                     f"set config.mesh.slice={len(set(own))}")
  if data == -1:
    if count % (slices * model):
      raise ValueError(f"mesh {sizes}model={model} does not divide {count} devices; change "
                       "config.mesh")
    data = count // (slices * model)
  # jax.make_mesh((3,)) on 4 devices takes 3 of them and says nothing.
  if slices * data * model != count:
    raise ValueError(
      f"mesh {sizes and sizes + 'x '}data={data} x model={model} = {slices * data * model}, but "
      f"there are {count} devices; change config.mesh (data=-1 takes all that is left)"
    )
  if devices[0].platform == "tpu":
    devices = [devices[place] for place in np.argsort(own, kind="stable")]
  # jax.make_mesh splits a slice's own axes on v5e alone: it refuses 16 x 4 on v6e:8x8.
  arranged = np.stack([
    mesh_utils.create_device_mesh((data, model), devices[start : start + data * model],
                                  allow_split_physical_axes=True)
    for start in range(0, count, data * model)])
  # Explicit axes need edits wherever arrays are gathered or scanned.
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def shard(x, *spec):
  """Constrains `x` to `PartitionSpec(*spec)` on the current mesh, on CPU as on TPU.

  Without a current mesh (`jax.set_mesh`) there is nothing to shard over and `x` is returned. Axes
  of a surrounding `jax.shard_map` are split already and drop out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(unmapped, spec)))


def unmapped(axes):
  """The axes that no surrounding `jax.shard_map` or `sum_of_slices` has split already.

  Args:
    axes: an entry of a PartitionSpec: a name, a tuple of names or None.
  """
  taken = {*jax.sharding.get_abstract_mesh().manual_axes}
  if within_a_slice():
    taken.add("slice")
  if not isinstance(axes, tuple):
    return None if axes in taken else axes
  return tuple(axis for axis in axes if axis not in taken) or None


def within_a_slice():
  """Whether the code being traced runs inside `sum_of_slices`, on the rows of one slice."""
  try:
    jax.lax.axis_size(_SLICES)
  except NameError:
    return False
  return True


def sum_of_slices(function, axes):
  """`function` on each slice's own rows, its results summed over the slices.

  They meet once, however long `function` loops: a gradient that a loop sums microbatch by
  microbatch would else cross the network between slices in each.

  Args:
    function: of arrays; returns (tree that is summed, tree of which the largest is taken).
    axes: of each argument, which axis of its arrays are rows, split over ROWS.

  Returns:
    a function of the same arguments that returns the same.
  """
  slices = size("slice")
  if slices == 1:
    return function

  def split(argument, axis):
    return jax.tree.map(
      lambda x: shard(x.reshape(*x.shape[:axis], slices, -1, *x.shape[axis + 1 :]),
                      *[None] * axis, *ROWS), argument)

  def of_all(*arguments):
    # Not jax.shard_map: where two axes are left to it, XLA's partitioner dies of a gather inside.
    mapped = jax.vmap(function, in_axes=axes, axis_name=_SLICES, spmd_axis_name="slice")
    summed, largest = mapped(*map(split, arguments, axes))
    return (jax.tree.map(lambda x: x.sum(0), summed),
            jax.tree.map(lambda x: x.max(0), largest))

  return of_all


def sharding(*spec):
  """`NamedSharding` of `PartitionSpec(*spec)` on the current mesh.

  Raises:
    ValueError: no mesh is current.
  """
  return NamedSharding(_there(jax.sharding.get_mesh()), PartitionSpec(*spec))


def size(*axes):
  """Devices along `axes` of the current mesh, all of them together; also while tracing.

  Raises:
    ValueError: no mesh is current.
  """
  shape = _there(jax.sharding.get_abstract_mesh()).shape
  return math.prod(shape[axis] for axis in axes)


def _there(mesh):
  if mesh.empty:
    raise ValueError("no mesh is current; enter jax.set_mesh(make_mesh(data, model)) first")
  return mesh


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
