"""Every leaf of the state of a stage is in its checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ares_jax.models import weights
from ares_jax.run import model as model_lib
from ares_jax.run.checkpoint import manager, manifest, reader
from ares_jax.system import mesh
from ares_jax.training import aepo_step, sft_step, shaping


def zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


@pytest.fixture(scope="module", params=["aepo", "sft"])
def state(request):
  config = tiny.read()
  model = model_lib.model_config(config.model)
  with jax.set_mesh(mesh.make_mesh(1, 1, devices=jax.devices()[:1])):
    init = functools.partial(weights.init, weights.weight_table(model))
    params = mesh.put(zeros(jax.eval_shape(init, jax.random.key(0))))
    if request.param == "aepo":
      yield aepo_step.init_state(config.aepo, params)
    else:
      yield sft_step.init_state(config.adacs, params)


def changed(leaf):
  # Another bit pattern even where the leaf is NaN, as thresholds are before the first batch.
  return np.where(np.isnan(leaf), 1, leaf + 1).astype(leaf.dtype)


def test_every_leaf_is_in_the_checkpoint(state, tmp_path):
  with manager.Checkpoints(str(tmp_path), keep=1) as checkpoints:
    checkpoints.save(1, jax.tree.map(changed, jax.device_get(state)), {})
    _, restored, _ = checkpoints.restore(manager.abstract_like(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
    before = functools.reduce(
      lambda node, key: getattr(node, key.name) if hasattr(key, "name") else
      node[getattr(key, "key", getattr(key, "idx", None))], path, state)
    np.testing.assert_array_equal(leaf, changed(np.asarray(before)), err_msg=str(path))


def test_a_change_of_one_leaf_changes_the_record_of_that_leaf(state):
  arrays = {name: np.asarray(leaf) for name, leaf in reader.flatten(state).items()}
  original = manifest.make_manifest(arrays, {})["leaves"]
  for name in arrays:
    one = manifest.make_manifest(arrays | {name: changed(arrays[name])}, {})["leaves"]
    assert [other for other in original if original[other] != one[other]] == [name]


def test_a_state_holds_what_the_method_tracks():
  assert {field.name for field in dataclasses.fields(aepo_step.AepoState)} == {
    "step", "batches", "params", "opt_state", "controllers"}
  assert {field.name for field in dataclasses.fields(shaping.Controllers)} == {
    "threshold", "hwe_target", "multiplier", "kappa", "alpha"}
