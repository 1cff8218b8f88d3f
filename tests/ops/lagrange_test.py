import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import bucket_stats, entropy_reward, hwe_multiplier, track_target

COUNT = hnp.arrays(np.int32, 12, elements=st.integers(0, 300))
BUCKET = hnp.arrays(np.int32, 12, elements=st.integers(0, 2))
few = settings(max_examples=25, deadline=None)


def three(*values):
  return np.float32(values)


def test_stats_of_three_buckets_by_hand():
  count_B, bucket_B = np.int32([1, 3, 5, 10, 7, 9]), np.int32([0, 0, 0, 1, 2, 2])
  mean_3, var_3, size_3 = bucket_stats(count_B, bucket_B)
  np.testing.assert_allclose(mean_3, [3, 10, 8])
  np.testing.assert_allclose(var_3, [8 / 3, 0, 1], rtol=1e-6)
  np.testing.assert_array_equal(size_3, [3, 1, 2])


def test_empty_buckets_are_zero_and_padding_rows_do_not_count():
  mean_3, var_3, size_3 = bucket_stats(np.float32([4, 6, 1000]), np.int32([1, 1, -1]))
  np.testing.assert_array_equal([mean_3, var_3, size_3], [[0, 5, 0], [0, 1, 0], [0, 2, 0]])
  for statistic_3 in bucket_stats(np.zeros(0, np.float32), np.zeros(0, np.int32)):
    np.testing.assert_array_equal(statistic_3, [0, 0, 0])


def test_variance_of_large_counts_does_not_cancel():
  # E[x^2] - E[x]^2 of counts near 10000 is off by units in float32.
  _, var_3, _ = bucket_stats(np.float32([10000, 10001, 10002]), np.zeros(3, np.int32))
  np.testing.assert_allclose(var_3[0], 2 / 3, rtol=1e-6)


@few
@given(COUNT, BUCKET, st.permutations(range(12)))
def test_stats_match_numpy_and_ignore_the_order(count_B, bucket_B, order):
  mean_3, var_3, size_3 = bucket_stats(count_B, bucket_B)
  for bucket in range(3):
    members = np.float64(count_B[bucket_B == bucket])
    assert size_3[bucket] == len(members)
    if len(members):
      np.testing.assert_allclose(mean_3[bucket], members.mean(), rtol=1e-5)
      np.testing.assert_allclose(var_3[bucket], members.var(), rtol=1e-4, atol=1e-4)
  again = bucket_stats(count_B[np.array(order)], bucket_B[np.array(order)])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), again,
               (mean_3, var_3, size_3))


def test_signed_multiplier_grows_where_the_bucket_violates_its_constraint():
  mean_3, var_3, size_3 = three(6, 6, 6), three(4, 4, 4), three(8, 8, 8)
  for target, expected_3 in ((4, [0.5, 0.5, 0]), (8, [0, 0.5, 0.5]), (6, [0, 0, 0])):
    multiplier_3 = hwe_multiplier(mean_3, var_3, size_3, three(target, target, target))
    np.testing.assert_allclose(multiplier_3, expected_3, rtol=1e-5)


def test_literal_multiplier_has_one_sign():
  mean_3, var_3, size_3 = three(6, 6, 6), three(4, 4, 4), three(8, 8, 8)
  for target, expected in ((4, 0.5), (8, 0)):
    multiplier_3 = hwe_multiplier(
      mean_3, var_3, size_3, three(target, target, target), rule="literal"
    )
    np.testing.assert_allclose(multiplier_3, [expected] * 3, rtol=1e-5)


@few
@given(COUNT, BUCKET, st.lists(st.booleans(), min_size=12, max_size=12))
def test_literal_rule_with_the_same_batchs_mean_is_dead(count_B, bucket_B, correct):
  correct_B = np.float32(correct)
  mean_3, var_3, size_3 = bucket_stats(count_B, bucket_B)
  multiplier_3 = hwe_multiplier(mean_3, var_3, size_3, mean_3, rule="literal", var_floor=0.0)
  np.testing.assert_array_equal(multiplier_3, [0, 0, 0])
  reward_B = entropy_reward(
    correct_B, count_B, bucket_B, mean_3[bucket_B], multiplier_3[bucket_B], cap=np.inf
  )
  np.testing.assert_array_equal(reward_B, correct_B)


