import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import continuous_reward, entropy_reward, release_reward, track_alpha

EASY, MEDIUM, HARD = 0, 1, 2
few = settings(max_examples=25, deadline=None)


def rows(correct, count, bucket, target, strength):
  numbers = (np.float32([number]) for number in (correct, count, target, strength))
  correct_B, count_B, target_B, strength_B = numbers
  return correct_B, count_B, np.int32([bucket]), target_B, strength_B


@pytest.mark.parametrize(
  "correct,count,bucket,expected",
  [  # target 10, lambda 0.1
    (0, 13, EASY, -0.3),
    (0, 7, EASY, 0.0),
    (0, 13, MEDIUM, -0.3),
    (0, 7, MEDIUM, -0.3),
    (0, 13, HARD, 0.0),
    (0, 7, HARD, -0.3),
    (1, 13, EASY, 1.0),
    (1, 7, MEDIUM, 1.0),
    (1, 7, HARD, 1.0),
    (0, 19, EASY, -0.5),  # capped
    (0, 13, -1, 0.0),  # padding
  ],
)
def test_paper_reward_by_hand(correct, count, bucket, expected):
  reward_B = entropy_reward(*rows(correct, count, bucket, 10, 0.1))
  np.testing.assert_allclose(reward_B, [expected], atol=1e-6)


@pytest.mark.parametrize(
  "correct,count,bucket,expected",
  [(1, 13, EASY, 0.7), (1, 7, EASY, 1.0), (1, 7, MEDIUM, 0.7), (1, 7, HARD, 1.0),
   (0, 7, HARD, -0.3), (1, 13, -1, 1.0)],
)
def test_penalize_all_reaches_correct_easy_and_medium_answers(correct, count, bucket, expected):
  # -1 is no bucket, although it is below 1: it must not be penalised either.
  reward_B = entropy_reward(*rows(correct, count, bucket, 10, 0.1), penalize="all")
  np.testing.assert_allclose(reward_B, [expected], atol=1e-6)


@pytest.mark.parametrize(
  "correct,count,rate,penalize,expected",
  [  # target 10, lambda 0.1
    (0, 13, 1.0, "wrong", -0.3),  # as easy
    (0, 7, 1.0, "wrong", 0.0),
    (0, 7, 0.0, "wrong", -0.3),  # as hard
    (0, 13, 0.0, "wrong", 0.0),
    (0, 13, 0.75, "wrong", -0.15),
    (0, 99, 0.5, "wrong", 0.0),
    (0, 30, 0.75, "wrong", -0.5),  # capped
    (1, 13, 0.75, "wrong", 1.0),
    (1, 13, 0.75, "all", 0.85),
    (1, 7, 0.25, "all", 1.0),  # a hard prompt's right answer
  ],
)
def test_continuous_reward_by_hand(correct, count, rate, penalize, expected):
  numbers = (np.float32([number]) for number in (correct, count, rate, 10, 0.1))
  np.testing.assert_allclose(continuous_reward(*numbers, penalize=penalize), [expected], atol=1e-6)


def test_without_cap_the_penalty_is_the_papers():
  reward_B = entropy_reward(*rows(0, 30, EASY, 10, 0.1), cap=math.inf)
  np.testing.assert_allclose(reward_B, [-2.0], rtol=1e-6)


def test_no_target_yet_means_no_penalty():
  for penalize in ("wrong", "all"):
    arguments = rows(0, 30, EASY, np.nan, 0.1)
    np.testing.assert_array_equal(entropy_reward(*arguments, penalize=penalize), [0])
  reward_B, score_B = release_reward(*rows(1, 30, EASY, np.nan, 0.5))
  np.testing.assert_array_equal([reward_B, score_B], [[1], [0]])


@pytest.mark.parametrize(
  "correct,count,bucket,target,alpha,score",
  [
    (1, 20, EASY, 28, 0.5, 0.0),
    (1, 51, EASY, 28, 0.5, -0.5),
    (0, 84, MEDIUM, 55, 0.475, 0.38),
    (0, 24, MEDIUM, 55, 0.475, 0.19),
  ],
)
def test_case_study_of_appendix_m(correct, count, bucket, target, alpha, score):
  _, score_B = release_reward(*rows(correct, count, bucket, target, alpha))
  # The paper prints two decimals.
  np.testing.assert_allclose(score_B, [score], atol=5e-3)


