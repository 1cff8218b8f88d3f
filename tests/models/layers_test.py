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
