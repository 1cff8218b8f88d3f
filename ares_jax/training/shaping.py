"""From a graded rollout batch to rewards: when to explore and how much (sections 3.2.1, 3.2.2).

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, V vocabulary. Names ending
in _3 hold a value for each difficulty bucket: easy, medium, hard.
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax import ops
from ares_jax.ops.difficulty import BUCKETS, bucket_of
from ares_jax.ops.window_entropy import hwe_starts
from ares_jax.system.config import optional


@dataclasses.dataclass(frozen=True)
class EntropyConfig:
  """When to explore: windows, threshold, high-window-entropy (HWE) tokens (section 3.2.1)."""

  window: int  # tokens
  quantile: float
  quantile_of: Literal["window", "token"]  # token: as printed in 3.2.1
  reduce: Literal["mean", "median"]  # of the sequences' quantiles
  decay: float  # EMA of past batches; 1 keeps the threshold of the first
  detector: Literal["window", "semantic", "trigger"]
  cover: Literal["window", "token"]  # which tokens of a flagged window get the relaxed KL
  # nats: the metrics hwe/watched count the flags at this threshold too, a measure of behaviour that
  # does not move with tau; 0 = they are left out
  watch: float = optional(0.0)

  def __post_init__(self):
    if self.window < 1 or self.watch < 0:
      raise ValueError(f"window = {self.window} must be >= 1, watch = {self.watch} nats >= 0")
    if not 0 <= self.quantile <= 1 or not 0 <= self.decay <= 1:
      raise ValueError(f"quantile = {self.quantile} and decay = {self.decay} must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """How much to explore: difficulty buckets and the hierarchical reward (section 3.2.2)."""

  # continuous: AEPO's with the pass rate in the place of buckets. Its target is that of all
  # answers, times the medium target_scale; its multiplier follows the medium bucket's rule.
  kind: Literal["accuracy", "aepo", "release", "continuous"]
  easy: float  # pass rate from which a prompt is easy
  medium: float
  rule: Literal["signed", "literal"]
  # What target_scale multiplies: the bucket's EMA; the mean of all buckets' EMAs; or this batch's
  # mean, as printed, with which the multiplier is identically 0.
  target: Literal["ema", "all", "batch"]
  target_scale: tuple[float, float, float]  # by bucket
  target_decay: float  # EMA of past batches; 1 keeps the counts of the first
  var_floor: float
  cap: float
  penalize: Literal["wrong", "all"]
  alpha_rate: float  # release reward only
  token_bonus: float  # coefficient of algorithm 1 line 13
  # The bonus is paid in all buckets, as printed; or it is charged in the easy bucket, paid in the
  # hard one, and 0 in between.
  bonus_sign: Literal["plus", "bucket"] = optional("plus")
  # A control for experiments: the entropy terms of a group are dealt at random among its right
  # answers, and among its wrong ones.
  placebo: bool = optional(False)

  def __post_init__(self):
    if not 0 <= self.medium <= self.easy <= 1:
      raise ValueError(f"0 <= medium = {self.medium} <= easy = {self.easy} <= 1 is needed")
    if not 0 <= self.target_decay <= 1 or min(self.target_scale) < 0:
      raise ValueError(f"target_decay = {self.target_decay} must be in [0, 1], target_scale = "
                       f"{self.target_scale} >= 0")
    if min(self.var_floor, self.cap) < 0 or self.alpha_rate <= 0:
      raise ValueError(f"var_floor = {self.var_floor} and cap = {self.cap} must be >= 0, "
                       f"alpha_rate = {self.alpha_rate} > 0")


@flax.struct.dataclass
class Controllers:
  """Thresholds, targets and coefficients that are tracked over iterations."""

  threshold: jax.Array  # float32 [], tau in nats; NaN before the first batch
  hwe_target: jax.Array  # float32 [3], EMA of HWE counts; NaN before a bucket's first batch
  multiplier: jax.Array  # float32 [3], lambda
  kappa: jax.Array  # float32 [3], KL coefficient
  alpha: jax.Array  # float32 [3], strength of the release's reward; 0.5 with another kind


@flax.struct.dataclass
class Shaping:
  """Rewards of a rollout batch, and the values of its tokens that the update needs."""

  reward: jax.Array  # float32 [B]
  bucket: jax.Array  # int32 [B]
  cover: jax.Array  # bool [B, T], inside HWE windows
  bonus: jax.Array  # float32 [B, T], psi of algorithm 1 line 13; 0 where its coefficient is 0


class _Windows(NamedTuple):
  mean: jax.Array  # float32 [B, T], nats, of the window that starts here
  flag: jax.Array  # bool [B, T], tokens that are counted
  start: jax.Array  # bool [B, T], whether an HWE window starts here: at a flag, or behind it
  batch_threshold: jax.Array  # float32 [], of this batch alone
  threshold: jax.Array  # float32 [], tracked over batches


class _Buckets(NamedTuple):
  mean: jax.Array  # float32 [3], HWE counts of a response
  size: jax.Array  # [3], responses
  target: jax.Array  # float32 [3]
  multiplier: jax.Array  # float32 [3]


def shape_rewards(entropy, reward, controllers, batch, trigger_V, *, group):
  """Windows, threshold, HWE counts, buckets, multipliers, rewards (algorithm 1 lines 5-13).

  Returns the Shaping of a RolloutBatch by EntropyConfig and RewardConfig, the Controllers (kappa
  unchanged) and float32 metrics. trigger_V, bool, marks the tokens of V_sem.
  """
  mask_BT = batch.response_mask
  windows = _flag_windows(entropy, controllers.threshold, batch, trigger_V)
  cover_BT = ops.hwe_cover(windows.start, mask_BT,
                           window=entropy.window if entropy.cover == "window" else 1)
  count_B = windows.flag.sum(1).astype(jnp.float32)
  bucket_B = ops.difficulty(batch.accuracy, group=group, easy=reward.easy, medium=reward.medium)
  buckets = _compare_with_targets(reward, controllers, count_B, bucket_B)

  rate_B = jnp.repeat(batch.accuracy.reshape(-1, group).mean(1), group)
  reward_B = _rewards(reward, controllers, batch.correct, count_B, bucket_B, rate_B, buckets)
  if batch.scores is not None:
    reward_B = batch.reward + (reward_B - batch.correct)
  if reward.placebo:
    key = jax.random.key(batch.tokens.sum())  # another one every batch; a repeated run has the same
    group_B = jnp.arange(len(reward_B)) // group
    reward_B = batch.reward + _dealt(reward_B - batch.reward, 2 * group_B + batch.correct, key)
  bonus_BT = jnp.zeros_like(batch.entropy)
  if reward.token_bonus:
    sign_3 = jnp.float32([-1, 0, 1]) if reward.bonus_sign == "bucket" else jnp.ones(3)
    bonus_BT = reward.token_bonus * ops.token_bonus(
      windows.mean, windows.start, mask_BT, windows.threshold,
      (sign_3 * buckets.multiplier)[bucket_B])
  shaping = Shaping(reward_B, bucket_B, cover_BT, bonus_BT)

  controllers = controllers.replace(
    threshold=windows.threshold, multiplier=buckets.multiplier,
    hwe_target=ops.track_target(controllers.hwe_target, buckets.mean, buckets.size,
                                decay=reward.target_decay))
  metrics = _metrics(batch, windows, count_B, buckets, shaping)
  if entropy.watch:
    watched_BT = _flags(entropy, jnp.float32(entropy.watch), batch, trigger_V)
    metrics |= _bucket_means("hwe/watched", watched_BT.sum(1), bucket_B)
  if reward.kind == "release":
    controllers = controllers.replace(alpha=ops.track_alpha(
      controllers.alpha, buckets.mean, buckets.size, buckets.target, rate=reward.alpha_rate))
  return shaping, controllers, metrics


def _flag_windows(entropy, threshold, batch, trigger_V):
  """_Windows, with the threshold tracked over batches."""
  entropy_BT, mask_BT = batch.entropy, batch.response_mask
  mean_BT, complete_BT = ops.window_entropy(entropy_BT, mask_BT, window=entropy.window)
  if entropy.quantile_of == "window":
    values_BT, valid_BT = mean_BT, complete_BT
  else:
    values_BT, valid_BT = entropy_BT, mask_BT
  batch_threshold, _ = ops.entropy_threshold(values_BT, valid_BT, quantile=entropy.quantile,
                                             reduce=entropy.reduce)
  threshold = ops.track_target(threshold, batch_threshold, valid_BT.sum(), decay=entropy.decay)
  flag_BT = _flags(entropy, threshold, batch, trigger_V)
  start_BT = hwe_starts(flag_BT, detector=entropy.detector)
  return _Windows(mean_BT, flag_BT, start_BT, batch_threshold, threshold)


def _flags(entropy, threshold, batch, trigger_V):
  return ops.hwe_flags(batch.entropy, batch.response_mask, threshold, window=entropy.window,
                       detector=entropy.detector, semantic_BT=trigger_V[batch.tokens])


def _compare_with_targets(reward, controllers, count_B, bucket_B):
  """_Buckets: mean HWE counts, their targets, and the multipliers that follow.

  For the continuous reward each has the values of all answers.
  """
  pooled = reward.kind == "continuous"
  if pooled:
    bucket_B = jnp.ones_like(bucket_B)
  mean_3, var_3, size_3 = ops.bucket_stats(count_B, bucket_B)
  ema_3 = controllers.hwe_target
  if reward.target == "all":
    ema_3 = jnp.where(jnp.isnan(ema_3), ema_3, jnp.nanmean(ema_3))
  target_3 = ema_3 * jnp.float32(reward.target_scale)
  if reward.target == "batch":
    target_3 = jnp.round(mean_3) if reward.kind == "release" else mean_3
  multiplier_3 = ops.hwe_multiplier(mean_3, var_3, size_3, target_3, rule=reward.rule,
                                    var_floor=reward.var_floor)
  # An empty bucket keeps its multiplier.
  multiplier_3 = ops.track_target(controllers.multiplier, multiplier_3, size_3, decay=0.0)
  # A bucket seen for the first time has no target yet: its mean is the target, without deviation.
  target_3 = jnp.where(jnp.isnan(target_3), mean_3, target_3)
  buckets = _Buckets(mean_3, size_3, target_3, multiplier_3)
  return jax.tree.map(lambda values_3: jnp.full(3, values_3[1]), buckets) if pooled else buckets


def _rewards(reward, controllers, correct_B, count_B, bucket_B, rate_B, buckets):
  """float32 [B]: rewards of the config's kind."""
  target_B, multiplier_B = buckets.target[bucket_B], buckets.multiplier[bucket_B]
  if reward.kind == "aepo":
    return ops.entropy_reward(correct_B, count_B, bucket_B, target_B, multiplier_B,
                              cap=reward.cap, penalize=reward.penalize)
  if reward.kind == "continuous":
    return ops.continuous_reward(correct_B, count_B, rate_B, target_B, multiplier_B,
                                 cap=reward.cap, penalize=reward.penalize)
  if reward.kind == "release":
    alpha_B = controllers.alpha[bucket_B]
    return ops.release_reward(correct_B, count_B, bucket_B, target_B, alpha_B)[0]
  return correct_B