def test_release_reward_matches_the_release(release):
  cases = release["release_entropy_reward"]
  column = lambda name: np.float32([case[name] for case in cases])  # noqa: E731
  bucket_B = np.int32([["easy", "medium", "hard"].index(case["difficulty"]) for case in cases])
  reward_B, score_B = release_reward(
    column("accuracy"), column("n_he"), bucket_B, column("n_target"), column("alpha")
  )
  assert len(set(zip(bucket_B.tolist(), column("accuracy").tolist(), strict=True))) == 6
  np.testing.assert_allclose(score_B, column("entropy_score"), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(reward_B, column("overall"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [0, 2])
def test_release_margin_is_at_least_one_token(target):
  # One token beyond the margin of 1: huber 1 / 4, over margin + kappa = 3, times cap 0.6.
  _, score_B = release_reward(*rows(1, target + 2, EASY, target, 0.6))
  np.testing.assert_allclose(score_B, [-0.05], rtol=1e-5)


def test_release_reward_of_a_padding_row_is_its_accuracy():
  reward_B, score_B = release_reward(*rows(1, 99, -1, 10, 0.5))
  assert reward_B == 1 and score_B == 0


def test_alpha_rises_with_excess_and_the_opposite_for_hard():
  alpha_3 = np.full(3, 0.5, np.float32)
  mean_3, target_3 = np.float32([12, 12, 12]), np.float32([10, 10, 10])
  moved_3 = track_alpha(alpha_3, mean_3, np.float32([8, 8, 8]), target_3)
  np.testing.assert_allclose(moved_3, [0.6, 0.6, 0.4], rtol=1e-6)
  far_3 = track_alpha(alpha_3, 100 * mean_3, np.float32([8, 8, 8]), target_3)
  np.testing.assert_array_equal(far_3, [2, 2, 0])
  same_3 = track_alpha(
    alpha_3, mean_3, np.float32([0, 8, 0]), np.float32([10, np.nan, 10])
  )
  np.testing.assert_array_equal(same_3, alpha_3)


ROWS = hnp.arrays(np.int32, (5, 12), elements=st.integers(0, 100))


def batch(integers, dtype=np.float32):
  correct_B, count_B, bucket_B, target_B, strength_B = integers
  return (
    jnp.asarray(correct_B % 2, dtype), jnp.asarray(count_B, dtype), np.int32(bucket_B % 3),
    jnp.asarray(target_B, dtype), jnp.asarray(strength_B / 128, dtype),
  )


@jax.jit
def both(*arguments):
  return (
    entropy_reward(*arguments), entropy_reward(*arguments, penalize="all"),
    *release_reward(*arguments),
  )


@few
@given(ROWS, st.permutations(range(12)))
def test_rows_are_independent_and_paper_rewards_bounded(integers, order):
  arguments, order = batch(integers), np.array(order)
  results = both(*arguments)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y[order]),
    both(*(x[order] for x in arguments)), results,
  )
  padded = both(*(np.pad(x, (0, 4)) for x in arguments))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:12], y), padded, results)
  reward_B, correct_B = np.asarray(results[0]), np.asarray(arguments[0])
  assert np.all(reward_B <= correct_B) and np.all(reward_B >= correct_B - 0.5)
  assert np.all(np.isfinite(results[2]))


def test_sharded_over_4_devices_equals_unsharded_and_bfloat16_equals_float32(mesh):
  integers = np.random.default_rng(0).integers(0, 100, (5, 16))
  results = both(*batch(integers))
  sharded = both(*(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch(integers)))
  assert all(x.sharding.spec[0] == "data" for x in sharded)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), sharded, results)
  # Integers below 128 and 1/128ths are exact in bfloat16.
  for narrow, wide in zip(both(*batch(integers, jnp.bfloat16)), results, strict=True):
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: entropy_reward(*rows(0, 1, 0, 1, 1), cap=-1.0), "cap = -1.0 must be >= 0"),
    (lambda: entropy_reward(*rows(0, 1, 0, 1, 1), penalize="no"), "penalize = 'no' must be"),
    (lambda: entropy_reward(*rows(0, 1, 0, 1, 1)[:4], np.ones(3)), r"\(3,\)\] must all be"),
    (lambda: continuous_reward(*[np.ones(2)] * 4, np.ones(3)), r"\(3,\)\] must all be"),
    (lambda: release_reward(*[np.ones(2)] * 5), "bucket_B has dtype float32; pass int32"),
    (lambda: track_alpha(*[np.ones(3)] * 3, np.ones(2)), r"target_3 has shape \(2,\)"),
    (lambda: track_alpha(*[np.ones(3)] * 4, rate=0.0), "rate = 0.0 must be > 0"),
    (lambda: track_alpha(*[np.ones(3)] * 4, low=3.0), "low = 3.0 <= high = 2.0"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
