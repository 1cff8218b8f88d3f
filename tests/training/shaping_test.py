import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.grading.scoring import Scores
from ares_jax.training.batch import AnswerScores, RolloutBatch
from ares_jax.training.shaping import (
  Controllers,
  EntropyConfig,
  RewardConfig,
  component_metrics,
  shape_rewards,
  shaped_metrics,
)

ENTROPY = EntropyConfig(window=2, quantile=0.5, quantile_of="window", reduce="mean", decay=0.9,
                        detector="window", cover="window")
REWARD = RewardConfig(kind="aepo", easy=0.75, medium=0.375, rule="signed", target="ema",
                      target_scale=(1.0, 1.0, 1.0), target_decay=0.5, var_floor=1.0, cap=0.5,
                      penalize="wrong", alpha_rate=0.05, token_bonus=0.0)
FRESH = Controllers(threshold=jnp.float32(jnp.nan), hwe_target=jnp.full(3, jnp.nan, jnp.float32),
                    multiplier=jnp.zeros(3), kappa=jnp.ones(3), alpha=jnp.full(3, 0.5, jnp.float32))


def batch(correct, entropy):
  """Rows that are all response."""
  entropy = np.float32(entropy)
  rows, tokens = entropy.shape
  mask = np.ones((rows, tokens), bool)
  return RolloutBatch(
    tokens=np.zeros((rows, tokens), np.int32), response_mask=mask, entropy=entropy,
    correct=np.float32(correct), format_ok=np.ones(rows, np.float32), vision=None, rows=None)


def shaped(correct, entropy, controllers=FRESH, entropy_config=ENTROPY, words=(False,), group=2,
           **reward):
  return shape_rewards(entropy_config, dataclasses.replace(REWARD, **reward), controllers,
                       batch(correct, entropy), np.bool_(words), group=group)


# Group 0 is all wrong (hard), group 1 half right (medium). Window means (w = 2) a row:
# 0: 1 1 1, 1: 1 2 2, 2: 3 3 1, 3: 1 1 1; medians 1, 2, 3, 1; tau = 1.75.
CORRECT = [0, 0, 1, 0]
ROWS = [[1, 1, 1, 1], [1, 1, 3, 1], [3, 3, 3, -1], [1, 1, 1, 1]]


