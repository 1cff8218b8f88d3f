"""Entropy rewards: the paper's (section 3.2.2), its public release's, and one without buckets.

B rows; `_B` of a bucket quantity is `quantity_3[bucket_B]`. Buckets: 0 easy, 1 medium, 2 hard.
Delta is count - target: the excess of high-window-entropy tokens N_HE over N_target.
"""

import jax
import jax.numpy as jnp

from ares_jax.ops.op import check_three, op

# The release's constants, (easy, medium, hard); margins and kappas are in tokens.
_MARGIN = (0.15, 0.25, 0.35)  # of the target
_KAPPA = (2.0, 3.0, 4.0)
_TEMPERATURE = (2.0, 2.5, 3.0)
_CAP = (1.0, 1.0, 1.2)  # of alpha
_WRONG = (0.6, 0.8, 1.0)  # of the cap, for wrong answers


@op(static=("cap", "penalize"))
def entropy_reward(correct_B, count_B, bucket_B, target_B, multiplier_B, *, cap=0.5,
                   penalize="wrong"):
  """R = R_acc - 1[R_acc = 0] min(lambda_d g_d(Delta), cap) (paper section 3.2.2).

  g_easy = max(0, Delta), g_medium = |Delta|, g_hard = max(0, -Delta).

  Args:
    correct_B: R_acc, bool or number; 0 is a wrong answer.
    count_B: N_HE, number.
    bucket_B: integer; a row of another bucket (-1 for padding) is not penalised.
    target_B: N_target of the row's bucket; nan where there is none yet: no penalty.
    multiplier_B: lambda of the row's bucket, >= 0.
    cap: greatest penalty, a Python number >= 0; math.inf is the paper's.
    penalize: "wrong": wrong answers only (3.2.2); "all": correct answers of the easy and medium
      buckets too (appendix I).

  Returns:
    reward_B: float32.

  Raises:
    ValueError: not all [B], buckets not integer, cap < 0, an unknown `penalize`.

  >>> import numpy as np
  >>> correct_B, count_B = np.float32([0, 0, 1]), np.float32([7, 1, 9])
  >>> bucket_B = np.int32([0, 2, 0])
  >>> target_B, multiplier_B = np.float32([4, 4, 4]), np.float32([0.1, 1, 0.1])
  >>> print(entropy_reward(correct_B, count_B, bucket_B, target_B, multiplier_B))
  [-0.3 -0.5  1. ]
  """
  _check_rows(correct_B, count_B, bucket_B, target_B, multiplier_B)
  excess_B = _excess(count_B, target_B)
  deviation_B = jnp.select([bucket_B == 0, bucket_B == 1, bucket_B == 2],
                           [jnp.maximum(excess_B, 0), jnp.abs(excess_B), jnp.maximum(-excess_B, 0)],
                           0.0)
  return _penalised(correct_B, multiplier_B * deviation_B, bucket_B <= 1, cap, penalize)


@op(static=("cap", "penalize"))
def continuous_reward(correct_B, count_B, rate_B, target_B, multiplier_B, *, cap=0.5,
                      penalize="wrong"):
  """`entropy_reward` without buckets: g(Delta) = max(0, (2p - 1) Delta), p the prompt's pass rate.

  At p = 1 it is g_easy, at p = 0 g_hard; a prompt solved half of the time is not shaped. The
  formula is ours, not the paper's.

  Args:
    correct_B, count_B, cap: as for `entropy_reward`.
    rate_B: p, in [0, 1], equal within a group; 0.5 for padding.
    target_B, multiplier_B: N_target and lambda of all rows; a target of nan is no penalty.
    penalize: "wrong": wrong answers only; "all": correct ones to prompts with p > 0.5 too.

  Returns:
    reward_B: float32.

  Raises:
    ValueError: not all [B], cap < 0, an unknown `penalize`.

  >>> import numpy as np
  >>> correct_B, count_B = np.float32([0, 0, 1]), np.float32([7, 1, 9])
  >>> rate_B, target_B = np.float32([0.75, 0, 0.75]), np.float32([4, 4, 4])
  >>> print(continuous_reward(correct_B, count_B, rate_B, target_B, np.full(3, 0.1)).round(3))
  [-0.15 -0.3   1.  ]
  """
  _check_shapes(correct_B, count_B, rate_B, target_B, multiplier_B)
  slope_B = 2 * rate_B.astype(jnp.float32) - 1
  deviation_B = jnp.maximum(slope_B * _excess(count_B, target_B), 0)
  return _penalised(correct_B, multiplier_B * deviation_B, slope_B > 0, cap, penalize)


def _penalised(correct_B, penalty_B, easier_B, cap, penalize):
  """The reward: accuracy less a penalty for wrong answers and, with "all", for `easier_B`."""
  if not cap >= 0:
    raise ValueError(f"cap = {cap} must be >= 0; math.inf for no cap")
  if penalize not in ("wrong", "all"):
    raise ValueError(f'penalize = {penalize!r} must be "wrong" or "all"')
  correct_B = correct_B.astype(jnp.float32)
  penalised_B = correct_B == 0
  if penalize == "all":
    penalised_B |= easier_B
  return correct_B - jnp.where(penalised_B, jnp.minimum(penalty_B, cap), 0)