def _dealt(value_B, class_B, key):
  """The values in a random order among the rows of each class."""
  shuffled_B = jnp.lexsort((jax.random.uniform(key, value_B.shape), class_B))
  return jnp.zeros_like(value_B).at[jnp.argsort(class_B)].set(value_B[shuffled_B])


def _metrics(batch, windows, count_B, buckets, shaping):
  tokens_B, bucket_B = batch.response_mask.sum(1), shaping.bucket
  tokens = jnp.maximum(tokens_B.sum(), 1)
  metrics = {
    "reward/accuracy": batch.accuracy.mean(), "reward/format_ok": batch.format_ok.mean(),
    "reward/mean": shaping.reward.mean(), "reward/std": shaping.reward.std(),
    "reward/shaping": (shaping.reward - batch.reward).mean(),
    "response/tokens": tokens_B.mean(),
    "response/entropy": (batch.entropy * batch.response_mask).sum() / tokens,
    "hwe/threshold": windows.threshold, "hwe/batch_threshold": windows.batch_threshold,
    "hwe/share": windows.flag.sum() / tokens, "hwe/cover": shaping.cover.sum() / tokens}
  metrics |= by_bucket("bucket/share", (bucket_B == jnp.arange(3)[:, None]).mean(1))
  metrics |= _bucket_means("bucket/tokens", tokens_B, bucket_B)
  metrics |= _bucket_means("hwe/count", count_B, bucket_B)
  metrics |= _bucket_means("hwe/share", count_B, bucket_B, over_B=tokens_B)
  metrics |= by_bucket("hwe/target", buckets.target)
  return metrics | by_bucket("hwe/multiplier", buckets.multiplier)


