import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import golden_batch

from ares_jax import mesh as mesh_lib
from ares_jax.models import weights
from ares_jax.models.published import SIZE_3B, SIZE_7B

CONFIG = golden_batch.config("untied")


def test_counts_of_3b_and_7b_are_the_published_ones():
  assert weights.count(SIZE_3B) == 3_754_622_976
  assert weights.count(SIZE_7B) == 8_292_166_656


@pytest.mark.parametrize("config", [SIZE_3B, SIZE_7B], ids=["3b", "7b"])
@pytest.mark.parametrize("data, model", [(256, 1), (64, 1), (64, 4), (16, 4), (8, 2)])
def test_published_sizes_divide_over_wide_meshes(config, data, model):
  mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
  shards = weights.shardings(config, mesh)
  held = sum(int(np.prod(sharding.shard_shape(leaf.shape))) for leaf, sharding in
             zip(jax.tree.leaves(weights.abstract(config, None, jnp.float32)),
                 jax.tree.leaves(shards), strict=True))
  # What is not split over every device is biases, norms, K, V and the vision MLP.
  assert held < 1.35 * weights.count(config) / (data * model) + 2e6


def test_8_way_tensor_parallelism_splits_3b_but_not_the_28_heads_of_7b():
  mesh = jax.sharding.AbstractMesh((8, 8), ("data", "model"))
  assert weights.shardings(SIZE_3B, mesh)["blocks"]["q"].shard_shape((36, 2048, 16, 128))[2] == 2
  with pytest.raises(ValueError) as error:
    weights.shardings(SIZE_7B, mesh)
  # 28 = 4 * 7: of powers of two, model = 1, 2 and 4 are the ones that 7B knows.
  faults = re.findall(r"(\S+) \([\d, ]+\): (\d+ over \w+=\d+)", str(error.value))
  assert faults == [(f"blocks/{name}", "28 over model=8") for name in ("o", "q", "q_bias")]


def test_kv_heads_and_the_vision_mlp_stay_whole_on_the_model_axis():
  mesh = jax.sharding.AbstractMesh((16, 4), ("data", "model"))
  for config in (SIZE_3B, SIZE_7B):
    shards = weights.shardings(config, mesh)
    for block, names in ((shards["blocks"], ("k", "v", "k_bias", "v_bias")),
                         (shards["vision"]["blocks"], ("gate", "up", "down"))):
      assert all("model" not in block[name].spec for name in names)
    heads = shards["vision"]["blocks"]["qkv"].shard_shape((32, 1280, 3, 16, 80))
    assert heads == (32, 80, 3, 4, 80)


def test_a_mesh_that_does_not_divide_is_an_error_naming_the_tensors():
  mesh = jax.sharding.AbstractMesh((3, 1), ("data", "model"))
  with pytest.raises(ValueError, match=r"q \(3, 32, 4, 8\): 32 over data=3.*embed \(128.*change"):
    weights.shardings(CONFIG, mesh)


def test_abstract_init_and_shardings_have_one_structure():
  params = weights.init(CONFIG, jax.random.key(0))
  abstract = weights.abstract(CONFIG, mesh_lib.make_mesh(2, 2), jnp.float32)
  jax.tree.map(lambda leaf, like: np.testing.assert_equal(leaf.shape, like.shape), params, abstract)
  assert abstract["blocks"]["q"].sharding.spec == P(None, "data", "model", None)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == weights.count(CONFIG)
  assert "unembed" in params
  assert "unembed" not in weights.table(dataclasses.replace(CONFIG, tied=True))


def test_init_depends_on_the_key_and_the_name_of_the_tensor_only():
  params = weights.init(CONFIG, jax.random.key(0))
  tied = weights.init(dataclasses.replace(CONFIG, tied=True), jax.random.key(0))
  np.testing.assert_array_equal(params["blocks"]["q"], tied["blocks"]["q"])
  other = weights.init(CONFIG, jax.random.key(1))
  assert np.abs(other["embed"] - params["embed"]).max() > 0.1
  assert np.abs(params["blocks"]["gate"] - params["blocks"]["up"]).max() > 0.1
  assert np.std(params["blocks"]["q"]) == pytest.approx(32**-0.5, rel=0.05)
  np.testing.assert_array_equal(params["final_norm"], 1)
  np.testing.assert_array_equal(params["blocks"]["q_bias"], 0)
