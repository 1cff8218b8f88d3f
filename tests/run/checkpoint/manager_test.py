import errno
import os
import resource
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ares_jax.run.checkpoint import digest, manager, manifest, reader
from ares_jax.system import mesh as mesh_lib


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  key_data: jax.Array


def make_state(mesh, offset=0.0):
  params = {
    "w": jnp.arange(32.0).reshape(8, 4) + offset,
    "half": jnp.ones((4,), jnp.bfloat16),
    "nan": jnp.float32([np.nan, np.inf]),
  }
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  params["w"] = jax.device_put(params["w"], NamedSharding(mesh, PartitionSpec("data", "model")))
  replicated = NamedSharding(mesh, PartitionSpec())
  opt_state = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)).init(params)
  return State(
    step=jax.device_put(jnp.int32(7), replicated),
    params=params,
    opt_state=jax.device_put(opt_state, replicated),
    key_data=jax.device_put(jax.random.key_data(jax.random.split(jax.random.key(3), 4)),
                            NamedSharding(mesh, PartitionSpec("data"))),
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("before, after", [((1, 4, 1), (1, 2, 2)), ((2, 2, 1), (1, 2, 2)),
                                           ((1, 4, 1), (2, 1, 2))])
def test_restores_bit_for_bit_onto_another_mesh(tmp_path, before, after):
  def state_on(slices, *sizes, **how):
    return make_state(mesh_lib.make_mesh(*sizes, slices=slices), **how)

  state = state_on(*before)
  with manager.Checkpoints(str(tmp_path), keep=2) as saved:
    saved.save(7, state, {"data": {"next": 3}})
  target = manager.abstract_like(state_on(*after, offset=5.0))
  with manager.Checkpoints(str(tmp_path), keep=2) as saved:
    step, restored, extra = saved.restore(target)
  assert step == 7 and extra == {"data": {"next": 3}}
  assert_same(restored, state)
  for wanted, leaf in zip(jax.tree.leaves(target), jax.tree.leaves(restored), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
  assert restored.params["w"].sharding.mesh.devices.shape == after


def test_an_empty_directory_restores_nothing(tmp_path):
  with manager.Checkpoints(str(tmp_path / "new"), keep=1) as saved:
    assert saved.latest() is None
    assert saved.restore(manager.abstract_like({"a": jnp.ones(3)})) is None
    with pytest.raises(ValueError, match="no checkpoint 3 in"):
      saved.restore(manager.abstract_like({"a": jnp.ones(3)}), step=3)


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path):
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {"w": jnp.zeros((512, 512))}
  with manager.Checkpoints(str(tmp_path), keep=5) as saved:
    for i in range(1, 4):
      state = step(state)
      saved.save(i, state, {})
      state = step(state)
      jax.block_until_ready(state)
    for i in range(1, 4):
      _, restored, _ = saved.restore(manager.abstract_like(state), step=i)
      np.testing.assert_array_equal(restored["w"], np.full((512, 512), 2.0 * i - 1))


def test_keeps_the_newest(tmp_path):
  with manager.Checkpoints(str(tmp_path), keep=2) as saved:
    for step in (1, 2, 5):
      saved.save(step, {"a": np.float32([step])}, {})
    saved.wait()
    assert saved.steps() == [2, 5] and saved.latest() == 5
  with pytest.raises(ValueError, match="keep is 0"):
    manager.Checkpoints(str(tmp_path), keep=0)


def test_a_step_is_never_overwritten_or_saved_out_of_order(tmp_path):
  with manager.Checkpoints(str(tmp_path), keep=3) as saved:
    saved.save(4, {"a": np.zeros(2)}, {})
    for step in (4, 3):
      with pytest.raises(ValueError, match=f"step {step} is not after the newest checkpoint 4"):
        saved.save(step, {"a": np.zeros(2)}, {})


@pytest.mark.parametrize(
  "target, message",
  [
    ({"a": jnp.zeros(3), "b": jnp.zeros(2)}, r"b is not in it; c/0 is only in it"),
    ({"a": jnp.zeros(4), "c": [jnp.int32(0)]}, r"a is float32\[3\] in it, .* needs float32\[4\]"),
    ({"a": jnp.zeros(3, jnp.bfloat16), "c": [jnp.int32(0)]}, r"a is float32\[3\] .* bfloat16\[3\]"),
    ({"a": jnp.zeros(3), "c": [jnp.float32(0)]}, r"c/0 is int32\[\] in it, .* float32\[\]"),
    ({"a": jnp.zeros(3), "c": [jax.random.key(0)]}, r"c/0 is int32\[\] in it, .* key<fry>\[\]"),
  ],
)
def test_a_leaf_that_does_not_fit_is_named(tmp_path, target, message):
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, {"a": jnp.zeros(3), "c": [jnp.int32(0)]}, {})
    with pytest.raises(ValueError, match=message) as error:
      saved.restore(manager.abstract_like(target))
  assert "\n" not in str(error.value)


