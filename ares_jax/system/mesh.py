"""The device mesh, and functions that shard arrays over it.

The mesh has three axes: "slice" splits the rows of a batch over TPU slices, which a data-centre
network joins and which each hold all weights; "data" splits rows, and the weights as in FSDP;
"model" splits heads and features (tensor parallelism). All code uses the current mesh, the one of
`jax.set_mesh`.
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
    data: devices on the data axis, within a slice, >= 1; -1 = all that `slices` and `model` leave.
    model: devices on the model axis, >= 1.
    devices: None is `jax.devices()`.
    slices: groups of devices that each hold a copy of the weights, >= 1. TPU devices know their
      slice; other devices are split in order. ValueError unless the product fits the devices.
  """
  devices = jax.devices() if devices is None else devices
  count, sizes = len(devices), f"slice={slices} " if slices != 1 else ""
  if min(slices, model) < 1 or (data < 1 and data != -1):
    raise ValueError(
      f"mesh {sizes}data={data} model={model}: sizes are >= 1; only data may be -1 (rest)")
  # With a single slice the devices may lack the attribute.
  slice_of = [getattr(device, "slice_index", 0) for device in devices]
  found = len(set(slice_of))
  if devices[0].platform == "tpu" and found != slices:
    raise ValueError(f"mesh slice={slices}, but the {count} devices are of {found} slices; set "
                     f"config.mesh.slice={found}")
  if data == -1:
    if count % (slices * model):
      raise ValueError(
        f"mesh {sizes}model={model} does not divide {count} devices; change config.mesh")
    data = count // (slices * model)
  # jax.make_mesh((3,)) on 4 devices silently uses 3 of them.
  if slices * data * model != count:
    raise ValueError(
      f"mesh {sizes and sizes + 'x '}data={data} x model={model} = {slices * data * model}, but "
      f"there are {count} devices; change config.mesh (data=-1 takes all that is left)")
  if devices[0].platform == "tpu":
    devices = [devices[index] for index in np.argsort(slice_of, kind="stable")]
  # jax.make_mesh splits the physical axes of a slice only on v5e: it refuses 16 x 4 on v6e:8x8.
  arranged = np.stack([
    mesh_utils.create_device_mesh((data, model), devices[start : start + data * model],
                                  allow_split_physical_axes=True)
    for start in range(0, count, data * model)])
  # AxisType.Explicit would need annotations wherever arrays are gathered or scanned.
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def shard(x, *spec):
  """Constrains `x` to the PartitionSpec of the `unmapped` axes in `spec`, if a mesh is current."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(unmapped, spec)))


def unmapped(axes):
  """Those of `axes`, an entry of a PartitionSpec, that no surrounding `jax.shard_map` splits.

  `sum_of_slices` splits the axis of slices likewise.
  """
  taken = {*jax.sharding.get_abstract_mesh().manual_axes}
  if within_a_slice():
    taken.add("slice")
  if not isinstance(axes, tuple):
    return None if axes in taken else axes
  return tuple(axis for axis in axes if axis not in taken) or None


def dividing(size, *axes):
  """`axes` if a mesh is current and they divide `size` together, else ()."""
  shape = jax.sharding.get_abstract_mesh().shape
  return axes if axes[0] in shape and size % math.prod(shape[axis] for axis in axes) == 0 else ()


def within_a_slice():
  """Whether the code being traced runs inside `sum_of_slices`, on the rows of one slice."""
  try:
    jax.lax.axis_size(_SLICES)
  except NameError:
    return False
  return True


def sum_of_slices(function, axes):
  """Applies `function` to the rows of each slice and sums the results over the slices.

  The slices communicate once; otherwise a gradient that a loop sums would cross the network between
  slices at every microbatch. `function` returns (tree to sum, tree to take the maximum of). `axes`
  says for each argument which axis of its arrays holds the rows.
  """
  slices = size("slice")
  if slices == 1:
    return function

  def split(argument, axis):
    return jax.tree.map(
      lambda x: shard(x.reshape(*x.shape[:axis], slices, x.shape[axis] // slices,
                                *x.shape[axis + 1 :]), *[None] * axis, *ROWS), argument)

  def on_all_slices(*arguments):
    # Not jax.shard_map: with two axes left to XLA, its partitioner crashes on a gather inside.
    mapped = jax.vmap(function, in_axes=axes, axis_name=_SLICES, spmd_axis_name="slice")
    summed, largest = mapped(*map(split, arguments, axes))
    return jax.tree.map(lambda x: x.sum(0), summed), jax.tree.map(lambda x: x.max(0), largest)

  return on_all_slices


def sharding(*spec):
  """`NamedSharding` of `PartitionSpec(*spec)` on the current mesh; ValueError if there is none."""
  return NamedSharding(_require(jax.sharding.get_mesh()), PartitionSpec(*spec))


def abstract(dtype, shape, *spec):
  """A `jax.ShapeDtypeStruct` laid out by `PartitionSpec(*spec)` on the current mesh."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*spec))


def size(*axes):
  """The product of the sizes of `axes` of the current mesh; ValueError if there is none."""
  shape = _require(jax.sharding.get_abstract_mesh()).shape
  return math.prod(shape[axis] for axis in axes)


def _require(mesh):
  if mesh.empty:
    raise ValueError("no mesh is current; enter jax.set_mesh(make_mesh(data, model)) first")
  return mesh


def put(tree, *spec):
  """Moves every leaf of `tree` to `PartitionSpec(*spec)` on the current mesh.

  An empty spec replicates. All processes call it, with equal leaves. The ValueError names a leaf of
  which an axis does not divide over its mesh axis.
  """
  target = sharding(*spec)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    check_divides(jax.tree_util.keystr(path), leaf.shape, target)
  if jax.process_count() == 1:
    return jax.device_put(tree, target)
  return jax.tree.map(lambda leaf: _put_local(leaf, target), tree)


def _put_local(leaf, target):
  """Moves a leaf that is equal on all processes: each fills the shards of its own devices."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.device_put(leaf, target)
  # jax.device_put would first compare the complete array between the processes.
  array = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
  return jax.make_array_from_callback(array.shape, target, lambda index: array[index])


def fetch(tree):
  """The leaves of `tree` as complete numpy arrays on every process; collective."""
  def fetch_leaf(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
      return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(fetch_leaf, tree)


def check_divides(name, shape, target):
  """Raises ValueError where an axis of the array `name` does not divide over its devices."""
  if len(target.spec) > len(shape):
    raise ValueError(f"{name or 'array'} {shape} has fewer axes than {target.spec}")
  for axis, axes in enumerate(target.spec):
    parts = size(*([axes] if isinstance(axes, str) else axes or ()))
    if shape[axis] % parts:
      raise ValueError(f"{name or 'array'} {shape}: axis {axis} does not divide over {parts} "
                       f"devices ({axes}); change the batch or config.mesh")
