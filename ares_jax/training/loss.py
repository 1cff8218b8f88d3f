"""The loss of stage 2 on one microbatch of packed rows (eq. 2, algorithm 1 lines 16-22).

B sequences of T response tokens; R rows of a microbatch, C tokens of a row. Names ending in _3 hold
a value for each difficulty bucket.
"""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from ares_jax import ops


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Clipped policy gradient (eq. 2)."""

  advantage: Literal["std", "none", "leave_one_out"]
  equal_groups: Literal["zero", "normalize"]  # groups of equal correctness: no advantage, or as is
  clip_low: float
  clip_high: float
  clip_dual: float
  average: Literal["token", "sequence"]
  old_logprob: Literal["sampler", "recompute"]
  importance_cap: float  # of min(exp(old - sampler), cap); used where old_logprob is recomputed
  # Mean |log-probability of the trainer - of the sampler|, both before the iteration's first
  # update, nats a token: beyond the first the progress bar warns, beyond the second the update is
  # skipped. inf = never.
  sampler_gap: tuple[float, float]

  def __post_init__(self):
    if not 0 <= self.clip_low < 1 or self.clip_high < 0 or self.clip_dual <= 1:
      raise ValueError(f"clip_low = {self.clip_low} must be in [0, 1), clip_high = "
                       f"{self.clip_high} >= 0, clip_dual = {self.clip_dual} > 1")
    if self.importance_cap <= 0:
      raise ValueError(f"importance_cap = {self.importance_cap} must be > 0")
    if not 0 < self.sampler_gap[0] <= self.sampler_gap[1]:
      raise ValueError(f"sampler_gap = {self.sampler_gap} must be two limits > 0: from the first "
                       "on a warning, from the second on no update; inf = never")


@dataclasses.dataclass(frozen=True)
class KlConfig:
  """The thinking budget: token-adaptive KL to the reference and its controller (lines 16-24)."""

  estimator: Literal["k1", "k2", "k3", "abs"]
  dynamic: bool  # False: kappa stays at `start` and HWE windows get no relief
  start: tuple[float, float, float]  # kappa at step 0
  beta: tuple[float, float, float]
  rho: float  # weight inside HWE windows over outside
  target: tuple[float, float, float]  # delta, nats a token outside windows
  rate: float
  low: float
  high: float

  def __post_init__(self):
    if not 0 <= self.rho <= 1 or not 0 < self.rate < 1 or min(self.target) <= 0:
      raise ValueError(f"rho = {self.rho} must be in [0, 1], rate = {self.rate} in (0, 1), target "
                       f"= {self.target} > 0")
    if min(self.beta) < 0 or not 0 < self.low <= min(self.start) <= max(self.start) <= self.high:
      raise ValueError(f"beta = {self.beta} must be >= 0, and 0 < low <= start <= high: low = "
                       f"{self.low}, start = {self.start}, high = {self.high}")


@flax.struct.dataclass
class Signal:
  """Values of the sequences that their packed rows do not hold.

  They are replicated on every device, because a row holds sequences of any prompts. At B = 4096
  and T = 16384 `cover` takes 64 MiB.
  """

  advantage: jax.Array  # float32 [B]
  bonus: jax.Array | None  # float32 [B, T], psi of algorithm 1 line 13; None without
  cover: jax.Array  # bool [B, T], inside HWE windows
  bucket: jax.Array  # int32 [B]
  length: jax.Array  # int32 [B], response tokens
  beta_3: jax.Array  # float32, beta times kappa
  rho: float = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Sums:
  """Sums over the microbatches of a minibatch."""

  metrics: dict  # parts of means; averaged over the minibatches, they are means over the batch
  nonfinite: dict  # {value: int32 [], response tokens where it is not finite}
  kl_sum_3: jax.Array  # float32 [3]: KL of tokens outside HWE windows, nats
  kl_tokens_3: jax.Array  # [3]: number of these tokens
  ratio_max: jax.Array  # float32 []: the maximum, not a sum


@flax.struct.dataclass
class Divisors:
  """Divisors of the means over a minibatch's tokens."""

  # Mean of the minibatches' response tokens, not the tokens of this one. Minibatches are made by
  # length (batch.balance_minibatches), and one may hold twice the tokens of another: divided by
  # its number, a token of a short answer would weigh twice as much as one of a long answer.
  tokens: jax.Array
  loss: jax.Array  # `tokens`, or sequences if the config averages over sequences
  minibatch_tokens: jax.Array  # response tokens of this minibatch
  length: jax.Array  # int32 [B]: response tokens of each sequence, at least 1