def test_threshold_counts_and_cover_by_hand():
  shaping, controllers, metrics = shaped(CORRECT, ROWS)
  assert controllers.threshold == 1.75
  assert metrics["hwe/share"] == 4 / 16  # windows 1, 2 of row 1 and 0, 1 of row 2
  np.testing.assert_array_equal(shaping.cover.astype(int), [
    [0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(shaping.bucket, [2, 2, 1, 1])


def test_first_batch_seeds_the_targets_and_penalises_nobody():
  shaping, controllers, metrics = shaped(CORRECT, ROWS)
  np.testing.assert_array_equal(controllers.hwe_target, [np.nan, 1, 1])
  np.testing.assert_array_equal(shaping.reward, CORRECT)
  assert metrics["reward/shaping"] == 0


def test_later_batches_penalise_wrong_answers_that_miss_the_target():
  controllers = FRESH.replace(threshold=jnp.float32(1.75), hwe_target=jnp.float32([jnp.nan, 1, 3]))
  # Hard: mean 1, target 3, variance 1: lambda = 2; rows fall short by 3 and 1, penalties capped.
  # Medium: mean = target: lambda 0.
  shaping, after, _ = shaped(CORRECT, ROWS, controllers)
  np.testing.assert_allclose(after.multiplier, [0, 0, 2], rtol=1e-5)
  np.testing.assert_allclose(shaping.reward, [-0.5, -0.5, 1, 0])
  np.testing.assert_allclose(after.hwe_target, [np.nan, 1, 2])
  np.testing.assert_allclose(after.threshold, 1.75, rtol=1e-6)


def test_scores_replace_right_and_wrong_where_a_run_has_them():
  # Accuracies of the groups are 0.4 and 0.8 on average: medium and easy. The answers that count as
  # right (from 0.5 on) lose nothing; the reward is that of the components.
  accuracy, reward = np.float32([0.3, 0.5, 0.7, 0.9]), np.float32([7, 8, 9, 1])
  controllers = FRESH.replace(threshold=jnp.float32(1.75), hwe_target=jnp.float32([0, 3, 1]))
  shaping, _, metrics = shape_rewards(
    ENTROPY, REWARD, controllers, batch([0, 1, 1, 1], ROWS).replace(scores=AnswerScores(
      accuracy, reward)), np.bool_([False]), group=2)
  np.testing.assert_array_equal(shaping.bucket, [1, 1, 0, 0])
  np.testing.assert_allclose(shaping.reward, [6.5, 8, 9, 1])  # 3 below the target: the cap
  np.testing.assert_allclose(metrics["reward/accuracy"], 0.6, rtol=1e-6)
  np.testing.assert_allclose(metrics["reward/shaping"], -0.5 / 4)
  metrics = component_metrics(REWARD, Scores(accuracy, reward, {
    "format": np.float32([1, np.nan, 0, 1])}, np.zeros(4, bool)), group=2)
  np.testing.assert_allclose(metrics["component/format"], 2 / 3, rtol=1e-6)
  np.testing.assert_allclose([metrics[f"component/format/{name}"] for name in
                              ("easy", "medium", "hard")], [0.5, 1, np.nan])


def test_targets_are_scaled_by_bucket():
  controllers = FRESH.replace(hwe_target=jnp.float32([jnp.nan, 1, 1]))
  # Hard: target 2 x 1, mean 1, variance 1: lambda = 1; counts 0 and 2 fall short by 2 and 0.
  shaping, _, metrics = shaped(CORRECT, ROWS, controllers, target_scale=(1.0, 1.0, 2.0))
  np.testing.assert_allclose(shaping.reward, [-0.5, 0, 1, 0])
  assert metrics["hwe/target/hard"] == 2


def test_threshold_follows_past_batches():
  _, after, _ = shaped(CORRECT, ROWS, FRESH.replace(threshold=jnp.float32(2.75)))
  np.testing.assert_allclose(after.threshold, 0.9 * 2.75 + 0.1 * 1.75)


def test_target_of_the_same_batch_is_dead_with_either_rule():
  controllers = FRESH.replace(hwe_target=jnp.float32([5, 5, 5]))
  for rule in ("signed", "literal"):
    shaping, after, _ = shaped(CORRECT, ROWS, controllers, target="batch", rule=rule)
    assert (after.multiplier == 0).all()
    np.testing.assert_array_equal(shaping.reward, CORRECT)


def test_an_empty_bucket_keeps_its_controllers():
  controllers = FRESH.replace(hwe_target=jnp.float32([7, 1, 1]),
                              multiplier=jnp.float32([0.3, 0, 0]))
  _, after, _ = shaped(CORRECT, ROWS, controllers, kind="release")
  assert after.hwe_target[0] == 7 and after.multiplier[0] == np.float32(0.3)
  assert after.alpha[0] == 0.5


def test_reward_kinds():
  controllers = FRESH.replace(hwe_target=jnp.float32([1, 1, 9]))
  plain, after, _ = shaped(CORRECT, ROWS, controllers, kind="accuracy")
  np.testing.assert_array_equal(plain.reward, CORRECT)
  np.testing.assert_array_equal(after.alpha, FRESH.alpha)
  release, after, _ = shaped(CORRECT, ROWS, controllers, kind="release")
  # Hard and wrong, D below the margin: sig(0) cap = 0.5 * 0.5 * 1.2 for both rows.
  np.testing.assert_allclose(release.reward[:2], 0.3, rtol=1e-5)
  # Hard, mean 1 below target 9: alpha grows by 0.05 * 8.
  np.testing.assert_allclose(after.alpha, [0.5, 0.5, 0.9], rtol=1e-5)


def test_the_continuous_reward_has_one_target_and_the_pass_rate_of_each_prompt():
  # Counts 0, 2, 2, 0: mean 1, variance 1; the target 2 of all answers is missed by 1: lambda = 1.
  # Group 0, all wrong: its answers fall short by 2 and 0. Group 1, half right, is not shaped.
  controllers = FRESH.replace(threshold=jnp.float32(1.75), hwe_target=jnp.float32([9, 2, 9]))
  shaping, after, metrics = shaped(CORRECT, ROWS, controllers, kind="continuous", cap=9.0)
  np.testing.assert_allclose(shaping.reward, [-2, 0, 1, 0], rtol=1e-5)
  np.testing.assert_array_equal(shaping.bucket, [2, 2, 1, 1])
  np.testing.assert_allclose(after.hwe_target, [5, 1.5, 5])  # each moves to the mean of all
  assert metrics["bucket/tokens/hard"] == 4
  assert metrics["hwe/target/hard"] == 2 and metrics["hwe/count/easy"] != metrics["hwe/count/hard"]


def test_quantile_of_tokens_is_another_threshold():
  entropy = dataclasses.replace(ENTROPY, quantile_of="token", quantile=1.0)
  _, after, _ = shaped(CORRECT, ROWS, entropy_config=entropy)
  assert after.threshold == (1 + 3 + 3 + 1) / 4


def test_semantic_detector_needs_a_trigger_word():
  entropy = dataclasses.replace(ENTROPY, detector="semantic")
  assert shaped(CORRECT, ROWS, entropy_config=entropy)[2]["hwe/share"] == 0
  assert shaped(CORRECT, ROWS, entropy_config=entropy, words=(True,))[2]["hwe/share"] == 4 / 16


def test_token_cover_and_token_bonus():
  entropy = dataclasses.replace(ENTROPY, cover="token")
  controllers = FRESH.replace(threshold=jnp.float32(1.75), hwe_target=jnp.float32([jnp.nan, 1, 3]))
  shaping, _, _ = shaped(CORRECT, ROWS, controllers, entropy_config=entropy, token_bonus=0.1)
  np.testing.assert_array_equal(shaping.cover[2].astype(int), [1, 1, 0, 0])
  assert shaping.bonus[1].max() > 0 and abs(float(shaping.bonus[1].sum())) < 1e-6
  assert (shaping.bonus[2] == 0).all()  # medium: lambda 0
  assert (shaped(CORRECT, ROWS, controllers)[0].bonus == 0).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_bucket_metrics_are_means_over_the_bucket(rows):
  metrics = shaped(CORRECT * rows, ROWS * rows)[2]
  assert metrics["bucket/share/hard"] == 0.5 and metrics["bucket/share/easy"] == 0
  assert metrics["hwe/count/hard"] == 1 and metrics["bucket/tokens/hard"] == 4
  assert metrics["hwe/share/hard"] == 2 / 8


def test_a_threshold_and_targets_that_keep_the_first_batch():
  entropy = dataclasses.replace(ENTROPY, decay=1.0)
  _, first, _ = shaped(CORRECT, ROWS, entropy_config=entropy, target_decay=1.0)
  lower = [[value / 2 for value in row] for row in ROWS]
  _, later, _ = shaped(CORRECT, lower, first, entropy_config=entropy, target_decay=1.0)
  assert later.threshold == first.threshold == 1.75
  np.testing.assert_array_equal(later.hwe_target, first.hwe_target)


def test_targets_relative_to_all_buckets():
  controllers = FRESH.replace(hwe_target=jnp.float32([jnp.nan, 1, 5]))
  _, _, metrics = shaped(CORRECT, ROWS, controllers, target="all", target_scale=(1.0, 1.0, 2.0))
  assert metrics["hwe/target/medium"] == 3 and metrics["hwe/target/hard"] == 6


def test_windows_are_watched_at_a_threshold_that_stays():
  entropy = dataclasses.replace(ENTROPY, watch=2.5)
  for threshold in (0.5, 9.0):
    metrics = shaped(CORRECT, ROWS, FRESH.replace(threshold=jnp.float32(threshold)),
                     entropy_config=entropy)[2]
    # Windows of mean 2.5 or more: 0 and 1 of row 2, of the medium bucket's two rows.
    assert metrics["hwe/watched/hard"] == 0 and metrics["hwe/watched/medium"] == 1
    assert np.isnan(metrics["hwe/watched/easy"])
  assert "hwe/watched/hard" not in shaped(CORRECT, ROWS)[2]


def test_a_trigger_word_covers_the_window_behind_it():
  entropy = dataclasses.replace(ENTROPY, detector="trigger")
  controllers = FRESH.replace(threshold=jnp.float32(1.75), hwe_target=jnp.float32([9, 9, 9]))
  # Row 1: the words at 0 and 1 stand before windows 1 and 2, of mean 2.
  shaping, _, metrics = shaped(CORRECT, ROWS, controllers, entropy_config=entropy, words=(True,),
                               token_bonus=1.0)
  np.testing.assert_array_equal(shaping.cover[1].astype(int), [0, 1, 1, 1])
  assert metrics["hwe/share"] == 3 / 16  # and the word at 0 of row 2
  bonus_T = np.asarray(shaping.bonus[1])
  assert bonus_T[1] == bonus_T[2] > 0 > bonus_T[0] == bonus_T[3]


def test_the_token_bonus_may_have_the_sign_of_its_bucket():
  # Group 0 all right (easy), group 1 half right (medium), group 2 all wrong (hard).
  correct, rows = [1, 1, 1, 0, 0, 0], [[1, 1, 1, 1], [1, 1, 3, 1]] * 3
  controllers = FRESH.replace(threshold=jnp.float32(1.75), hwe_target=jnp.float32([0, 0, 9]))
  plus, signed = (shaped(correct, rows, controllers, token_bonus=1.0, bonus_sign=sign)[0].bonus
                  for sign in ("plus", "bucket"))
  assert np.abs(plus[1]).max() > 0 and np.abs(plus[3]).max() > 0 and np.abs(plus[5]).max() > 0
  np.testing.assert_array_equal(signed[:2], -plus[:2])
  assert (signed[2:4] == 0).all()
  np.testing.assert_array_equal(signed[4:], plus[4:])


def test_a_placebo_deals_the_penalties_of_a_group_among_its_answers_equally_right():
  rng = np.random.default_rng(0)
  correct, rows = [1, 0, 0, 1, 0, 0, 1, 0] * 4, rng.uniform(0, 4, (32, 6))
  controllers = FRESH.replace(hwe_target=jnp.float32([1, 1, 4]))
  options = dict(penalize="all", cap=9.0, group=8)
  plain, dealt, again = (
    np.asarray(shaped(correct, rows, controllers, placebo=placebo, **options)[0].reward)
    for placebo in (False, True, True))
  assert (plain != dealt).sum() > 8
  for group in range(4):
    for right in (0, 1):
      of = (np.arange(32) // 8 == group) & (np.float32(correct) == right)
      np.testing.assert_array_equal(np.sort(plain[of]), np.sort(dealt[of]))
  np.testing.assert_array_equal(dealt, again)


def test_what_the_entropy_term_changes_in_the_advantages():
  metrics = shaped_metrics(advantage_B=np.float32([1, -1, 0.5, -0.5, 0, 0]),
                           accuracy_B=np.float32([1, -1, 1, -1, 0, 0]),
                           bucket_B=np.int32([0, 0, 1, 1, 2, 2]))
  assert metrics["reward/shaped"] == np.float32(2 / 6) and metrics["reward/shaped_size"] == 1 / 4
  assert metrics["reward/shaped/easy"] == 0 and metrics["reward/shaped/medium"] == 1
  assert metrics["reward/shaped_size/medium"] == 1 / 2
  assert np.isnan(metrics["reward/shaped_size/hard"])  # accuracy gives no advantage there
