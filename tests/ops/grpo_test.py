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

from ares_jax import (
  average_loss,
  group_advantage,
  hwe_flags,
  importance_weight,
  policy_loss,
  token_bonus,
  window_entropy,
)

CLIP = dict(clip_low=0.2, clip_high=0.3, clip_dual=3.0)
few = settings(max_examples=25, deadline=None)


def test_advantage_by_hand():
  # Group (0, 1, 2): mean 1, std with ddof = 1 is 1. Group (0, 0, 3): mean 1, std sqrt(3).
  reward_B = np.float32([0, 1, 2, 0, 0, 3])
  root = np.sqrt(3)
  for normalize, expected_B in (
    ("std", [-1, 0, 1, -1 / root, -1 / root, 2 / root]),
    ("none", [-1, 0, 1, -1, -1, 2]),
    ("leave_one_out", [-1.5, 0, 1.5, -1.5, -1.5, 3]),
  ):
    advantage_B = group_advantage(reward_B, group=3, normalize=normalize)
    np.testing.assert_allclose(advantage_B, expected_B, atol=2e-6)


def test_advantage_matches_the_release(release):
  for case in release["grpo_advantage"]:
    advantage_B = group_advantage(
      np.float32(case["scores"]), group=case["group"], eps=case["eps"]
    )
    np.testing.assert_allclose(advantage_B, case["advantages"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["std", "none", "leave_one_out"])
def test_equal_rewards_and_groups_of_one_have_no_advantage(normalize):
  # 0.1, 0.7 and 0.9 are not exact: their float32 mean over 8 is another number.
  reward_B = np.repeat(np.float32([0.1, 0.7, 0.9, -1e6]), 8)
  for group in (8, 1):
    advantage_B = group_advantage(reward_B, group=group, normalize=normalize)
    np.testing.assert_array_equal(advantage_B, np.zeros(32))


def test_groups_of_equal_correctness_are_silenced_on_request():
  reward_B = np.float32([-0.1, 0, 0, 0, 1, 0, -0.1, 0])
  correct_B = np.float32([0, 0, 0, 0, 1, 0, 0, 0])
  plain_B = np.asarray(group_advantage(reward_B, group=4))
  np.testing.assert_allclose(plain_B[:4], [-1.5, 0.5, 0.5, 0.5], rtol=1e-4)
  silent_B = group_advantage(reward_B, group=4, correct_B=correct_B)
  np.testing.assert_array_equal(silent_B[:4], [0, 0, 0, 0])
  np.testing.assert_array_equal(silent_B[4:], plain_B[4:])


@few
@given(hnp.arrays(np.float32, (3, 4), elements=st.integers(-3, 3)), st.permutations(range(3)),
       st.permutations(range(4)), st.sampled_from(["std", "none", "leave_one_out"]))
def test_advantage_of_permuted_shifted_and_padded_prompts(reward_PG, prompts, rollouts, normalize):
  def advantage_PG(reward_PG):
    return np.reshape(
      group_advantage(reward_PG.reshape(-1), group=4, normalize=normalize), (-1, 4)
    )

  expected_PG = advantage_PG(reward_PG)
  np.testing.assert_allclose(expected_PG.sum(1), 0, atol=1e-5)
  np.testing.assert_array_equal(
    advantage_PG(reward_PG[np.array(prompts)]), expected_PG[np.array(prompts)]
  )
  np.testing.assert_allclose(
    advantage_PG(reward_PG[:, np.array(rollouts)]), expected_PG[:, np.array(rollouts)], atol=1e-5
  )
  np.testing.assert_allclose(advantage_PG(reward_PG + 5), expected_PG, atol=1e-5)
  np.testing.assert_array_equal(advantage_PG(np.pad(reward_PG, ((0, 2), (0, 0))))[:3], expected_PG)


@pytest.mark.parametrize("group", [2, 8])
def test_kl_in_the_reward_inflates_the_variance_as_appendix_e_says(group):
  # Var A(R - kK) - Var A(R) = (1 - 1/N) (k^2 Var K - 2 k Cov(R, K)).
  rng, prompts, k = np.random.default_rng(0), 1 << 16, 0.4
  reward, noise = rng.normal(size=(2, prompts * group))
  kl = 0.5 * reward + 1.5 * noise
  variances = [
    np.var(np.asarray(group_advantage(np.float32(x), group=group, normalize="none")))
    for x in (reward - k * kl, reward)
  ]
  # Var K = 0.25 + 2.25, Cov(R, K) = 0.5.
  expected = (1 - 1 / group) * (k**2 * 2.5 - 2 * k * 0.5)
  np.testing.assert_allclose(variances[0] - variances[1], expected, atol=0.01 * (1 - 1 / group))


def test_bonus_by_hand():
  mean_BT = np.float32([[3, 4, 5, 9], [2, 2, 2, 2]])
  flag_BT, mask_BT = np.bool_([[1, 0, 1, 1], [1, 1, 0, 0]]), np.bool_([[1, 1, 1, 0], [1, 1, 0, 0]])
  bonus_BT = token_bonus(mean_BT, flag_BT, mask_BT, np.float32(2), np.float32([0.5, 1]))
  # Row 0: 0.5 * (1, 0, 3) less its mean 2/3. Row 1: nothing is above tau.
  np.testing.assert_allclose(
    bonus_BT, [[0.5 - 2 / 3, -2 / 3, 1.5 - 2 / 3, 0], [0, 0, 0, 0]], atol=1e-6
  )
  rowwise_BT = token_bonus(mean_BT, flag_BT, mask_BT, np.float32([2, 1]), np.float32([0.5, 1]))
  np.testing.assert_array_equal(rowwise_BT[0], bonus_BT[0])
  np.testing.assert_array_equal(rowwise_BT[1], [0, 0, 0, 0])


def test_bonus_sums_to_0_over_every_response():
  rng = np.random.default_rng(0)
  entropy_BT = rng.gamma(1.0, 1.0, (4, 16)).astype(np.float32)
  mask_BT = np.arange(16)[None] < np.array([[0], [3], [9], [16]])
  mean_BT, _ = window_entropy(entropy_BT, mask_BT, window=3)
  flag_BT = hwe_flags(entropy_BT, mask_BT, np.float32(1), window=3)
  bonus_BT = token_bonus(mean_BT, flag_BT, mask_BT, np.float32(1), np.ones(4, np.float32))
  assert np.any(bonus_BT) and not np.any(np.asarray(bonus_BT)[~mask_BT])
  np.testing.assert_allclose(bonus_BT.sum(1), 0, atol=1e-5)


def test_importance_weight_is_truncated_and_has_no_gradient():
  old_BT = np.log(np.float32([[0.5, 0.9, 0.1, 0.5]]))
  sampler_BT = np.log(np.float32([[0.4, 0.1, 0.2, 1]]))
  mask_BT = np.bool_([[1, 1, 1, 0]])
  weight_BT = importance_weight(old_BT, sampler_BT, mask_BT, cap=2.0)
  np.testing.assert_allclose(weight_BT, [[1.25, 2, 0.5, 1]], rtol=1e-6)
  gradient_BT = jax.grad(lambda x: importance_weight(x, sampler_BT, mask_BT, cap=2.0).sum())(old_BT)
  np.testing.assert_array_equal(gradient_BT, [[0, 0, 0, 0]])


def test_loss_of_single_tokens_by_hand():
  cases = [  # ratio, advantage, loss, what is clipped
    (1.0, 2.0, -2.0, None),
    (1.2, 1.0, -1.2, None),
    (2.0, 1.0, -1.3, "clipped_high"),
    (0.5, 1.0, -0.5, None),
    (0.5, -1.0, 0.8, "clipped_low"),
    (2.0, -1.0, 2.0, None),
    (5.0, -1.0, 3.0, "clipped_dual"),
  ]
  for ratio, advantage, expected, clipped in cases:
    logprob_BT, advantage_BT = np.float32([[np.log(ratio)]]), np.float32([[advantage]])
    loss, metrics = policy_loss(logprob_BT, 0 * logprob_BT, advantage_BT, logprob_BT < 9, **CLIP)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose([metrics["ratio"], metrics["ratio_max"]], [ratio] * 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy_kl"], -np.log(ratio), rtol=1e-6)
    for name in ("clipped_low", "clipped_high", "clipped_dual"):
      assert metrics[name] == (name == clipped)


def policy_gradient(ratio_T, advantage_T, **how):
  """(loss, its gradient in the log-probabilities) of a row of tokens with these ratios."""
  logprob_BT, advantage_BT = np.log(np.float32([ratio_T])), np.float32([advantage_T])
  return jax.value_and_grad(lambda now_BT: policy_loss(
    now_BT, 0 * logprob_BT, advantage_BT, np.ones_like(logprob_BT, bool),
    **{"clip_dual": math.inf} | how)[0])(logprob_BT)


def test_gspo_has_one_ratio_for_an_answer_by_hand():
  # Two answers in one packed row: ratios 4 and 1, whose geometric mean is 2, and 1/2. Each answer
  # counts 1, spread over its tokens: -min(2, 1.3) and +max(1/2, 0.8).
  how = dict(ratio="sequence", clip_low=0.2, total=2, segment_BT=np.int32([[1, 1, 2]]),
             weight_BT=np.float32([[0.5, 0.5, 1]]))
  loss, slope_BT = policy_gradient([4, 1, 0.5], [1, 1, -1], clip_high=0.3, **how)
  np.testing.assert_allclose(loss, (-1.3 + 0.8) / 2, rtol=1e-6)
  np.testing.assert_array_equal(slope_BT, [[0, 0, 0]])  # both are clipped, whole
  # Within the bounds every token of an answer has the slope -s A / |o|, s = 2.
  _, slope_BT = policy_gradient([4, 1, 0.5], [1, 1, 1], clip_high=1.5, **how)
  np.testing.assert_allclose(slope_BT, np.float32([[-1, -1, -0.5]]) / 2, rtol=1e-6)


def test_cispo_clips_the_weight_and_cuts_no_gradient_by_hand():
  how = dict(clip="weight", clip_low=1.0, clip_high=4.0, total=1)
  loss, slope_BT = policy_gradient([8, 0.5, 8], [1, 1, -1], **how)
  np.testing.assert_allclose(slope_BT, [[-5, -0.5, 5]], rtol=1e-6)
  np.testing.assert_allclose(loss, -5 * np.log(8) - 0.5 * np.log(0.5) + 5 * np.log(8), rtol=1e-6)


def test_dr_grpo_divides_neither_by_deviation_nor_by_length_by_hand():
  # Two answers of 1 and 3 tokens, at most 4: rewards 1 and 0, advantages 1/2 and -1/2.
  advantage_B = group_advantage(np.float32([1, 0]), group=2, normalize="none")
  mask_BT = np.arange(4) < np.int32([[1], [3]])
  zeros_BT = np.zeros((2, 4), np.float32)
  advantage_BT = jnp.broadcast_to(advantage_B[:, None], (2, 4))
  loss, _ = policy_loss(zeros_BT, zeros_BT, advantage_BT, mask_BT, total=2 * 4, **CLIP)
  np.testing.assert_allclose(loss, -(0.5 * 1 - 0.5 * 3) / (2 * 4))


def test_rloo_is_reinforce_with_the_others_mean_as_the_baseline_by_hand():
  # Rewards 1, 0, 0: baselines 0, 1/2, 1/2. The slope of every token is -advantage / answers.
  advantage_B = group_advantage(np.float32([1, 0, 0]), group=3, normalize="leave_one_out")
  np.testing.assert_allclose(advantage_B, [1, -0.5, -0.5], rtol=1e-6)
  _, slope_BT = policy_gradient([1, 1, 1], advantage_B, clip_low=1.0, clip_high=math.inf, total=3)
  np.testing.assert_allclose(slope_BT, -advantage_B[None] / 3, rtol=1e-6)
  # Nothing is clipped, however far the policy is.
  _, slope_BT = policy_gradient([9, 0.1], [1, -1], clip_low=1.0, clip_high=math.inf, total=1)
  np.testing.assert_allclose(slope_BT, [[-9, 0.1]], rtol=1e-6)


def test_no_dual_clip_and_bounded_log_ratio():
  logprob_BT, mask_BT = np.float32([[100.0]]), np.bool_([[1]])
  loss, _ = policy_loss(
    logprob_BT, 0 * logprob_BT, -mask_BT.astype(np.float32), mask_BT,
    **CLIP | dict(clip_dual=math.inf),
  )
  np.testing.assert_allclose(loss, np.exp(20), rtol=1e-5)


def padded(values, shape=(3, 8)):
  """One shape for all of the release's cases: one program."""
  values = np.float32(values)
  return np.pad(values, [(0, max(0, x - y)) for x, y in zip(shape, values.shape, strict=True)])


def test_policy_loss_and_gradient_match_the_release(release):
  averages = {"token": "token", "seq": "sequence"}
  for case in release["policy_loss_and_kl"]:
    arguments = [padded(case[name]) for name in ("logp", "old_logp", "advantage")]
    kwargs = {name: case[name] for name in CLIP} | dict(average=averages[case["loss_avg"]])
    (loss, _), gradient_BT = jax.value_and_grad(policy_loss, has_aux=True)(
      *arguments, padded(case["mask"]) > 0, **kwargs
    )
    np.testing.assert_allclose(loss, case["policy_loss"], rtol=1e-5, atol=1e-5)
    expected_BT = padded(case["policy_loss_grad"])
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-5, atol=1e-5)


def test_mean_kl_matches_the_release(release):
  averages = {"token": "token", "seq": "sequence"}
  for case in release["policy_loss_and_kl"]:
    kl_BT, mask_BT = padded(case["kl"]["low_var_kl"]), padded(case["mask"]) > 0
    mean = average_loss(kl_BT, mask_BT, average=averages[case["loss_avg"]])
    np.testing.assert_allclose(mean, case["mean_low_var_kl"], rtol=1e-5, atol=1e-5)


def example(seed=0, rows=4, columns=6):
  rng = np.random.default_rng(seed)
  old_BT = np.float32(-rng.gamma(1.0, 1.0, (rows, columns)))
  logprob_BT = np.float32(old_BT + rng.normal(0, 0.4, (rows, columns)))
  advantage_BT = np.float32(np.repeat(rng.normal(size=(rows, 1)), columns, 1))
  mask_BT = np.arange(columns)[None] < rng.integers(0, columns + 1, (rows, 1))
  return logprob_BT, old_BT, advantage_BT, mask_BT


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_gradient_matches_float64_finite_differences(average):
  logprob_BT, old_BT, advantage_BT, mask_BT = example()
  weight_BT = np.random.default_rng(1).uniform(0.5, 2, mask_BT.shape)
  lengths_B = mask_BT.sum(1)
  if average == "token":
    share_BT = mask_BT / mask_BT.sum()
  else:
    share_BT = mask_BT / np.maximum(lengths_B, 1)[:, None] / (lengths_B > 0).sum()

  def reference(logprob_BT):
    ratio_BT = np.exp(logprob_BT - np.float64(old_BT))
    loss_BT = -np.minimum(ratio_BT * advantage_BT, np.clip(ratio_BT, 0.8, 1.3) * advantage_BT)
    loss_BT = np.where(advantage_BT < 0, np.minimum(loss_BT, -3 * advantage_BT), loss_BT)
    return (share_BT * weight_BT * loss_BT).sum()

  gradient_BT = jax.grad(
    lambda x: policy_loss(x, old_BT, advantage_BT, mask_BT, average=average,
                          weight_BT=np.float32(weight_BT), **CLIP)[0]
  )(logprob_BT)
  expected_BT = np.zeros(mask_BT.shape)
  for index in np.ndindex(*mask_BT.shape):
    step = np.zeros(mask_BT.shape)
    step[index] = 1e-6
    expected_BT[index] = (reference(logprob_BT + step) - reference(logprob_BT - step)) / 2e-6
  assert np.count_nonzero(expected_BT) > 5
  np.testing.assert_allclose(gradient_BT, expected_BT, atol=1e-6)


def test_nan_outside_the_response_reaches_neither_loss_nor_gradient():
  *arguments, mask_BT = example()
  clean = jax.value_and_grad(policy_loss, has_aux=True)(*arguments, mask_BT, **CLIP)
  dirty = jax.value_and_grad(policy_loss, has_aux=True)(
    *(np.where(mask_BT, x, np.nan) for x in arguments), mask_BT,
    weight_BT=np.where(mask_BT, np.float32(1), np.nan), **CLIP,
  )
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_an_empty_mask_gives_0_everywhere():
  *arguments, mask_BT = example()
  for average in ("token", "sequence"):
    (loss, metrics), gradient_BT = jax.value_and_grad(policy_loss, has_aux=True)(
      *arguments, np.zeros_like(mask_BT), average=average, **CLIP
    )
    assert loss == 0 and not np.any(gradient_BT) and not any(metrics.values())


@few
@given(st.integers(0, 10**6), st.permutations(range(4)), st.sampled_from(["token", "sequence"]))
def test_order_of_rows_and_padding_change_nothing(seed, order, average):
  arguments, order = example(seed), np.array(order)
  expected = policy_loss(*arguments, average=average, **CLIP)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)  # noqa: E731
  moved = [x[order] for x in arguments]
  jax.tree.map(close, policy_loss(*moved, average=average, **CLIP), expected)
  wider = [np.pad(x, ((0, 2), (0, 3))) for x in arguments]
  jax.tree.map(close, policy_loss(*wider, average=average, **CLIP), expected)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_losses_of_the_parts_of_a_minibatch_add_up_to_its_own(average):
  arguments = example(rows=6)
  mask_BT = arguments[3]
  total = mask_BT.sum() if average == "token" else mask_BT.any(1).sum()
  parts = [
    policy_loss(*(x[rows] for x in arguments), average=average, total=np.float32(total), **CLIP)[0]
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
  ]
  whole, _ = policy_loss(*arguments, average=average, **CLIP)
  np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def test_sharded_over_4_devices_equals_unsharded(mesh):
  arguments = example(rows=8)
  reward_B = np.random.default_rng(2).normal(size=32).astype(np.float32)
  put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))  # noqa: E731
  step = jax.jit(lambda *a: jax.value_and_grad(policy_loss, has_aux=True)(*a, **CLIP))
  sharded, expected = step(*map(put, arguments)), step(*arguments)
  assert sharded[1].sharding.spec[0] == "data"
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), sharded, expected)
  sharded_B = group_advantage(put(reward_B), group=8)
  assert sharded_B.sharding.spec[0] == "data"
  np.testing.assert_allclose(sharded_B, group_advantage(reward_B, group=8), atol=1e-6)


