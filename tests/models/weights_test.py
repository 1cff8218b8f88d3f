import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import golden_batch

from ares_jax.models import weights
from ares_jax.models.config import SIZE_3B, SIZE_7B
from ares_jax.system import mesh as mesh_lib

CONFIG = golden_batch.config("untied")


def test_counts_of_3b_and_7b_are_the_published_ones():
  assert weights.count(SIZE_3B) == 3_754_622_976
  assert weights.count(SIZE_7B) == 8_292_166_656


@pytest.mark.parametrize("config", [SIZE_3B, SIZE_7B], ids=["3b", "7b"])
@pytest.mark.parametrize("data, model", [(256, 1), (64, 1), (64, 4), (16, 4), (8, 2)])
def test_published_sizes_divide_over_wide_meshes(config, data, model):
  mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
  shards = weights.shardings(weights.weight_table(config), mesh)
  held = sum(int(np.prod(sharding.shard_shape(leaf.shape))) for leaf, sharding in
             zip(jax.tree.leaves(weights.weight_table(config)),
                 jax.tree.leaves(shards), strict=True))
  # What is not split over every device is biases, norms, K, V and the vision MLP.
  assert held < 1.35 * weights.count(config) / (data * model) + 2e6


def test_8_devices_split_the_heads_of_3b_and_the_width_of_7b():
  mesh = jax.sharding.AbstractMesh((8, 8), ("data", "model"))
  blocks = weights.shardings(weights.weight_table(SIZE_3B), mesh)["blocks"]
  assert blocks["q"].shard_shape((36, 2048, 16, 128)) == (36, 256, 2, 128)
  # 28 heads over 8: "model" joins "data", and the MLP stays split over it.
  blocks = weights.shardings(weights.weight_table(SIZE_7B), mesh)["blocks"]
  assert blocks["q"].spec == P(None, ("data", "model"), None, None)
  assert blocks["q"].shard_shape((28, 3584, 28, 128)) == (28, 56, 28, 128)
  assert blocks["o"].shard_shape((28, 28, 128, 3584)) == (28, 28, 128, 56)
  assert blocks["q_bias"].spec == P(None, None, None)
  assert blocks["gate"].spec == P(None, "data", "model")
  # And the 16 heads of the vision tower over 32.
  wide = jax.sharding.AbstractMesh((8, 32), ("data", "model"))
  tower = weights.shardings(weights.weight_table(SIZE_3B), wide)["vision"]["blocks"]
  assert tower["qkv"].shard_shape((32, 1280, 3, 16, 80)) == (32, 5, 3, 16, 80)


@pytest.mark.parametrize("config", [SIZE_3B, SIZE_7B], ids=["3b", "7b"])
@pytest.mark.parametrize("data, model", [(8, 8), (16, 16), (8, 32)])
def test_published_sizes_divide_where_heads_do_not(config, data, model):
  mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
  weights.shardings(weights.weight_table(config), mesh)


def test_kv_heads_and_the_vision_mlp_are_not_split_over_the_model_axis():
  mesh = jax.sharding.AbstractMesh((16, 4), ("data", "model"))
  for config in (SIZE_3B, SIZE_7B):
    shards = weights.shardings(weights.weight_table(config), mesh)
    for block, names in ((shards["blocks"], ("k", "v", "k_bias", "v_bias")),
                         (shards["vision"]["blocks"], ("gate", "up", "down"))):
      assert all("model" not in block[name].spec for name in names)
    heads = shards["vision"]["blocks"]["qkv"].shard_shape((32, 1280, 3, 16, 80))
    assert heads == (32, 80, 3, 4, 80)


def test_a_mesh_that_does_not_divide_is_an_error_naming_the_tensors():
  mesh = jax.sharding.AbstractMesh((3, 1), ("data", "model"))
  with pytest.raises(ValueError, match=r"q \(3, 32, 4, 8\): 32 over data=3.*embed \(128.*change"):
    weights.shardings(weights.weight_table(CONFIG), mesh)
  mesh = jax.sharding.AbstractMesh((3, 3), ("data", "model"))
  with pytest.raises(ValueError, match=r"q \(3, 32, 4, 8\): 32 over data=3 x model=3;"):
    weights.shardings(weights.weight_table(CONFIG), mesh)


def test_abstract_init_and_shardings_have_one_structure():
  params = weights.init(weights.weight_table(CONFIG), jax.random.key(0))
  abstract = weights.abstract(weights.weight_table(CONFIG), mesh_lib.make_mesh(2, 2), jnp.float32)
  jax.tree.map(lambda leaf, like: np.testing.assert_equal(leaf.shape, like.shape), params, abstract)
  assert abstract["blocks"]["q"].sharding.spec == P(None, "data", "model", None)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == weights.count(CONFIG)
  assert "unembed" in params
  assert "unembed" not in weights.weight_table(dataclasses.replace(CONFIG, tied=True))


def test_init_depends_on_the_key_and_the_name_of_the_tensor_only():
  params = weights.init(weights.weight_table(CONFIG), jax.random.key(0))
  tied = weights.init(weights.weight_table(dataclasses.replace(CONFIG, tied=True)),
                      jax.random.key(0))
  np.testing.assert_array_equal(params["blocks"]["q"], tied["blocks"]["q"])
  other = weights.init(weights.weight_table(CONFIG), jax.random.key(1))
  assert np.abs(other["embed"] - params["embed"]).max() > 0.1
  assert np.abs(params["blocks"]["gate"] - params["blocks"]["up"]).max() > 0.1
  assert np.std(params["blocks"]["q"]) == pytest.approx(32**-0.5, rel=0.05)
  np.testing.assert_array_equal(params["final_norm"], 1)
  np.testing.assert_array_equal(params["blocks"]["q_bias"], 0)