def test_signed_rule_with_targets_of_earlier_batches_is_alive():
  rng, target_3, coefficient_3 = np.random.default_rng(0), three(*[np.nan] * 3), three(0.8, 1, 1.2)
  alive = np.zeros(3)
  for batch in range(20):
    bucket_B = np.int32(np.arange(60) % 3)
    stats = bucket_stats(np.float32(rng.poisson(10, 60)), bucket_B)
    multiplier_3 = hwe_multiplier(*stats, coefficient_3 * target_3)
    if batch == 0:
      np.testing.assert_array_equal(multiplier_3, [0, 0, 0])
    alive += np.asarray(multiplier_3) > 0
    target_3 = track_target(target_3, stats[0], stats[2], decay=0.9)
  # Easy is pushed down and hard up nearly always, medium whenever the batch is not the average.
  assert np.all(alive >= 17)
  np.testing.assert_allclose(target_3, [10, 10, 10], atol=0.5)


def test_variance_floor_and_degenerate_buckets_give_finite_multipliers():
  mean_3, var_3 = three(7, 7, 0), three(0, 0, 0)
  size_3, target_3 = three(8, 1, 0), three(5, 5, 5)
  np.testing.assert_allclose(
    hwe_multiplier(mean_3, var_3, size_3, target_3), [2, 2, 0], rtol=1e-5
  )
  paper_3 = hwe_multiplier(mean_3, var_3, size_3, target_3, var_floor=0.0)
  np.testing.assert_allclose(paper_3, [2e6, 2e6, 0], rtol=1e-5)


def test_target_is_a_moving_average_that_the_first_batch_seeds():
  target_3 = three(np.nan, np.nan, np.nan)
  target_3 = track_target(target_3, three(10, 20, 0), three(4, 4, 0), decay=0.9)
  np.testing.assert_allclose(target_3, [10, 20, np.nan])
  target_3 = track_target(target_3, three(20, 0, 6), three(4, 0, 1), decay=0.9)
  np.testing.assert_allclose(target_3, [11, 20, 6], rtol=1e-6)
  target_3 = track_target(target_3, three(np.nan, np.inf, 6), three(4, 4, 4), decay=0.9)
  np.testing.assert_allclose(target_3, [11, 20, 6], rtol=1e-6)


def test_target_may_be_a_scalar_such_as_the_threshold():
  assert track_target(np.float32(np.nan), np.float32(2), np.int32(5), decay=0.9) == 2
  np.testing.assert_allclose(
    track_target(np.float32(1), np.float32(2), np.int32(5), decay=0.75), 1.25
  )
  assert track_target(np.float32(1), np.float32(2), np.int32(0), decay=0.75) == 1


def test_sharded_over_4_devices_equals_unsharded_and_bfloat16_equals_float32(mesh):
  rng = np.random.default_rng(0)
  count_B, bucket_B = np.float32(rng.integers(0, 99, 16)), np.int32(rng.integers(-1, 3, 16))
  expected = bucket_stats(count_B, bucket_B)
  sharded = bucket_stats(
    *(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (count_B, bucket_B))
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), sharded, expected)
  narrow = bucket_stats(jnp.asarray(count_B, jnp.bfloat16), bucket_B)
  for value_3, expected_3 in zip(narrow, expected, strict=True):
    assert value_3.dtype == jnp.float32
    np.testing.assert_array_equal(value_3, expected_3)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: bucket_stats(np.zeros((2, 2)), np.zeros((2, 2), int)), r"count \(2, 2\)"),
    (lambda: bucket_stats(np.zeros(2), np.zeros(2)), "bucket_B has dtype float32; pass int32"),
    (lambda: hwe_multiplier(np.ones(2), *[np.ones(3)] * 3), r"mean_3 has shape \(2,\)"),
    (lambda: hwe_multiplier(*[np.ones(3)] * 4, rule="printed"), "rule = 'printed' must be"),
    (lambda: hwe_multiplier(*[np.ones(3)] * 4, var_floor=-1.0), "var_floor = -1.0 must be >= 0"),
    (lambda: hwe_multiplier(*[np.ones(3)] * 4, eps=0.0), "eps = 0.0 > 0"),
    (lambda: track_target(np.ones(3), np.ones(3), np.ones(2), decay=0.9), r"size \(2,\)"),
    (lambda: track_target(*[np.ones(3)] * 3, decay=1.1), r"decay = 1.1 must be in \[0, 1\]"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
