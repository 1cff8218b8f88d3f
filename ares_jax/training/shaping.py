"""From a graded rollout batch to rewards: when to explore and how much (sections 3.2.1, 3.2.2).

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, V vocabulary. Names ending
in _3 hold a value for each difficulty bucket: easy, medium, hard.
"""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from ares_jax import ops
from ares_jax.ops.difficulty import BUCKETS


@dataclasses.dataclass(frozen=True)
class EntropyConfig:
  """When to explore: windows, threshold, high-window-entropy (HWE) tokens (section 3.2.1)."""

  window: int  # tokens
  quantile: float
  quantile_of: Literal["window", "token"]  # token: as printed in 3.2.1
  reduce: Literal["mean", "median"]  # of the sequences' quantiles
  decay: float  # EMA of past batches
  detector: Literal["window", "semantic", "trigger"]
  cover: Literal["window", "token"]  # which tokens of a flagged window get the relaxed KL

  def __post_init__(self):
    if self.window < 1:
      raise ValueError(f"window = {self.window} must be >= 1")
    if not 0 <= self.quantile <= 1 or not 0 <= self.decay < 1:
      raise ValueError(f"quantile = {self.quantile} must be in [0, 1], decay = {self.decay} "
                       "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """How much to explore: difficulty buckets and the hierarchical reward (section 3.2.2)."""

  kind: Literal["accuracy", "aepo", "release"]
  easy: float  # pass rate from which a prompt is easy
  medium: float
  rule: Literal["signed", "literal"]
  target: Literal["ema", "batch"]  # batch: as printed, then the multiplier is identically 0
  target_scale: tuple[float, float, float]  # target over the EMA of the count, by bucket
  target_decay: float
  var_floor: float
  cap: float
  penalize: Literal["wrong", "all"]
  alpha_rate: float  # release reward only
  token_bonus: float  # coefficient of algorithm 1 line 13

  def __post_init__(self):
    if not 0 <= self.medium <= self.easy <= 1:
      raise ValueError(f"medium = {self.medium}, easy = {self.easy}: "
                       "0 <= medium <= easy <= 1 is needed")
    if not 0 <= self.target_decay < 1 or min(self.target_scale) < 0:
      raise ValueError(f"target_decay = {self.target_decay} must be in [0, 1), target_scale = "
                       f"{self.target_scale} >= 0")
    if min(self.var_floor, self.cap) < 0 or self.alpha_rate <= 0:
      raise ValueError(f"var_floor = {self.var_floor} and cap = {self.cap} must be >= 0, "
                       f"alpha_rate = {self.alpha_rate} > 0")


@flax.struct.dataclass
class Controllers:
  """What the reward remembers from one iteration to the next."""

  threshold: jax.Array  # float32 [], tau in nats; NaN before the first batch
  hwe_target: jax.Array  # float32 [3], EMA of HWE counts; NaN before a bucket's first batch
  multiplier: jax.Array  # float32 [3], lambda
  kappa: jax.Array  # float32 [3], KL coefficient
  alpha: jax.Array  # float32 [3], strength of the release's reward; 0.5 with another kind


@flax.struct.dataclass
class Shaping:
  """What the update needs of a rollout batch, besides the sequences."""

  reward: jax.Array  # float32 [B]
  bucket: jax.Array  # int32 [B]
  cover: jax.Array  # bool [B, T], inside HWE windows
  bonus: jax.Array  # float32 [B, T], psi of algorithm 1 line 13; 0 where its coefficient is


def shape_rewards(entropy, reward, controllers, batch, trigger_V, *, group):
  """Windows, threshold, HWE counts, buckets, multipliers, rewards (algorithm 1 lines 5-13).

  Args:
    entropy: EntropyConfig.
    reward: RewardConfig.
    controllers: Controllers of the iterations so far.
    batch: rollout.RolloutBatch.
    trigger_V: bool, tokens of V_sem.
    group: G.

  Returns:
    Shaping, Controllers (kappa unchanged), metrics (float32 scalars).
  """
  entropy_BT, mask_BT, window = batch.entropy, batch.response_mask, entropy.window
  mean_BT, whole_BT = ops.window_entropy(entropy_BT, mask_BT, window=window)
  value = (mean_BT, whole_BT) if entropy.quantile_of == "window" else (entropy_BT, mask_BT)
  batch_threshold, _ = ops.entropy_threshold(
    *value, quantile=entropy.quantile, reduce=entropy.reduce)
  threshold = ops.track_target(controllers.threshold, batch_threshold, value[1].sum(),
                               decay=entropy.decay)
  flag_BT = ops.hwe_flags(entropy_BT, mask_BT, threshold, window=window,
                          detector=entropy.detector, semantic_BT=trigger_V[batch.tokens])
  cover_BT = ops.hwe_cover(
    flag_BT, mask_BT, window=window if entropy.cover == "window" else 1)
  count_B = flag_BT.sum(1).astype(jnp.float32)

  bucket_B = ops.difficulty(batch.correct, group=group, easy=reward.easy, medium=reward.medium)
  mean_3, var_3, size_3 = ops.bucket_stats(count_B, bucket_B)
  target_3 = controllers.hwe_target * jnp.float32(reward.target_scale)
  if reward.target == "batch":
    target_3 = mean_3
  multiplier_3 = ops.hwe_multiplier(mean_3, var_3, size_3, target_3, rule=reward.rule,
                                    var_floor=reward.var_floor)
  # An empty bucket keeps its multiplier.
  multiplier_3 = ops.track_target(controllers.multiplier, multiplier_3, size_3, decay=0.0)
  # A bucket seen for the first time has no target yet: its own mean, no deviation.
  target_3 = jnp.where(jnp.isnan(target_3), mean_3, target_3)
  if reward.kind == "aepo":
    reward_B = ops.entropy_reward(
      batch.correct, count_B, bucket_B, target_3[bucket_B], multiplier_3[bucket_B],
      cap=reward.cap, penalize=reward.penalize)
  elif reward.kind == "release":
    reward_B, _ = ops.release_reward(batch.correct, count_B, bucket_B, target_3[bucket_B],
                                     controllers.alpha[bucket_B])
  else:
    reward_B = batch.correct
  bonus_BT = jnp.zeros_like(entropy_BT)
  if reward.token_bonus:
    bonus_BT = reward.token_bonus * ops.token_bonus(mean_BT, flag_BT, mask_BT, threshold,
                                                    multiplier_3[bucket_B])
  new = controllers.replace(
    threshold=threshold,
    hwe_target=ops.track_target(controllers.hwe_target, mean_3, size_3, decay=reward.target_decay),
    multiplier=multiplier_3)
  if reward.kind == "release":
    new = new.replace(alpha=ops.track_alpha(controllers.alpha, mean_3, size_3, target_3,
                                            rate=reward.alpha_rate))

  tokens_B = mask_BT.sum(1)
  tokens = jnp.maximum(tokens_B.sum(), 1)
  member_3B = bucket_B == jnp.arange(3)[:, None]
  tokens_3 = (member_3B * tokens_B).sum(1)
  metrics = {
    "reward/accuracy": batch.correct.mean(),
    "reward/format_ok": batch.format_ok.mean(),
    "reward/mean": reward_B.mean(),
    "reward/std": reward_B.std(),
    "reward/shaping": (reward_B - batch.correct).mean(),
    "response/tokens": tokens_B.mean(),
    "response/entropy": (entropy_BT * mask_BT).sum() / tokens,
    "hwe/threshold": threshold,
    "hwe/batch_threshold": batch_threshold,
    "hwe/share": flag_BT.sum() / tokens,
    "hwe/cover": cover_BT.sum() / tokens,
  }
  metrics |= by_bucket("bucket/share", member_3B.mean(1))
  # NaN, null in the log, where a bucket is empty: not to be mistaken for 0.
  metrics |= by_bucket("bucket/tokens", tokens_3 / size_3)
  metrics |= by_bucket("hwe/count", jnp.where(size_3 > 0, mean_3, jnp.nan))
  metrics |= by_bucket("hwe/share", (member_3B * count_B).sum(1) / tokens_3)
  metrics |= by_bucket("hwe/target", target_3) | by_bucket("hwe/multiplier", multiplier_3)
  if reward.kind == "release":
    metrics |= by_bucket("reward/alpha", new.alpha)
  return Shaping(reward_B, bucket_B, cover_BT, bonus_BT), new, metrics


def by_bucket(name, values_3):
  """{"NAME/easy": ..., "NAME/medium": ..., "NAME/hard": ...}."""
  return {f"{name}/{bucket}": values_3[index]
          for index, bucket in enumerate(BUCKETS)}
