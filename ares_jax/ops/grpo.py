"""Group advantages and the clipped policy loss (paper eq. 2, algorithm 1 lines 11-22).

P prompts, G rollouts of each, B = P*G rows with b = p*G + g, T tokens.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ares_jax.ops.op import op


@op(static=("group", "normalize", "eps"))
def group_advantage(reward_B, *, group, normalize="std", eps=1e-6, correct_B=None):
  """(R - mean of the group) / (std of the group + eps) (algorithm 1 line 12).

  Args:
    reward_B: floating.
    group: G, rollouts a prompt, an integer; divides B.
    normalize: "std" with ddof = 1 (release); "none": no division; "leave_one_out": R minus the
      mean of the other rollouts.
    eps: > 0, added to the standard deviation.
    correct_B: bool or number; when given, groups whose rows are all equally correct get 0, so
      that a small shaping reward is not blown up to +-1 by their small deviation.

  Returns:
    advantage_B: float32; exactly 0 when G = 1 or all rewards of a group are equal.

  Raises:
    ValueError: not [B], B not divisible by group, an unknown `normalize`, eps <= 0.

  >>> import numpy as np
  >>> print(group_advantage(np.float32([0, 1, 2, 5, 5, 5]), group=3).round(3))
  [-1.  0.  1.  0.  0.  0.]
  """
  if reward_B.ndim != 1 or not jnp.issubdtype(reward_B.dtype, jnp.floating):
    raise ValueError(f"reward_B is {reward_B.dtype}{reward_B.shape}; pass floating [B]")
  if not isinstance(group, int) or group < 1 or reward_B.shape[0] % group:
    raise ValueError(f"{reward_B.shape[0]} rows do not divide into groups of {group!r}; pass whole "
                     "groups")
  if normalize not in ("std", "none", "leave_one_out"):
    raise ValueError(f'normalize = {normalize!r} must be "std", "none" or "leave_one_out"')
  if not eps > 0:
    raise ValueError(f"eps = {eps} must be > 0")
  reward_PG = reward_B.astype(jnp.float32).reshape(-1, group)
  # Against the first rollout: the mean of 8 x 0.1 is not 0.1 in float32, and the rounding
  # error divided by eps is an advantage of 0.01 where there should be none.
  reward_PG = reward_PG - reward_PG[:, :1]
  advantage_PG = reward_PG - reward_PG.mean(1, keepdims=True)
  if normalize == "std":
    variance_P1 = jnp.square(advantage_PG).sum(1, keepdims=True) / max(group - 1, 1)
    advantage_PG = advantage_PG / (jnp.sqrt(variance_P1) + eps)
  elif normalize == "leave_one_out":
    advantage_PG = advantage_PG * (group / max(group - 1, 1))
  if correct_B is not None:
    if correct_B.shape != reward_B.shape:
      raise ValueError(f"correct_B {correct_B.shape} must have reward's shape {reward_B.shape}")
    correct_PG = correct_B.reshape(-1, group)
    mixed_P1 = (correct_PG != correct_PG[:, :1]).any(1, keepdims=True)
    advantage_PG = jnp.where(mixed_P1, advantage_PG, 0)
  return advantage_PG.reshape(-1)


@op
def token_bonus(mean_BT, flag_BT, mask_BT, threshold, multiplier_B):
  """psi = lambda_d relu(Hbar - tau) m, less its mean over the sequence (algorithm 1 line 13).

  Args:
    mean_BT: floating, window entropy, nats.
    flag_BT: bool, m, from `hwe_flags`.
    mask_BT: bool, True on response tokens.
    threshold: tau in nats, a scalar or one value a row.
    multiplier_B: lambda of the row's bucket.

  Returns:
    bonus_BT: float32; sums to 0 over each response, 0 outside it. Add `coefficient * bonus_BT`
      to the advantages: it never enters the group's statistics.

  Raises:
    ValueError: shapes that do not fit, wrong dtypes.

  >>> import numpy as np
  >>> mean_BT, flag_BT = np.float32([[3, 1, 0, 0]]), np.bool_([[1, 0, 0, 0]])
  >>> mask_BT = np.bool_([[1, 1, 0, 0]])
  >>> print(token_bonus(mean_BT, flag_BT, mask_BT, np.float32(1), np.ones(1, np.float32)))
  [[ 1. -1.  0.  0.]]
  """
  _check_tokens(mask_BT, mean_BT=mean_BT)
  if flag_BT.shape != mask_BT.shape or flag_BT.dtype != jnp.bool_:
    raise ValueError(f"flag_BT is {flag_BT.dtype}{flag_BT.shape}; pass bool{mask_BT.shape}")
  rows = mask_BT.shape[:1]
  threshold = jnp.asarray(threshold, jnp.float32)
  if multiplier_B.shape != rows or threshold.shape not in ((), rows):
    raise ValueError(f"multiplier {multiplier_B.shape}, threshold {threshold.shape}: pass one "
                     f"value for each of the {rows[0]} rows (threshold: or a scalar)")
  threshold = jnp.broadcast_to(threshold, rows)[:, None]
  above_BT = jnp.maximum(mean_BT.astype(jnp.float32) - threshold, 0)
  bonus_BT = jnp.where(flag_BT & mask_BT, above_BT * multiplier_B.astype(jnp.float32)[:, None], 0)
  mean_B1 = bonus_BT.sum(1, keepdims=True) / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
  return jnp.where(mask_BT, bonus_BT - mean_B1, 0)


@op(static=("cap",))
def importance_weight(old_logprob_BT, sampler_logprob_BT, mask_BT, *, cap):
  """min(exp(old_logprob - sampler_logprob), cap): sampler and trainer round differently.

  Args:
    old_logprob_BT: floating, nats, the trainer's, before the update.
    sampler_logprob_BT: floating, nats, recorded while sampling at the same temperature and over
      the whole vocabulary.
    mask_BT: bool, True on response tokens.
    cap: greatest weight, a Python number > 0.

  Returns:
    weight_BT: float32; 1 outside the mask; no gradient.

  Raises:
    ValueError: shapes that differ, wrong dtypes, cap <= 0.

  >>> import numpy as np
  >>> old_BT = np.log(np.float32([[0.5, 0.9, 0.2]]))
  >>> sampler_BT = np.log(np.float32([[0.4, 0.1, 0.2]]))
  >>> print(importance_weight(old_BT, sampler_BT, np.bool_([[1, 1, 0]]), cap=2.0))
  [[1.25 2.   1.  ]]
  """
  _check_tokens(mask_BT, old_logprob_BT=old_logprob_BT, sampler_logprob_BT=sampler_logprob_BT)
  if not cap > 0:
    raise ValueError(f"cap = {cap} must be > 0; 2 is usual")
  gap_BT = old_logprob_BT.astype(jnp.float32) - sampler_logprob_BT.astype(jnp.float32)
  weight_BT = jnp.minimum(jnp.exp(jnp.clip(gap_BT, -20, 20)), cap)
  return lax.stop_gradient(jnp.where(mask_BT, weight_BT, 1))


@op(static=("clip_low", "clip_high", "clip_dual", "average", "ratio", "clip"))
def policy_loss(logprob_BT, old_logprob_BT, advantage_BT, mask_BT, *, clip_low, clip_high,
                clip_dual, average="token", weight_BT=None, total=None, ratio="token",
                clip="loss", segment_BT=None):
  """Clipped policy loss, to be minimised (paper eq. 2, algorithm 1 lines 16-22).

  -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprob - old_logprob) with the
  exponent clamped to +-20; where A < 0 at most -clip_dual A (dual clip). `ratio` and `clip` make
  it the loss of GSPO (arXiv 2507.18071, eq. 5-7) or CISPO (arXiv 2506.13585, eq. 4-5).

  Args:
    logprob_BT, old_logprob_BT: floating, nats.
    advantage_BT: floating; `jnp.broadcast_to(advantage_B[:, None], mask_BT.shape)`.
    mask_BT: bool, True on response tokens.
    clip_low: in [0, 1]; 0.2; 1 for no lower bound. clip_high: >= 0; 0.3 (clip-higher).
    clip_dual: > 1; 3.0; math.inf for none. All three are Python numbers.
    average, total: see `average_loss`.
    weight_BT: importance weights that multiply the loss, or None.
    ratio: "token"; "sequence": all tokens of a response have its ratio, the exponential of the mean
      of logprob - old_logprob over its tokens (GSPO).
    clip: "loss" as above; "weight": the loss is -clip(r) A logprob, in which clip(r) has no
      gradient, so that no token's gradient is cut (CISPO); clip_dual is not used.
    segment_BT: int, for ratio="sequence": which response of its row a token belongs to, in [0, T];
      None where a row is one response.

  Returns:
    loss: float32 scalar.
    metrics: float32 scalars, means over the masked tokens, without gradient: ratio; clipped_low,
      clipped_high, clipped_dual (shares of tokens whose gradient is cut, or whose weight is); and
      policy_kl (k1 from old to new). And ratio_max.

  Raises:
    ValueError: shapes that differ, wrong dtypes, clip bounds out of range, unknown `average`,
      `ratio` or `clip`.

  >>> import numpy as np
  >>> old_BT, mask_BT = np.zeros((1, 2), np.float32), np.ones((1, 2), bool)
  >>> logprob_BT, advantage_BT = np.log(np.float32([[1, 2]])), np.ones((1, 2), np.float32)
  >>> loss, metrics = policy_loss(logprob_BT, old_BT, advantage_BT, mask_BT,
  ...                             clip_low=0.2, clip_high=0.3, clip_dual=3.0)
  >>> print(loss, metrics["clipped_high"])                                # -(1 + 1.3) / 2
  -1.15 0.5
  """
  _check_tokens(mask_BT, logprob_BT=logprob_BT, old_logprob_BT=old_logprob_BT,
                advantage_BT=advantage_BT)
  if not 0 <= clip_low <= 1 or not clip_high >= 0 or not clip_dual > 1:
    raise ValueError(f"clip_low = {clip_low} must be in [0, 1], clip_high = {clip_high} >= 0, "
                     f"clip_dual = {clip_dual} > 1 (math.inf for none)")
  if ratio not in ("token", "sequence") or clip not in ("loss", "weight"):
    raise ValueError(f'ratio = {ratio!r} must be "token" or "sequence", clip = {clip!r} "loss" or '
                     '"weight"')
  # Outside the mask log-probabilities may be nan or inf, whose gradient times 0 is nan.
  gap_BT = jnp.where(mask_BT, logprob_BT.astype(jnp.float32) - old_logprob_BT, 0)
  advantage_BT = jnp.where(mask_BT, advantage_BT.astype(jnp.float32), 0)
  token_gap_BT = gap_BT
  if ratio == "sequence":
    gap_BT = _response_means(gap_BT, mask_BT, segment_BT)
  ratio_BT = jnp.exp(jnp.clip(gap_BT, -20, 20))
  clipped_ratio_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
  if clip == "loss":
    loss_BT = jnp.maximum(-advantage_BT * ratio_BT, -advantage_BT * clipped_ratio_BT)
    negative_BT, positive_BT = advantage_BT < 0, advantage_BT > 0
    dual_BT = negative_BT & (ratio_BT > clip_dual)
    if math.isfinite(clip_dual):
      loss_BT = jnp.where(negative_BT, jnp.minimum(loss_BT, -advantage_BT * clip_dual), loss_BT)
  else:
    loss_BT = -advantage_BT * lax.stop_gradient(clipped_ratio_BT) * jnp.where(
      mask_BT, logprob_BT.astype(jnp.float32), 0)
    negative_BT = positive_BT = mask_BT
    dual_BT = jnp.zeros_like(mask_BT)
  if weight_BT is not None:
    _check_tokens(mask_BT, weight_BT=weight_BT)
    loss_BT = loss_BT * weight_BT.astype(jnp.float32)
  loss = average_loss(loss_BT, mask_BT, average=average, total=total)
  metrics = {"ratio": ratio_BT,
             "clipped_low": negative_BT & (ratio_BT < 1 - clip_low),
             "clipped_high": positive_BT & (ratio_BT > 1 + clip_high),
             "clipped_dual": dual_BT,
             "policy_kl": -token_gap_BT}
  metrics = {name: average_loss(value_BT.astype(jnp.float32), mask_BT, average="token")
             for name, value_BT in metrics.items()}
  metrics["ratio_max"] = jnp.where(mask_BT, ratio_BT, 0).max(initial=0)
  return loss, lax.stop_gradient(metrics)


def _response_means(value_BT, mask_BT, segment_BT):
  """The mean over its response at every token of a row that may hold several responses."""
  if segment_BT is None:
    segment_BT = jnp.zeros(mask_BT.shape, jnp.int32)

  def of_row(value_T, mask_T, segment_T):
    def total(x_T):
      return jax.ops.segment_sum(x_T.astype(jnp.float32), segment_T, len(x_T) + 1)

    return (total(value_T) / jnp.maximum(total(mask_T), 1))[segment_T]

  return jnp.where(mask_BT, jax.vmap(of_row)(value_BT, mask_BT, segment_BT), 0)


@op(static=("average",))
def average_loss(loss_BT, mask_BT, *, average="token", total=None):
  """Mean of a loss over tokens: all tokens equal, or all sequences equal.

  Args:
    loss_BT: floating.
    mask_BT: bool, True on response tokens.
    average: "token": every token of the batch counts the same (release, DAPO); "sequence": the
      mean of each response's mean (1/|o|, algorithm 1); empty rows do not count.
    total: what to divide by instead of this batch's number of tokens ("token") or of non-empty
      rows ("sequence"). With the whole minibatch's, the losses of its parts add up to its own.
      Less than 1 counts as 1, so that an empty batch gives 0.

  Returns:
    loss: float32 scalar; 0 for an empty mask.

  Raises:
    ValueError: shapes that differ, wrong dtypes, an unknown `average`.

  >>> import numpy as np
  >>> loss_BT, mask_BT = np.float32([[1, 2, 3], [6, 0, 0]]), np.bool_([[1, 1, 1], [1, 0, 0]])
  >>> print(average_loss(loss_BT, mask_BT), average_loss(loss_BT, mask_BT, average="sequence"))
  3.0 4.0
  """
  _check_tokens(mask_BT, loss_BT=loss_BT)
  if average not in ("token", "sequence"):
    raise ValueError(f'average = {average!r} must be "token" or "sequence"')
  sum_B = jnp.where(mask_BT, loss_BT.astype(jnp.float32), 0).sum(1)
  number_B = mask_BT.sum(1)
  if average == "sequence":
    sum_B = sum_B / jnp.maximum(number_B, 1)
    number_B = number_B > 0
  if total is None:
    total = number_B.sum()
  total = jnp.asarray(total, jnp.float32)
  if total.shape != ():
    raise ValueError(f"total has shape {total.shape}; pass a scalar")
  return sum_B.sum() / jnp.maximum(total, 1)


def _check_tokens(mask_BT, **arrays):
  if mask_BT.ndim != 2 or mask_BT.dtype != jnp.bool_:
    raise ValueError(f"mask_BT is {mask_BT.dtype}{mask_BT.shape}; pass bool[B, T], e.g. mask > 0")
  for name, array in arrays.items():
    if array.shape != mask_BT.shape or not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} is {array.dtype}{array.shape}; pass floating {mask_BT.shape}")
