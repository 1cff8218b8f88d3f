"""The KL coefficient kappa of each bucket (paper algorithm 1 lines 23-24, eq. 27).

B rows, T tokens; `_3` is one value a bucket: 0 easy, 1 medium, 2 hard.
"""

import jax.numpy as jnp

from ares_jax.ops.op import check_three, op


@op
def control_kl(kl_BT, mask_BT, cover_BT, bucket_B):
  """KL_ctrl(d): mean KL over a bucket's tokens outside high-entropy windows (algorithm 1).

  Args:
    kl_BT: floating, nats, from `token_kl`.
    mask_BT: bool, True on response tokens.
    cover_BT: bool, from `hwe_cover`.
    bucket_B: integer; a row of another bucket (-1 for padding) does not count. [B, T] where rows
      hold several sequences.

  Returns:
    kl_3: float32, nats; 0 where there is no such token.
    size_3: float32, number of such tokens.

  Raises:
    ValueError: shapes that do not fit, wrong dtypes.

  >>> import numpy as np
  >>> kl_BT, mask_BT = np.float32([[1, 3, 50, 9]]), np.bool_([[1, 1, 1, 0]])
  >>> kl_3, size_3 = control_kl(kl_BT, mask_BT, np.bool_([[0, 0, 1, 0]]), np.int32([1]))
  >>> print(kl_3, size_3)
  [0. 2. 0.] [0. 2. 0.]
  """
  if kl_BT.ndim != 2 or mask_BT.shape != kl_BT.shape or cover_BT.shape != kl_BT.shape:
    raise ValueError(f"kl {kl_BT.shape}, mask {mask_BT.shape}, cover {cover_BT.shape}: pass three "
                     "[B, T]")
  fits = bucket_B.shape in (kl_BT.shape[:1], kl_BT.shape)
  if not fits or not jnp.issubdtype(bucket_B.dtype, jnp.integer):
    raise ValueError(f"bucket_B is {bucket_B.dtype}{bucket_B.shape}; pass int32[B] or [B, T]")
  if mask_BT.dtype != jnp.bool_ or cover_BT.dtype != jnp.bool_:
    raise ValueError(f"mask is {mask_BT.dtype}, cover {cover_BT.dtype}; pass bool, e.g. mask > 0")
  bucket_BT = bucket_B.reshape(len(kl_BT), -1)  # of a token, or [B, 1] of a row
  member_BT3 = bucket_BT[:, :, None] == jnp.arange(3)[None, None]
  member_BT3 &= (mask_BT & ~cover_BT)[:, :, None]
  # Rows first: one sum of 64M float32 terms would lose digits, 4096 sums of 16384 do not.
  sum_3 = jnp.where(member_BT3, kl_BT.astype(jnp.float32)[:, :, None], 0).sum(1).sum(0)
  size_3 = member_BT3.sum(1).astype(jnp.float32).sum(0)
  return sum_3 / jnp.maximum(size_3, 1), size_3


@op(static=("rate", "low", "high"))
def track_kl_coefficient(kappa_3, kl_3, size_3, *, target_3, rate, low, high):
  """kappa <- clip(kappa (1 + rate (KL / target - 1)), low, high) (algorithm 1 line 24, eq. 27).

  Once an iteration. A bucket without tokens, or whose KL is not finite, keeps its kappa.

  Args:
    kappa_3: coefficients so far, > 0.
    kl_3, size_3: from `control_kl`.
    target_3: delta_d, wanted KL, nats, > 0.
    rate: a Python number in (0, 1), so that kappa stays positive.
    low, high: bounds of kappa, Python numbers, 0 < low <= high.

  Returns:
    kappa_3: float32.

  Raises:
    ValueError: not [3], rate outside (0, 1), bounds out of order.

  >>> import numpy as np
  >>> kappa_3, target_3 = np.ones(3, np.float32), np.full(3, 0.1, np.float32)
  >>> kl_3, size_3 = np.float32([0.2, 0.1, 9]), np.float32([5, 5, 0])
  >>> print(track_kl_coefficient(
  ...   kappa_3, kl_3, size_3, target_3=target_3, rate=0.1, low=0.1, high=10.0))
  [1.1 1.  1. ]
  """
  check_three(kappa_3=kappa_3, kl_3=kl_3, size_3=size_3, target_3=target_3)
  if not 0 < rate < 1 or not 0 < low <= high:
    raise ValueError(f"rate = {rate} must be in (0, 1) and 0 < low = {low} <= high = {high}")
  kappa_3, kl_3 = kappa_3.astype(jnp.float32), kl_3.astype(jnp.float32)
  moved_3 = kappa_3 * (1 + rate * (kl_3 / target_3.astype(jnp.float32) - 1))
  moved_3 = jnp.clip(moved_3, low, high)
  return jnp.where((size_3 > 0) & jnp.isfinite(kl_3), moved_3, kappa_3)
