"""What everything between rollout and loss costs, at a pod's batch size. Compiled, not run."""

import jax
import jax.numpy as jnp

import ares_jax as ops

ROWS, TOKENS, GROUP = 4096, 16384, 8


def shape_and_loss(
  logprob_BT, old_BT, sampler_BT, reference_BT, entropy_BT, mask_BT, correct_B, start_3
):
  mean_BT, whole_BT = ops.window_entropy(entropy_BT, mask_BT, window=4)
  threshold, _ = ops.entropy_threshold(mean_BT, whole_BT)
  flag_BT = ops.hwe_flags(entropy_BT, mask_BT, threshold, window=4)
  cover_BT = ops.hwe_cover(flag_BT, mask_BT, window=4)
  bucket_B, count_B = ops.difficulty(correct_B, group=GROUP), flag_BT.sum(-1)
  stats = ops.bucket_stats(count_B, bucket_B)
  multiplier_3 = ops.hwe_multiplier(*stats, start_3)
  reward_B = ops.entropy_reward(
    correct_B, count_B, bucket_B, start_3[bucket_B], multiplier_3[bucket_B])
  advantage_B = ops.group_advantage(reward_B, group=GROUP, correct_B=correct_B)
  bonus_BT = ops.token_bonus(mean_BT, flag_BT, mask_BT, threshold, multiplier_3[bucket_B])
  kl_weight_BT = ops.kl_weight(bucket_B, cover_BT, beta_3=start_3, rho=0.5)
  weight_BT = ops.importance_weight(old_BT, sampler_BT, mask_BT, cap=2.0)

  def loss(logprob_BT):
    kl_BT = ops.token_kl(logprob_BT, reference_BT)
    policy, metrics = ops.policy_loss(
      logprob_BT, old_BT, advantage_B[:, None] + bonus_BT, mask_BT, clip_low=0.2, clip_high=0.3,
      clip_dual=3.0, weight_BT=weight_BT)
    kl_3, tokens_3 = ops.control_kl(kl_BT, mask_BT, cover_BT, bucket_B)
    kappa_3 = ops.track_kl_coefficient(
      start_3, kl_3, tokens_3, target_3=start_3, rate=0.1, low=0.1, high=10.0)
    return policy + ops.average_loss(kl_weight_BT * kl_BT, mask_BT), (metrics, kappa_3)

  return jax.grad(loss, has_aux=True)(logprob_BT), ops.track_target(start_3, *stats[::2], decay=0.9)


def test_shaping_costs_nothing_next_to_the_update():
  row, token = (ROWS,), (ROWS, TOKENS)
  arguments = [jax.ShapeDtypeStruct(token, jnp.float32)] * 5
  arguments += [jax.ShapeDtypeStruct(token, bool), jax.ShapeDtypeStruct(row, jnp.float32)]
  arguments += [jax.ShapeDtypeStruct((3,), jnp.float32)]
  compiled = jax.jit(shape_and_loss).lower(*arguments).compile()
  cost = compiled.cost_analysis()
  # What that leaves out: a sort, log2(T) (log2(T) + 1) / 2 comparisons a token, and exponentials
  # and logarithms (3 a token), taken as 20 each.
  flops = (cost["flops"] + 20 * cost["transcendentals"]) / (ROWS * TOKENS) + 14 * 15 / 2
  assert flops < 0.01 * update_flops()
  # 389 with jax 0.10.2, 2e-8 of the update: growth shows here long before it matters there.
  assert flops < 1000
  # No token waits for the one before: nothing scans over T.
  assert " while(" not in compiled.as_text()


def update_flops():
  """A token's share of one update of Qwen2.5-VL-3B, the smallest: its matrix products alone."""
  layers, embed, keys_values, mlp, vocab = 36, 2048, 2 * 256, 11008, 151936
  weights = layers * embed * (2 * embed + keys_values + 3 * mlp) + vocab * embed
  # 2 a weight forward, 4 for the gradients, 2 for the reference policy.
  return 8 * weights