def component_metrics(reward, scores, *, group):
  """{"component/NAME": mean, "component/NAME/easy": mean of easy prompts, ...} of scoring.Scores.

  They are computed on the host: which components there are may differ from batch to batch. NaN
  where no response has the component.
  """
  metrics = {}
  bucket_P = bucket_of(scores.accuracy.reshape(-1, group).sum(1), samples=group, easy=reward.easy,
                       medium=reward.medium)
  bucket_B = np.repeat(bucket_P, group)
  for name, value_B in scores.components.items():
    known_B = np.isfinite(value_B)
    parts = {"": known_B} | {f"/{bucket}": known_B & (bucket_B == number)
                             for number, bucket in enumerate(BUCKETS)}
    metrics |= {f"component/{name}{part}": value_B[member_B].mean() if member_B.any() else np.nan
                for part, member_B in parts.items()}
  return metrics


def shaped_metrics(advantage_B, accuracy_B, bucket_B):
  """Metrics of what the reward's entropy term changes in the advantages, in all and by bucket.

  `reward/shaped` is the share of responses whose advantage differs from `accuracy_B`, that of
  accuracy alone, by more than 0.001; `reward/shaped_size` the mean difference over the mean size
  of `accuracy_B`.
  """
  change_B, size_B = jnp.abs(advantage_B - accuracy_B), jnp.abs(accuracy_B)
  changed_B = (change_B > 1e-3).astype(jnp.float32)
  metrics = {"reward/shaped": changed_B.mean(),
             "reward/shaped_size": change_B.sum() / size_B.sum()}
  metrics |= _bucket_means("reward/shaped", changed_B, bucket_B)
  return metrics | _bucket_means("reward/shaped_size", change_B, bucket_B, over_B=size_B)


def _bucket_means(name, value_B, bucket_B, over_B=1.0):
  """Means by bucket, over those of `over_B`; NaN for an empty bucket.

  NaN is null in the log, so that nobody takes it for 0.
  """
  member_3B = bucket_B == jnp.arange(3)[:, None]
  return by_bucket(name, (member_3B * value_B).sum(1) / (member_3B * over_B).sum(1))


def by_bucket(name, values_3):
  """{"NAME/easy": ..., "NAME/medium": ..., "NAME/hard": ...}."""
  return {f"{name}/{bucket}": values_3[index] for index, bucket in enumerate(BUCKETS)}