def test_a_target_without_shardings_is_an_error(tmp_path):
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, {"a": jnp.zeros(3)}, {})
    with pytest.raises(ValueError, match="leaf a of the restore target has no sharding"):
      saved.restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_only_arrays_and_json_are_saved(tmp_path):
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    with pytest.raises(ValueError, match="state leaf b/1 is int"):
      saved.save(1, {"a": jnp.zeros(3), "b": (jnp.zeros(1), 3)}, {})
    with pytest.raises(ValueError, match="state leaf b is a typed PRNG key"):
      saved.save(1, {"a": jnp.zeros(3), "b": jax.random.key(0)}, {})
    with pytest.raises(ValueError, match="extra of checkpoint 1 is not JSON"):
      saved.save(1, {"a": jnp.zeros(3)}, {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="extra of checkpoint 1 is not JSON"):
      saved.save(1, {"a": jnp.zeros(3)}, {"x": float("nan")})
    assert saved.latest() is None


def test_the_remains_of_a_killed_save_are_removed(tmp_path):
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, {"a": jnp.zeros(3)}, {})
  left = tmp_path / "2.orbax-checkpoint-tmp"
  left.mkdir()
  (left / "part").write_text("x")
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    assert saved.latest() == 1
    saved.save(2, {"a": jnp.zeros(3)}, {})
  assert not os.path.exists(left) and saved.latest() == 2


def test_reads_one_part_and_leaves_the_folder_alone(tmp_path):
  mesh = mesh_lib.make_mesh(2, 2)
  state = make_state(mesh)
  with manager.Checkpoints(str(tmp_path), keep=2) as saved:
    saved.save(7, state, {})
  half_done = tmp_path / "9.orbax-checkpoint-tmp"  # of a run that is saving just now
  half_done.mkdir()
  assert reader.newest_step(str(tmp_path)) == 7
  step, params = reader.read_part(str(tmp_path), "params",
                                      manager.abstract_like(state.params))
  assert step == 7 and half_done.is_dir()
  assert_same(params, state.params)
  none = tmp_path / "none"
  assert reader.newest_step(str(none)) is None and not none.exists()
  wrong = manager.abstract_like(state.params)
  del wrong["nan"]
  with pytest.raises(ValueError, match="params/nan is only in it"):
    reader.read_part(str(tmp_path), "params", wrong)


@pytest.mark.parametrize("best", [False, True])
def test_a_failed_save_is_noticed_and_the_older_checkpoint_stays(tmp_path, best):
  state = {"a": jnp.float32(np.random.default_rng(0).normal(size=(200, 200)))}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, state, {}, is_best=best)
    saved.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # like a full disk
    try:
      saved.save(2, state, {}, is_best=best)
      while not saved._saving.done():
        time.sleep(0.01)
      with pytest.raises(OSError, match="saving checkpoint 2 in .* failed, step 1 is intact: "):
        saved.check()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.steps() == [1]
    saved.save(3, state, {})
    saved.wait()
    # A better one that is not on disk does not take the place of the best.
    assert sorted(os.listdir(tmp_path)) == (["1", "3"] if best else ["3"])