def test_bfloat16_in_gives_float32_out():
  *arguments, mask_BT = example()
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in arguments]
  results = policy_loss(*narrow, mask_BT, **CLIP)
  expected = policy_loss(*(x.astype(jnp.float32) for x in narrow), mask_BT, **CLIP)
  for value, wide in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wide, rtol=1e-6)
  reward_B = jnp.asarray([0.5, 1.5, 2.5, 8.0], jnp.bfloat16)
  advantage_B = group_advantage(reward_B, group=2)
  assert advantage_B.dtype == jnp.float32
  np.testing.assert_array_equal(
    advantage_B, group_advantage(reward_B.astype(jnp.float32), group=2)
  )


ARRAY, MASK = np.zeros((2, 3), np.float32), np.ones((2, 3), bool)


def loss(old_BT, advantage_BT, mask_BT, **change):
  return policy_loss(ARRAY, old_BT, advantage_BT, mask_BT, **CLIP | change)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: group_advantage(np.zeros(12), group=8), "12 rows do not divide into groups of 8"),
    (lambda: group_advantage(np.zeros(12, int), group=4), "reward_B is int32"),
    (lambda: group_advantage(np.zeros(4), group=2, normalize="var"), "normalize = 'var' must be"),
    (lambda: group_advantage(np.zeros(4), group=2, eps=0.0), "eps = 0.0 must be > 0"),
    (lambda: group_advantage(np.zeros(4), group=2, correct_B=np.zeros(2)), r"correct_B \(2,\)"),
    (lambda: loss(ARRAY, ARRAY[:, 0], MASK), r"advantage_BT is float32\(2,\)"),
    (lambda: loss(ARRAY, ARRAY, ARRAY), r"mask_BT is float32.*mask > 0"),
    (lambda: loss(ARRAY, ARRAY, MASK, clip_low=1.2), "clip_low = 1.2"),
    (lambda: loss(ARRAY, ARRAY, MASK, clip_dual=0.5), "clip_dual = 0.5"),
    (lambda: loss(ARRAY, ARRAY, MASK, average="mean"), "average = 'mean'"),
    (lambda: loss(ARRAY, ARRAY, MASK, ratio="answer"), "ratio = 'answer'"),
    (lambda: loss(ARRAY, ARRAY, MASK, clip="advantage"), "clip = 'advantage'"),
    (lambda: average_loss(ARRAY, MASK, total=np.ones(2)), r"total has shape \(2,\)"),
    (lambda: importance_weight(ARRAY, ARRAY, MASK, cap=0.0), "cap = 0.0 must be > 0"),
    (lambda: token_bonus(ARRAY, ARRAY, MASK, 1.0, np.ones(2)), "flag_BT is float32"),
    (lambda: token_bonus(ARRAY, MASK, MASK, 1.0, np.ones(3)), r"multiplier \(3,\).*2 rows"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