def minibatch_divisors(config, rows, signal):
  """Divisors of the minibatch of packed `rows`, by AepoConfig."""
  tokens = signal.length.sum() * (config.minibatch / len(signal.length))
  loss, length_B = tokens, jnp.maximum(signal.length, 1)
  if config.loss.average == "sequence":
    # Every sequence in the rows counts 1, spread over its tokens.
    loss = (rows.response_mask / length_B[rows.sequence]).sum()
  return Divisors(tokens, loss, rows.response_mask.sum(), length_B)


def microbatch_loss(config, signal, divisors, rows, logprob_RC, entropy_RC, reference_RC):
  """A microbatch's part of the minibatch's loss, the clipped policy loss and the KL penalty.

  Args:
    config, signal, divisors, rows: AepoConfig, Signal, Divisors and PackedRows.
    logprob_RC, entropy_RC: float32, nats, of the policy.
    reference_RC: float32, nats, log-probability by the reference policy.

  Returns:
    loss: float32 []; the parts add up to the minibatch's loss.
    Sums.
  """
  loss, kl = config.loss, config.kl
  mask_RC, sampler_RC, sequence_RC = rows.response_mask, rows.sampler_logprob, rows.sequence
  old_RC = rows.old_logprob
  if old_RC is None:
    old_RC = jax.lax.stop_gradient(logprob_RC)
  share_RC = jnp.ones_like(logprob_RC)
  if loss.average == "sequence":
    share_RC /= divisors.length[sequence_RC]

  # Clipped policy gradient.
  advantage_RC = signal.advantage[sequence_RC]
  if signal.bonus is not None:
    advantage_RC += signal.bonus[sequence_RC, rows.response_index]
  weight_RC = share_RC
  if loss.old_logprob == "recompute":
    weight_RC = share_RC * ops.importance_weight(old_RC, sampler_RC, mask_RC,
                                                 cap=loss.importance_cap)
  policy, ratios = ops.policy_loss(
    logprob_RC, old_RC, advantage_RC, mask_RC, clip_low=loss.clip_low, clip_high=loss.clip_high,
    clip_dual=loss.clip_dual, weight_BT=weight_RC, total=divisors.loss)
  ratio_max = ratios.pop("ratio_max")

  # KL to the reference, relaxed inside HWE windows.
  cover_RC = signal.cover[sequence_RC, rows.response_index] & mask_RC
  bucket_RC = signal.bucket[sequence_RC]
  kl_RC = ops.token_kl(logprob_RC, reference_RC, estimator=kl.estimator)
  beta_RC = share_RC * ops.kl_weight(bucket_RC, cover_RC, beta_3=signal.beta_3, rho=signal.rho)
  penalty = ops.average_loss(beta_RC * kl_RC, mask_RC, total=divisors.loss)
  kl_3, kl_tokens_3 = ops.control_kl(kl_RC, mask_RC, cover_RC, bucket_RC)

  part = mask_RC.sum() / jnp.maximum(divisors.tokens, 1)
  before_RC = logprob_RC if loss.old_logprob == "sampler" else old_RC
  metrics = {f"loss/{name}": mean * part for name, mean in ratios.items()} | {
    "loss/policy": policy, "loss/kl": penalty,
    "kl/mean": ops.average_loss(kl_RC, mask_RC, total=divisors.tokens),
    "loss/entropy": ops.average_loss(entropy_RC, mask_RC, total=divisors.tokens),
    "loss/sampler_gap": ops.average_loss(jnp.abs(before_RC - sampler_RC), mask_RC,
                                         total=divisors.minibatch_tokens)}
  # Entropy uses every logit, so a non-finite entropy means a non-finite logit.
  nonfinite = {name: (mask_RC & ~jnp.isfinite(values)).sum() for name, values in (
    ("logits", entropy_RC), ("logprob", logprob_RC), ("reference", reference_RC),
    ("sampler_logprob", sampler_RC))}
  return policy + penalty, Sums(metrics, nonfinite, kl_3 * kl_tokens_3, kl_tokens_3, ratio_max)