def test_an_older_step_stays_until_the_newer_one_was_read_back(tmp_path, monkeypatch):
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, {"a": jnp.zeros(3)}, {})
    saved.wait()
    # The disk returns other bits.
    monkeypatch.setattr(digest, "digest_numpy", lambda array: "0" * 16)
    saved.save(2, {"a": jnp.ones(3)}, {})
    with pytest.raises(OSError, match="2 .* failed, step 1 is intact: .* a changed since"):
      saved.wait()
    assert saved.steps() == [1] and os.listdir(tmp_path) == ["1"]


def test_another_schema_is_refused_by_name(tmp_path, monkeypatch):
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    monkeypatch.setattr(manifest, "SCHEMA", 0)
    saved.save(1, {"a": jnp.zeros(3)}, {})
    saved.wait()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="record of schema 0, this version reads 1"):
      saved.restore(manager.abstract_like({"a": jnp.zeros(3)}))


@pytest.mark.parametrize("error, kind", [
  (OSError(errno.ESTALE, "the mount is gone"), OSError),
  (RuntimeError("UNAVAILABLE: try again"), RuntimeError),
  (FileNotFoundError("no such file"), manifest.DamagedError),
  (ValueError("checksum"), manifest.DamagedError),
])
def test_a_store_that_does_not_answer_is_not_damaged(error, kind):
  with pytest.raises(kind), manifest.damage_of_step(3):
    raise error


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 10)])
def test_a_missing_or_cut_file_is_named(tmp_path, damage):
  state = {"a": jnp.arange(4096.0)}
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, state, {})
    saved.wait()
    for path in (tmp_path / "1" / "state" / "d").iterdir():
      damage(path)
    with pytest.raises(manifest.DamagedError, match="remove the folder to begin") as error:
      saved.restore(manager.abstract_like(state))
  assert f"{tmp_path}/1/state/d/" in str(error.value) and "bound method" not in str(error.value)
  assert "is missing or damaged" in str(error.value)


def test_a_checkpoint_replaced_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
  state = {"params": {"a": jnp.zeros(3)}}
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, state, {})
    saved.wait()
    read = reader.read_leaves

    def replaced(directory, step, targets):
      if step == 1:
        saved.save(2, {"params": {"a": jnp.ones(3)}}, {})
        saved.wait()
      return read(directory, step, targets)

    monkeypatch.setattr(reader, "read_leaves", replaced)
    step, params = reader.read_part(str(tmp_path), "params",
                                        manager.abstract_like(state["params"]))
  assert step == 2
  np.testing.assert_array_equal(params["a"], np.ones(3))


def test_an_old_step_that_is_not_removed_is_removed_after_the_next_save(tmp_path, monkeypatch):
  delete, failures = manager.ocp.CheckpointManager.delete, [1]

  def fail(self, step):
    if failures:
      failures.pop()
      raise OSError(errno.EACCES, "Permission denied")
    delete(self, step)

  monkeypatch.setattr(manager.ocp.CheckpointManager, "delete", fail)
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    for step, kept in ((1, [1]), (2, [1, 2]), (3, [3])):
      saved.save(step, {"a": np.float32([step])}, {})
      saved.wait()
      assert saved.steps() == kept


def test_a_restore_sends_heartbeats(tmp_path, monkeypatch):
  monkeypatch.setattr(reader, "_READ_AT_ONCE", 8)
  state, heartbeats = {name: jnp.arange(4.0) for name in "abc"}, []
  with manager.Checkpoints(str(tmp_path), keep=1) as saved:
    saved.save(1, state, {})
    saved.wait()
    monkeypatch.setattr(reader.heartbeat, "heartbeat", lambda: heartbeats.append(1))
    _, restored, _ = saved.restore(manager.abstract_like(state))
  assert_same(restored, state)
  assert len(heartbeats) == 3  # none from the thread that verifies a save
