import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import golden_batch

from ares_jax import mesh as mesh_lib
from ares_jax.models import weights
from ares_jax.models.config import ModelConfig, VisionConfig

CONFIG = golden_batch.config("untied")


def published(embed, layers, heads, kv_heads, mlp, vocab, tied):
  vision = VisionConfig(depth=32, hidden=1280, heads=16, mlp=3420, patch=14, temporal_patch=2,
                        merge=2, window=112, full_attention=(7, 15, 23, 31), out=embed)
  return ModelConfig(vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads,
                     head_dim=128, mlp=mlp, rope_theta=1e6, mrope_sections=(16, 24, 24),
                     norm_eps=1e-6, tied=tied, vision=vision, image_token=151655,
                     compute_dtype="bfloat16", remat="block", unroll=1)


SIZE_3B = published(2048, 36, 16, 2, 11008, 151936, True)
SIZE_7B = published(3584, 28, 28, 4, 18944, 152064, False)


def test_counts_of_3b_and_7b_are_the_published_ones():
  assert weights.count(SIZE_3B) == 3_754_622_976
  assert weights.count(SIZE_7B) == 8_292_166_656


@pytest.mark.parametrize("config", [SIZE_3B, SIZE_7B], ids=["3b", "7b"])
@pytest.mark.parametrize("data, model", [(256, 1), (64, 4), (8, 2)])
def test_published_sizes_divide_over_wide_meshes(config, data, model):
  mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
  shards = weights.shardings(config, mesh)
  held = sum(int(np.prod(sharding.shard_shape(leaf.shape))) for leaf, sharding in
             zip(jax.tree.leaves(weights.abstract(config, None, jnp.float32)),
                 jax.tree.leaves(shards), strict=True))
  # What is not split over every device is biases, norms, K, V and the vision MLP.
  assert held < 1.35 * weights.count(config) / (data * model) + 2e6


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
