import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from ares_jax.system import mesh as mesh_lib


def test_takes_all_devices_and_fills_in_the_rest():
  mesh = mesh_lib.make_mesh(-1, 2)
  assert dict(mesh.shape) == {"slice": 1, "data": 2, "model": 2}
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert dict(mesh_lib.make_mesh(4, 1).shape) == {"slice": 1, "data": 4, "model": 1}


def test_slices_are_consecutive_devices():
  mesh = mesh_lib.make_mesh(-1, 1, slices=2)
  assert dict(mesh.shape) == {"slice": 2, "data": 2, "model": 1}
  assert mesh.devices[0].ravel().tolist() == jax.devices()[:2]


@pytest.mark.parametrize(
  "data, model, message",
  [
    (3, 1, r"3 x model=1 = 3, but there are 4 devices"),
    (4, 2, r"= 8, but there are 4 devices"),
    (-1, 3, r"model=3 does not divide 4 devices"),
    (0, 1, r"sizes are >= 1"),
    (2, -1, r"sizes are >= 1"),
  ],
)
def test_a_product_that_is_not_the_device_count_is_an_error(data, model, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(data, model)


@pytest.mark.parametrize("data, slices, message", [
  (-1, 3, "slice=3 model=1 does not divide 4 devices"),
  (1, 2, "slice=2 x data=1 x model=1 = 2, but there are 4 devices"), (-1, 0, "sizes are >= 1")])
def test_slices_are_part_of_the_product(data, slices, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(data, 1, slices=slices)


@pytest.mark.parametrize("slice_of, slices", [((0, 0, 1, 1), 1), ((0, 0, 1, 1), 4), ((0,) * 4, 2)])
def test_the_slices_of_tpus_must_match(slice_of, slices):
  chips = [types.SimpleNamespace(platform="tpu", slice_index=index) for index in slice_of]
  found = len(set(slice_of))
  with pytest.raises(ValueError, match=f"slice={slices}, but .* of {found} slices; set "
                                       f"config.mesh.slice={found}"):
    mesh_lib.make_mesh(-1, 1, chips, slices=slices)


def test_results_of_the_slices_are_summed():
  def function(x_NR):
    # The rows of one slice, one microbatch after the other.
    assert x_NR.shape == (3, 2) and mesh_lib.within_a_slice()
    return {"sum": jax.lax.map(jnp.sum, x_NR).sum()}, x_NR.max()

  x_NR = np.arange(12.0).reshape(3, 4)
  with jax.set_mesh(mesh_lib.make_mesh(1, 2, slices=2)):
    split = jax.jit(mesh_lib.sum_of_slices(function, (1,)))
    summed, largest = split(mesh_lib.put(x_NR, None, mesh_lib.ROWS))
    assert not mesh_lib.within_a_slice()
  assert (summed["sum"], largest) == (66, 11)


def test_inside_a_shard_map_a_constraint_leaves_out_its_axes():
  def of_slice(x):
    assert mesh_lib.unmapped(mesh_lib.ROWS) == ("data",)
    assert mesh_lib.unmapped("slice") is None and mesh_lib.unmapped(None) is None
    return mesh_lib.shard(x + 1, mesh_lib.ROWS)

  with jax.set_mesh(mesh_lib.make_mesh(2, 1, slices=2)):
    rows = PartitionSpec("slice")
    x = jax.jit(jax.shard_map(of_slice, axis_names={"slice"}, in_specs=rows, out_specs=rows))(
      np.zeros((8, 3)))
  assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


def test_shard_really_splits_on_cpu_devices():
  with jax.set_mesh(mesh_lib.make_mesh(4, 1)):
    x = jax.jit(lambda x: mesh_lib.shard(x * 2, "data"))(jnp.ones((8, 3)))
  assert [shard.data.shape for shard in x.addressable_shards] == [(2, 3)] * 4


def test_shard_refuses_an_axis_the_mesh_does_not_have():
  with jax.set_mesh(mesh_lib.make_mesh(4, 1)), pytest.raises(ValueError, match="date"):
    jax.jit(lambda x: mesh_lib.shard(x, "date"))(jnp.ones((8, 3)))


def test_shard_without_a_mesh_returns_the_array():
  x = jnp.ones((3,))
  assert mesh_lib.shard(x, "data") is x


def test_put_splits_by_the_spec_and_replicates_without_one():
  tree = {"tokens": np.arange(8).reshape(4, 2), "id": np.arange(4)}
  with jax.set_mesh(mesh_lib.make_mesh(2, 2)):
    placed = mesh_lib.put(tree, "data")
    replicated = mesh_lib.put(tree["id"])
    assert replicated.sharding == mesh_lib.sharding()
  assert placed["tokens"].addressable_shards[0].data.shape == (2, 2)
  assert replicated.is_fully_replicated
  np.testing.assert_array_equal(placed["tokens"], tree["tokens"])


def test_put_names_the_leaf_that_does_not_divide():
  with jax.set_mesh(mesh_lib.make_mesh(4, 1)):
    with pytest.raises(ValueError, match=r"\['b'\] \(6, 2\): axis 0 does not divide over 4"):
      mesh_lib.put({"a": np.zeros((4,)), "b": np.zeros((6, 2))}, "data")
    with pytest.raises(ValueError, match="fewer axes"):
      mesh_lib.put(np.zeros((4,)), "data", "model")


@pytest.mark.parametrize("function", [lambda: mesh_lib.put(np.zeros(4)),
                                      lambda: mesh_lib.size(*mesh_lib.ROWS)])
def test_put_and_size_need_a_mesh(function):
  with pytest.raises(ValueError, match="no mesh is current"):
    function()
