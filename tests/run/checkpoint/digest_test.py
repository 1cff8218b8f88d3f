import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ares_jax.run.checkpoint import digest
from ares_jax.system import mesh

RNG = np.random.default_rng(0)
ARRAYS = {
  "float32": RNG.normal(size=(8, 4, 3)).astype(np.float32),
  "bfloat16": RNG.normal(size=(4, 5)).astype(jnp.bfloat16),
  "int8": RNG.integers(-128, 128, (4, 7), np.int8),
  "bool": RNG.random((8, 2)) < 0.5,
  "scalar": np.int32(-7),
  "empty": np.zeros((0, 3), np.float32),
  "nan": np.float32([np.nan, -np.nan, np.inf, -0.0]),
}


def test_a_digest_depends_on_the_index_of_a_word():
  # mix(0) = 0; one word 0 at index 0 gives (0, mix(1)); MurmurHash3's finaliser of 1 is 514e28b7.
  assert digest.digest_numpy(np.uint32([0])) == "00000000514e28b7"
  assert digest.digest_numpy(np.uint32([1])) == "514e28b7" + digest.digest_numpy(np.uint32([1]))[8:]
  assert digest.digest_numpy(np.uint32([1, 2])) != digest.digest_numpy(np.uint32([2, 1]))
  assert digest.digest_numpy(np.float32([0.0])) != digest.digest_numpy(np.float32([-0.0]))


@pytest.mark.parametrize("data, model", [(1, 1), (4, 1), (2, 2)])
def test_host_and_every_sharding_agree(data, model):
  devices = mesh.make_mesh(data, model, devices=jax.devices()[:data * model])
  with jax.set_mesh(devices):
    for array in ARRAYS.values():
      spec = ["data", "model"][:array.ndim] if array.size > 20 and array.shape[0] % 4 == 0 else []
      if len(spec) == 2 and array.shape[1] % 2:
        spec = spec[:1]
      leaf = jax.device_put(array, jax.NamedSharding(devices, PartitionSpec(*spec)))
      assert digest.digest_tree({"x": leaf}) == {"x": digest.digest_numpy(array)}


def test_every_single_bit_and_pairs_of_signs_are_noticed():
  array = RNG.normal(size=257).astype(np.float32)
  seen, negations = {digest.digest_numpy(array)}, []
  for index in range(257):
    for bit in range(32):
      words = array.copy().view(np.uint32)
      words[index] ^= np.uint32(1) << np.uint32(bit)
      seen.add(digest.digest_numpy(words))
  assert len(seen) == 1 + 257 * 32
  # Two flipped signs cancel in a sum of words times odd numbers; not here.
  for index in range(1, 257):
    negated = array.copy()
    negated[[0, index]] *= -1
    negations.append(digest.digest_numpy(negated))
  assert seen.isdisjoint(negations) and len(set(negations)) == 256


def test_blocks_of_a_large_array_join():
  array = np.arange(3 * digest._BLOCK + 5, dtype=np.float32)
  assert digest.digest_tree({"x": jnp.asarray(array)}) == {"x": digest.digest_numpy(array)}


def test_leaves_of_a_tree_are_named():
  one, two = ARRAYS["float32"], jnp.asarray(ARRAYS["int8"])
  assert digest.digest_tree({"a": {"q": one}, "b": two}) == digest.digest_tree({"a/q": one,
                                                                                  "b": two})


def test_an_odd_size_is_refused():
  with pytest.raises(ValueError, match="16 bytes per element"):
    digest.digest_numpy(np.zeros(2, np.complex128))
