"""Targets and multipliers of the entropy budget (paper section 3.2.2, lambda_d).

B rows; `_3` is one value a bucket: 0 easy, 1 medium, 2 hard. A row of any other bucket (-1 for
padding) belongs to none.
"""

import jax.numpy as jnp

from ares_jax.ops.op import check_three, op


@op
def bucket_stats(count_B, bucket_B):
  """Mean and population variance of a count in each bucket (E and Var of N_HE, section 3.2.2).

  Args:
    count_B: number, e.g. flagged tokens of a row.
    bucket_B: integer.

  Returns:
    mean_3, var_3: float32; 0 where empty, var 0 for a single row.
    size_3: float32, rows in the bucket.

  Raises:
    ValueError: not two [B], buckets not integer.

  >>> import numpy as np
  >>> mean_3, var_3, size_3 = bucket_stats(np.float32([2, 4, 9]), np.int32([0, 0, 2]))
  >>> print(mean_3, var_3, size_3)
  [3. 0. 9.] [1. 0. 0.] [2. 0. 1.]
  """
  if count_B.ndim != 1 or bucket_B.shape != count_B.shape:
    raise ValueError(f"count {count_B.shape}, bucket {bucket_B.shape}: pass two [B]")
  if not jnp.issubdtype(bucket_B.dtype, jnp.integer):
    raise ValueError(f"bucket_B has dtype {bucket_B.dtype}; pass int32 from `difficulty`")
  count_B1 = count_B.astype(jnp.float32)[:, None]
  member_B3 = bucket_B[:, None] == jnp.arange(3)[None]
  size_3 = member_B3.sum(0).astype(jnp.float32)
  mean_3 = jnp.where(member_B3, count_B1, 0).sum(0) / jnp.maximum(size_3, 1)
  square_B3 = jnp.square(count_B1 - mean_3[None])
  var_3 = jnp.where(member_B3, square_B3, 0).sum(0) / jnp.maximum(size_3, 1)
  return mean_3, var_3, size_3


@op(static=("rule", "var_floor", "eps"))
def hwe_multiplier(mean_3, var_3, size_3, target_3, *, rule="signed", var_floor=1.0, eps=1e-6):
  """lambda_d = max(0, violation) / (max(var, var_floor) + eps), closed form (section 3.2.2).

  The violation is mean - target for easy, |mean - target| for medium, target - mean for hard,
  whose constraint is a floor. Targets must come from earlier batches: with this batch's mean
  every multiplier is 0. Without a floor counts that hardly vary give multipliers of 1e6.

  Args:
    mean_3, var_3, size_3: from `bucket_stats`.
    target_3: N_target; nan where there is none yet.
    rule: "signed" as above; "literal": mean - target for all three, as printed.
    var_floor: least variance, counts squared, a Python number >= 0; 0 is the paper's.
    eps: a Python number > 0, added to the variance.

  Returns:
    multiplier_3: float32, >= 0, finite; 0 for an empty bucket or without a target. To keep an
      empty bucket's last value: `track_target(old_3, multiplier_3, size_3, decay=0.0)`.

  Raises:
    ValueError: not [3], an unknown rule, var_floor < 0, eps <= 0.

  >>> import numpy as np
  >>> mean_3, var_3, size_3 = np.float32([5, 5, 5]), np.float32([2, 2, 2]), np.float32([8, 8, 8])
  >>> print(hwe_multiplier(mean_3, var_3, size_3, np.float32([4, 7, 4])).round(3))
  [0.5 1.  0. ]
  """
  check_three(mean_3=mean_3, var_3=var_3, size_3=size_3, target_3=target_3)
  if rule not in ("signed", "literal"):
    raise ValueError(f'rule = {rule!r} must be "signed" or "literal"')
  if var_floor < 0 or eps <= 0:
    raise ValueError(f"var_floor = {var_floor} must be >= 0 and eps = {eps} > 0")
  excess_3 = mean_3.astype(jnp.float32) - target_3.astype(jnp.float32)
  if rule == "signed":
    excess_3 = jnp.stack([excess_3[0], jnp.abs(excess_3[1]), -excess_3[2]])
  known_3 = (size_3 > 0) & jnp.isfinite(excess_3)
  violation_3 = jnp.where(known_3, jnp.maximum(excess_3, 0), 0)
  return violation_3 / (jnp.maximum(var_3.astype(jnp.float32), var_floor) + eps)


@op(static=("decay",))
def track_target(target_3, mean_3, size_3, *, decay):
  """Moving average of a batch statistic: target <- decay * target + (1 - decay) * mean.

  Serves the targets N_target (section 3.2.2), and scalars such as the entropy threshold, with
  `size_3` the number of rows that had a value.

  Args:
    target_3: the average so far; nan is seeded by the first value.
    mean_3, size_3: this batch; empty (size 0) or not finite leaves the average unchanged.
    decay: a Python number in [0, 1]; 0 keeps the latest value, 1 the first.

  Returns:
    target_3: float32.

  Raises:
    ValueError: shapes that differ, decay outside [0, 1].

  >>> import numpy as np
  >>> target_3, mean_3 = np.float32([np.nan, 4, 4]), np.float32([8, 8, 0])
  >>> size_3 = np.int32([2, 2, 0])
  >>> print(track_target(target_3, mean_3, size_3, decay=0.75))
  [8. 5. 4.]
  """
  target_3, mean_3, size_3 = (jnp.asarray(x) for x in (target_3, mean_3, size_3))
  if target_3.shape != mean_3.shape or size_3.shape != mean_3.shape:
    raise ValueError(f"target {target_3.shape}, mean {mean_3.shape}, size {size_3.shape}: pass "
                     "equal shapes")
  if not 0 <= decay <= 1:
    raise ValueError(f"decay = {decay} must be in [0, 1]")
  target_3, mean_3 = target_3.astype(jnp.float32), mean_3.astype(jnp.float32)
  moved_3 = jnp.where(jnp.isnan(target_3), mean_3, decay * target_3 + (1 - decay) * mean_3)
  return jnp.where((size_3 > 0) & jnp.isfinite(mean_3), moved_3, target_3)
