import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import golden_batch

from ares_jax.models import lora, qwen25_vl, weights
from ares_jax.models.config import SIZE_3B
from ares_jax.system import mesh as mesh_lib

CONFIG = golden_batch.config("untied")
LORA = lora.LoraConfig(rank=3, alpha=6.0, targets=tuple(lora.TARGETS))
ROWS, TOKENS = 2, 6


@pytest.fixture(scope="module", autouse=True)
def one_device():
  with jax.set_mesh(mesh_lib.make_mesh(1, 1, devices=jax.devices()[:1])):
    yield


def started(random_b):
  """(base, adapters) in float32; s = 2."""
  rng = np.random.default_rng(0)

  def draw(shape):
    return jnp.asarray(np.float32(shape[-1] ** -0.5 * rng.standard_normal(shape)))

  base = lora.Base(jax.tree.map(lambda weight: draw(weight.shape), weights.weight_table(CONFIG)),
                   LORA.alpha / LORA.rank)
  adapters = lora.init(CONFIG, LORA, jax.random.key(1))
  if random_b:
    adapters = {name: pair | {"b": draw(pair["b"].shape)} for name, pair in adapters.items()}
  return base, adapters


def score(config, params):
  """Log-probabilities of a fixed batch without images."""
  tokens = np.arange(ROWS * TOKENS, dtype=np.int32).reshape(ROWS, TOKENS) + 1
  positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, 3, TOKENS))
  return qwen25_vl.score(config, params, None, tokens=tokens, unit=None, positions=positions,
                         segment=np.ones((ROWS, TOKENS), np.int32))[0]


def test_the_first_policy_is_the_base_bit_for_bit():
  base, adapters = started(random_b=False)
  assert all((np.asarray(pair["b"]) == 0).all() and (np.asarray(pair["a"]) != 0).all()
             for pair in adapters.values())
  # In bfloat16 a compiler may round such sums elsewhere in one of the two programs.
  of = jax.jit(functools.partial(score, CONFIG))
  np.testing.assert_array_equal(of(lora.join(base, adapters)), of(base.weights))


def loss(params):
  """A weighted sum of scores, and the scores."""
  logprob = score(CONFIG, params)
  weight = np.float32(np.random.default_rng(1).standard_normal((ROWS, TOKENS)))
  return (weight * logprob).sum(), logprob


@jax.jit
def of_adapters(base, adapters):
  return jax.value_and_grad(lambda adapters: loss(lora.join(base, adapters)), has_aux=True)(
    adapters)


@pytest.fixture(scope="module")
def gradients():
  """(base, adapters, merged weights, of_adapters, the same of the merged weights, the base's
  scores)."""
  base, adapters = started(random_b=True)
  ours, merged = of_adapters(base, adapters), lora.merge(base, adapters)
  whole = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, of_base), _ = whole(base.weights)
  return base, adapters, merged, ours, whole(merged), of_base


@pytest.mark.slow
def test_merged_weights_are_the_policy_and_differ_from_the_base(gradients):
  base, adapters, merged, ((_, joined), _), ((_, whole), _), of_base = gradients
  q, pair = base.weights["blocks"]["q"], adapters["q"]
  by_hand = q[1] + 2.0 * np.einsum("dr,rnh->dnh", pair["a"][1], pair["b"][1])
  np.testing.assert_allclose(merged["blocks"]["q"][1], by_hand, atol=1e-5)
  np.testing.assert_allclose(joined, whole, atol=2e-5)
  assert np.abs(joined - of_base).max() > 0.01


def test_gradients_are_the_chain_rule_of_the_gradient_of_the_weights(gradients):
  """dA = s dW B^T and dB = s A^T dW, of matrices [inputs, outputs]."""
  _, adapters, _, (_, ours), (_, of_weights), _ = gradients
  assert set(ours) == set(lora.TARGETS)
  for name, pair in adapters.items():
    a = np.float64(pair["a"]).reshape(CONFIG.layers, -1, 3)
    b = np.float64(pair["b"]).reshape(CONFIG.layers, 3, -1)
    full = np.float64(of_weights["blocks"][name]).reshape(CONFIG.layers, a.shape[1], b.shape[2])
    for part, expected in (("a", 2 * np.einsum("lio,lro->lir", full, b)),
                           ("b", 2 * np.einsum("lir,lio->lro", a, full))):
      found = np.asarray(ours[name][part])
      np.testing.assert_allclose(found, expected.reshape(found.shape),
                                 atol=1e-4 * np.abs(expected).max(), err_msg=f"{name} {part}")
      assert np.abs(expected).max() > 0


@pytest.mark.slow
def test_split_over_devices_they_are_the_same(gradients):
  base, adapters, _, ((_, expected), of_one), *_ = gradients
  devices = mesh_lib.make_mesh(2, 2)
  with jax.set_mesh(devices):
    params = jax.device_put(base.weights, weights.shardings(weights.weight_table(CONFIG), devices))
    split = jax.device_put(adapters, weights.shardings(lora.adapter_table(CONFIG, LORA), devices))
    assert not split["gate"]["a"].is_fully_replicated
    (_, logprob), found = of_adapters(base.replace(weights=params), split)
  np.testing.assert_allclose(logprob, expected, atol=2e-5)
  for one, other in zip(jax.tree.leaves(of_one), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_adapters_are_split_over_the_mesh_as_their_matrices_are():
  mesh = jax.sharding.AbstractMesh((16, 4), ("data", "model"))
  section = dataclasses.replace(LORA, rank=16)
  shapes = lora.abstract(SIZE_3B, section, mesh)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  # 36 layers of rank 16: q and o 2048 + 2048, k and v 2048 + 256, MLP 3 x (2048 + 11008).
  assert count == 36 * 16 * (2 * 4096 + 2 * 2304 + 3 * 13056)
  assert shapes["q"]["a"].sharding.shard_shape((36, 2048, 16)) == (36, 128, 16)
  assert shapes["q"]["b"].sharding.shard_shape((36, 16, 16, 128)) == (36, 16, 4, 128)
  assert shapes["o"]["a"].sharding.shard_shape((36, 16, 128, 16)) == (36, 4, 128, 16)
  assert shapes["down"]["b"].sharding.shard_shape((36, 16, 2048)) == (36, 16, 128)
  # 16 heads over 32: A of q and B of o have no heads; the others are not split.
  wide = lora.abstract(SIZE_3B, section, jax.sharding.AbstractMesh((8, 32), ("data", "model")))
  assert [wide[name][part].sharding.spec for name in "qo" for part in "ab"] == [
    P(None, "data", None), P(None, None, None, None), P(None, None, None, None),
    P(None, None, "data")]
  base = jax.eval_shape(
    lambda key: weights.init(weights.weight_table(SIZE_3B), key, jnp.bfloat16), jax.random.key(0))
  joined = lora.attach(base, shapes)
  specs = lora.joined_specs(SIZE_3B, joined)
  assert specs["blocks"]["gate_lora"] == {part: shapes["gate"][part].sharding.spec
                                          for part in ("a", "b")}
  jax.tree.map(lambda leaf, spec: None, joined, specs)  # one a leaf


@pytest.mark.parametrize("fields, message", [
  (dict(rank=-1), "rank = -1"), (dict(alpha=0.0), "alpha = 0.0"), (dict(targets=()), r"= \(\)"),
  (dict(targets=("q", "embed")), "name one or more of q, k, v, o, gate, up, down"),
  (dict(targets=("q", "q")), "each once")])
def test_a_value_that_means_nothing_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LORA, **fields)