@op
def release_reward(correct_B, count_B, bucket_B, target_B, alpha_B):
  """Accuracy plus the entropy score of the paper's public release (paper appendix I, M).

  Correct easy and medium answers lose a Huber penalty outside a margin around the target; wrong
  answers, and correct hard ones, gain a sigmoid bonus. See `_score` for the pieces.

  Args:
    correct_B: bool or number; 0 is a wrong answer.
    count_B: N_HE, number.
    bucket_B: integer; a row of another bucket (-1 for padding) scores 0.
    target_B: N_target of the row's bucket; nan where there is none yet counts as no excess.
    alpha_B: strength of the row's bucket, >= 0, see `track_alpha`.

  Returns:
    reward_B: float32, correct + entropy_score.
    entropy_score_B: float32.

  Raises:
    ValueError: not all [B], buckets not integer.

  >>> import numpy as np
  >>> one = np.ones(1, np.float32)                            # appendix M: 51 against 28, correct
  >>> reward_B, score_B = release_reward(one, 51 * one, np.int32([0]), 28 * one, 0.5 * one)
  >>> print(reward_B, score_B)
  [0.5] [-0.5]
  """
  _check_rows(correct_B, count_B, bucket_B, target_B, alpha_B)
  correct_B, alpha_B = correct_B.astype(jnp.float32), alpha_B.astype(jnp.float32)
  excess_B = _excess(count_B, target_B)
  target_B = jnp.where(jnp.isnan(target_B), 0, target_B.astype(jnp.float32))
  scores = [_score(bucket, correct_B != 0, excess_B, target_B, alpha_B) for bucket in range(3)]
  score_B = jnp.select([bucket_B == bucket for bucket in range(3)], scores, 0.0)
  return correct_B + score_B, score_B


def _score(bucket, right_B, excess_B, target_B, alpha_B):
  """The release's score of rows taken to be of one bucket."""
  margin_B = jnp.maximum(1, _MARGIN[bucket] * jnp.maximum(1, target_B))
  cap_B = alpha_B * _CAP[bucket]
  kappa = _KAPPA[bucket]

  def penalty(beyond_B, scale):
    huber_B = jnp.where(beyond_B <= kappa, beyond_B**2 / (2 * kappa), beyond_B - kappa / 2)
    return -jnp.minimum(cap_B, scale * huber_B / (margin_B + kappa) * cap_B)

  def bonus(beyond_B, scale):
    return jax.nn.sigmoid(beyond_B / _TEMPERATURE[bucket]) * cap_B * scale

  above_B = jnp.maximum(excess_B - margin_B, 0)
  wrong_score_B = bonus(above_B, _WRONG[bucket])
  if bucket == 0:
    right_score_B = penalty(above_B, 1.0)
  elif bucket == 1:
    right_score_B = penalty(jnp.maximum(jnp.abs(excess_B) - margin_B, 0), 1.0)
  else:
    below_B = jnp.maximum(-excess_B - margin_B, 0)
    right_score_B = jnp.where(excess_B >= -margin_B, bonus(excess_B + margin_B, 1.0),
                              penalty(below_B, 0.5))
  return jnp.where(right_B, right_score_B, wrong_score_B)


@op(static=("rate", "low", "high"))
def track_alpha(alpha_3, mean_3, size_3, target_3, *, rate=0.05, low=0.0, high=2.0):
  """The release's strength update: alpha += rate * (mean - target), the opposite for hard.

  Args:
    alpha_3: strengths so far, 0.5 at the start of a run.
    mean_3, size_3: from `bucket_stats`.
    target_3: N_target; nan where there is none yet.
    rate: strength a token of excess, a Python number > 0.
    low, high: bounds of the strength, Python numbers, low <= high.

  Returns:
    alpha_3: float32; unchanged for an empty bucket or without a target.

  Raises:
    ValueError: not [3], rate <= 0, low > high.

  >>> import numpy as np
  >>> alpha_3, size_3 = np.float32([0.5, 0.5, 0.5]), np.float32([8, 8, 8])
  >>> print(track_alpha(alpha_3, np.float32([6, 3, 6]), size_3, np.float32([4, 4, 4])))
  [0.6  0.45 0.4 ]
  """
  check_three(alpha_3=alpha_3, mean_3=mean_3, size_3=size_3, target_3=target_3)
  if not rate > 0 or not low <= high:
    raise ValueError(f"rate = {rate} must be > 0 and low = {low} <= high = {high}")
  alpha_3 = alpha_3.astype(jnp.float32)
  excess_3 = mean_3.astype(jnp.float32) - target_3.astype(jnp.float32)
  moved_3 = alpha_3 + rate * excess_3 * jnp.array([1.0, 1.0, -1.0])
  known_3 = (size_3 > 0) & jnp.isfinite(excess_3)
  return jnp.where(known_3, jnp.clip(moved_3, low, high), alpha_3)


def _excess(count_B, target_B):
  excess_B = count_B.astype(jnp.float32) - target_B.astype(jnp.float32)
  return jnp.where(jnp.isnan(target_B), 0, excess_B)


def _check_rows(correct_B, count_B, bucket_B, target_B, strength_B):
  _check_shapes(correct_B, count_B, bucket_B, target_B, strength_B)
  if not jnp.issubdtype(bucket_B.dtype, jnp.integer):
    raise ValueError(f"bucket_B has dtype {bucket_B.dtype}; pass int32 from `difficulty`")


def _check_shapes(*arrays):
  shapes = [x.shape for x in arrays]
  if len(set(shapes)) > 1 or len(shapes[0]) != 1:
    raise ValueError(f"shapes {shapes} must all be the same [B]; index bucket values by bucket_B")
