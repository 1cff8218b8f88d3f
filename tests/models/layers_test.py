import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.models import layers

RNG = np.random.default_rng(0)


def test_rms_norm_by_hand():
  # mean square of (3, 4) is 12.5.
  got = layers.rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), 0.0)
  np.testing.assert_allclose(got, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


def test_rms_norm_keeps_the_dtype_and_computes_in_float32():
  got = layers.rms_norm(jnp.full((1, 4), 1e18, jnp.bfloat16), jnp.ones(4), 1e-6)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, 1)


def test_rotation_by_a_quarter_turn_swaps_the_halves():
  x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])  # [1, 1 head, 4]
  turn = layers.rotary(jnp.array([[np.pi / 2, 0.0]]))
  np.testing.assert_allclose(layers.rotate(x, turn), [[[-3, 2, 1, 4]]], atol=1e-6)


def test_rotation_leaves_scores_a_function_of_the_distance():
  q, k = RNG.normal(size=(2, 1, 1, 8)).astype(np.float32)
  frequency = np.float32([1, 0.5, 0.1, 0.01])

  def score(i, j):
    at = [layers.rotate(x, layers.rotary(position * frequency[None]))
          for x, position in ((q, i), (k, j))]
    return float(jnp.sum(at[0] * at[1]))

  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)


def naive(q, k, v, segment, causal):
  """One row at a time, one query at a time."""
  out = np.zeros(q.shape, np.float64)
  for b, t, n in np.ndindex(*q.shape[:3]):
    kv = n // (q.shape[2] // k.shape[2])
    keys = [s for s in range(k.shape[1])
            if segment[b, s] == segment[b, t] and (s <= t or not causal)]
    score = np.array([q[b, t, n] @ k[b, s, kv] for s in keys]) / q.shape[3]**0.5
    weight = np.exp(score - score.max())
    out[b, t, n] = weight @ v[b, keys, kv] / weight.sum()
  return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, heads, kv_heads", [(1, 2, 2), (3, 4, 2), (7, 3, 1)])
def test_attention_equals_one_query_at_a_time(causal, length, heads, kv_heads):
  q = RNG.normal(size=(2, length, heads, 4)).astype(np.float32)
  k, v = RNG.normal(size=(2, 2, length, kv_heads, 4)).astype(np.float32)
  segment = np.sort(RNG.integers(1, 3, (2, length))).astype(np.int32)
  got = layers.attention(q, k, v, segment_BT=segment, segment_BS=segment, causal=causal)
  np.testing.assert_allclose(got, naive(q, k, v, segment, causal), atol=1e-5)


def test_a_changed_value_reaches_later_tokens_of_its_own_segment_only():
  q, k, v = RNG.normal(size=(3, 1, 9, 2, 4)).astype(np.float32)
  segment = np.int32([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  changed = v.copy()
  changed[0, 4] += 1
  first, second = (np.asarray(layers.attention(
    q, k, x, segment_BT=segment, segment_BS=segment, causal=True)) for x in (v, changed))
  np.testing.assert_array_equal(np.any(first != second, axis=(0, 2, 3)),
                                [0, 0, 0, 0, 1, 1, 1, 0, 0])


def test_padding_yields_finite_gradients():
  q, k, v = RNG.normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
  segment = np.int32([[1, 1, 0, 0, 0, 0]])
  keys = np.int32([[1, 1, 2, 2, 2, 2]])  # the padding queries see no key at all

  def total(q, k, v):
    return layers.attention(q, k, v, segment_BT=segment, segment_BS=keys, causal=True).sum()

  assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v))


def test_swiglu_by_hand():
  weights = {"gate": jnp.array([[1.0]]), "up": jnp.array([[2.0]]), "down": jnp.array([[3.0]]),
             "gate_bias": jnp.array([0.0]), "up_bias": jnp.array([1.0]),
             "down_bias": jnp.array([0.5])}
  # silu(1) = 1 / (1 + e^-1); up: 2 + 1.
  got = layers.swiglu(jnp.array([[1.0]]), weights)
  np.testing.assert_allclose(got, [[9 / (1 + np.exp(-1)) + 0.5]], rtol=1e-6)
  del weights["gate_bias"], weights["up_bias"], weights["down_bias"]
  np.testing.assert_allclose(layers.swiglu(jnp.array([[1.0]]), weights),
                             [[6 / (1 + np.exp(-1))]], rtol=1e-6)
