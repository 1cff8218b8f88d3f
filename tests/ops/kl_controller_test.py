import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import control_kl, track_kl_coefficient

few = settings(max_examples=15, deadline=None)


def three(*values):
  return np.float32(values)


def batch(seed, rows=6, columns=5):
  rng = np.random.default_rng(seed)
  mask_BT = np.arange(columns)[None] < rng.integers(0, columns + 1, rows)[:, None]
  kl_BT = rng.gamma(1.0, 0.1, (rows, columns)).astype(np.float32)
  bucket_B = np.int32(rng.integers(-1, 3, rows))
  return np.where(mask_BT, kl_BT, np.nan), mask_BT, rng.random((rows, columns)) < 0.3, bucket_B


def track(kappa_3, kl_3, size_3, **kwargs):
  kwargs = dict(target_3=three(0.1, 0.1, 0.1), rate=0.5, low=0.1, high=10.0) | kwargs
  return track_kl_coefficient(kappa_3, kl_3, size_3, **kwargs)


def test_tokens_of_a_packed_row_count_for_their_own_bucket():
  kl_BT, mask_BT = np.float32([[1, 3, 50, 9, 5]]), np.bool_([[1, 1, 1, 0, 1]])
  kl_3, size_3 = control_kl(kl_BT, mask_BT, np.bool_([[0, 0, 1, 0, 0]]),
                            np.int32([[1, 2, 1, 0, 1]]))
  np.testing.assert_allclose(kl_3, [0, 3, 3])
  np.testing.assert_allclose(size_3, [0, 2, 1])


def test_control_kl_counts_tokens_outside_windows_only():
  kl_BT = np.float32([[1, 2, 90, np.nan], [4, 90, 8, 3], [7, 7, 7, 7]])
  mask_BT = np.bool_([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
  cover_BT = np.bool_([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
  kl_3, size_3 = control_kl(kl_BT, mask_BT, cover_BT, np.int32([0, 0, -1]))
  np.testing.assert_allclose(kl_3, [(1 + 2 + 4 + 8 + 3) / 5, 0, 0])
  np.testing.assert_array_equal(size_3, [5, 0, 0])


@few
@given(st.integers(0, 10**6), st.permutations(range(6)))
def test_control_kl_ignores_order_and_padding(seed, order):
  arguments, order = batch(seed), np.array(order)
  expected = control_kl(*arguments)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5)  # noqa: E731
  jax.tree.map(close, control_kl(*(x[order] for x in arguments)), expected)
  padded = [np.pad(x, ((0, 2), (0, 3))) for x in arguments[:3]]
  jax.tree.map(close, control_kl(*padded, np.pad(arguments[3], (0, 2))), expected)
  assert np.all(np.isfinite(expected[0]))


def test_kappa_follows_the_ratio_to_its_target_and_stays_in_bounds():
  kappa_3 = track(three(1, 1, 1), three(0.2, 0.1, 0.05), three(9, 9, 9))
  np.testing.assert_allclose(kappa_3, [1.5, 1, 0.75], rtol=1e-6)
  kappa_3 = track(three(9, 9, 0.11), three(10, 0.1, 0), three(9, 9, 9))
  np.testing.assert_allclose(kappa_3, [10, 9, 0.1], rtol=1e-6)


def test_empty_buckets_and_kl_that_is_not_finite_leave_kappa():
  kappa_3 = track(three(1, 2, 3), three(9, np.nan, np.inf), three(0, 9, 9))
  np.testing.assert_array_equal(kappa_3, [1, 2, 3])


def test_controller_brings_a_kl_that_falls_with_kappa_to_its_target():
  kappa_3, target_3 = three(1, 1, 1), three(0.05, 0.1, 0.2)
  for _ in range(60):
    kappa_3 = track(kappa_3, 0.2 / kappa_3, three(1, 1, 1), target_3=target_3, rate=0.2)
  np.testing.assert_allclose(kappa_3, [4, 2, 1], rtol=1e-3)


def test_sharded_over_4_devices_equals_unsharded_and_bfloat16_gives_float32(mesh):
  kl_BT, *rest = batch(0, rows=8)
  narrow_BT = jnp.asarray(kl_BT, jnp.bfloat16)
  expected = control_kl(narrow_BT.astype(jnp.float32), *rest)
  for arguments in (
    (narrow_BT, *rest),
    [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (narrow_BT, *rest)],
  ):
    for value_3, expected_3 in zip(control_kl(*arguments), expected, strict=True):
      assert value_3.dtype == jnp.float32
      np.testing.assert_allclose(value_3, expected_3, rtol=1e-6)


KL, MASK, BUCKET = np.zeros((2, 3), np.float32), np.zeros((2, 3), bool), np.zeros(2, np.int32)
ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: control_kl(KL, MASK, MASK[:1], BUCKET), r"cover \(1, 3\): pass three"),
    (lambda: control_kl(KL, MASK, MASK, BUCKET[:1]), r"int32\(1,\); pass int32\[B\]"),
    (lambda: control_kl(KL, KL, MASK, BUCKET), "mask is float32"),
    (lambda: track(ONES[:2], ONES, ONES), r"kappa_3 has shape \(2,\)"),
    (lambda: track(ONES, ONES, ONES, rate=1.0), r"rate = 1.0 must be in \(0, 1\)"),
    (lambda: track(ONES, ONES, ONES, low=0.0), "low = 0.0"),
    (lambda: track(ONES, ONES, ONES, low=20.0), "low = 20.0 <= high = 10.0"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
