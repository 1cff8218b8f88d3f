"""What everything between rollout and loss costs, at a pod's batch size. Compiled, not run."""

import jax
import jax.numpy as jnp

import ares_jax as ops

ROWS, TOKENS, GROUP = 4096, 16384, 8


def shape_and_loss(logprob_BT, old_BT, reference_BT, entropy_BT, mask_BT, correct_B, start_3):
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
  weight_BT = ops.kl_weight(bucket_B, cover_BT, beta_3=start_3, rho=0.5)

  def loss(logprob_BT):
    kl_BT = ops.token_kl(logprob_BT, reference_BT)
    policy, metrics = ops.policy_loss(
      logprob_BT, old_BT, jnp.broadcast_to(advantage_B[:, None], mask_BT.shape), mask_BT,
      clip_low=0.2, clip_high=0.3, clip_dual=3.0)
    outside = ops.control_kl(kl_BT, mask_BT, cover_BT, bucket_B)
    return policy + ops.average_loss(weight_BT * kl_BT, mask_BT), (metrics, outside)

  return jax.grad(loss, has_aux=True)(logprob_BT), ops.track_target(start_3, *stats[::2], decay=0.9)


def test_shaping_costs_nothing_next_to_the_update():
  row, token = (ROWS,), (ROWS, TOKENS)
  arguments = [jax.ShapeDtypeStruct(token, jnp.float32)] * 4
  arguments += [jax.ShapeDtypeStruct(token, bool), jax.ShapeDtypeStruct(row, jnp.float32)]
  arguments += [jax.ShapeDtypeStruct((3,), jnp.float32)]
  compiled = jax.jit(shape_and_loss).lower(*arguments).compile()
  flops = compiled.cost_analysis()["flops"] / (ROWS * TOKENS)
  # A sort has no FLOPs in that count: allow it log2(T) (log2(T) + 1) / 2 comparisons a token.
  flops += 14 * 15 / 2
  # 308 with jax 0.10.2. The update of a 3B model takes 8 * 3e9 a token: 6 a weight for its
  # gradients and 2 for the reference policy.
  assert flops < 1000
  # No token waits for the one before: nothing scans over T.
  assert " while(" not in compiled.as_text()
