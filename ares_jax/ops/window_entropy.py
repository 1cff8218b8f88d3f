"""Window entropy, its threshold, and the tokens it flags (paper section 3.2.1, appendix H).

B rows, T tokens. Column t is about token t; everything outside the mask is ignored, even nan.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from ares_jax.ops.op import op


@op(static=("window",))
def window_entropy(entropy_BT, mask_BT, *, window):
  """Mean entropy of the `window` tokens that start at each position (paper eq. 4).

  Measured at B = 64, T = 16384 with entropies of 0 to 12 nats against float64: off by at most
  1.2e-6 nats for window 4, 1.6e-6 for 8, 2.6e-6 for 32.

  Args:
    entropy_BT: floating, nats.
    mask_BT: bool, True on response tokens.
    window: tokens in a window, >= 1 (4 in the recipe).

  Returns:
    mean_BT: float32, nats; 0 where the window would leave the response.
    whole_BT: bool, True where the window lies inside the response.

  Raises:
    ValueError: other shapes or dtypes, window < 1.

  >>> import numpy as np
  >>> entropy_BT, mask_BT = np.float32([[1, 2, 3, 9]]), np.bool_([[1, 1, 1, 0]])
  >>> mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=2)
  >>> print(mean_BT, whole_BT)
  [[1.5 2.5 0.  0. ]] [[ True  True False False]]
  """
  _check_rows(entropy_BT, mask_BT)
  _check_window(window)
  # reduce_window, not a difference of cumsums: that is off by 4e-3 nats at T = 16384, and one nan
  # outside the response would spoil the rest of the row.
  sum_BT = _slide(entropy_BT.astype(jnp.float32), 0.0, lax.add, (0, window - 1), window)
  whole_BT = _slide(mask_BT.astype(jnp.int32), 0, lax.add, (0, window - 1), window) == window
  return jnp.where(whole_BT, sum_BT / window, 0), whole_BT


@op(static=("quantile", "reduce"))
def entropy_threshold(value_BT, mask_BT, *, quantile=0.95, reduce="mean"):
  """tau: a quantile of each row, reduced over the rows (paper section 3.2.1).

  Pass window means (with their `whole_BT`) to match the release, token entropies (with the response
  mask) to match the paper's text, which windows almost never reach.

  Args:
    value_BT: floating, nats.
    mask_BT: bool, True on the values that count.
    quantile: a Python number in [0, 1], linear between order statistics as numpy's default.
    reduce: "mean" or "median" over the rows that have a value.

  Returns:
    threshold: float32 scalar, nats; 0 when no row has a value. `hwe_flags` would flag every whole
      window at 0: keep the last threshold then, as `track_target` does where `size` is 0.
    quantile_B: float32, nats; 0 for a row without values.

  Raises:
    ValueError: other shapes or dtypes, quantile outside [0, 1], an unknown `reduce`.

  >>> import numpy as np
  >>> value_BT = np.float32([[0, 1, 2, 3, 4], [6, 8, 0, 0, 0]])
  >>> mask_BT = np.bool_([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
  >>> threshold, quantile_B = entropy_threshold(value_BT, mask_BT, quantile=0.5)
  >>> print(threshold, quantile_B)
  4.5 [2. 7.]
  """
  _check_rows(value_BT, mask_BT)
  if not 0 <= quantile <= 1:
    raise ValueError(f"quantile = {quantile} must be in [0, 1]; 0.95 means the top 5%")
  if reduce not in ("mean", "median"):
    raise ValueError(f'reduce = {reduce!r} must be "mean" or "median"')
  quantile_B = _quantile(value_BT, mask_BT, quantile)
  known_B = mask_BT.any(-1)
  if reduce == "mean":
    threshold = jnp.where(known_B, quantile_B, 0).sum() / jnp.maximum(known_B.sum(), 1)
  else:
    threshold = _quantile(quantile_B[None], known_B[None], 0.5)[0]
  return threshold, quantile_B


@op(static=("window", "detector"))
def hwe_flags(entropy_BT, mask_BT, threshold, *, window, detector="window", semantic_BT=None):
  """Tokens of high window entropy; their number in a row is N_HE (paper algorithm 1, app. H).

  Args:
    entropy_BT: floating, nats.
    mask_BT: bool, True on response tokens.
    threshold: tau in nats, a scalar or one value a row.
    window: tokens in a window, >= 1. "semantic" looks at single tokens and ignores it.
    detector: "window": the window that starts here is complete, and its mean >= tau (algorithm 1);
      "semantic": this token's entropy >= tau and it is a trigger word (appendix H);
      "trigger": it is a trigger word and the complete window after it has mean >= tau (release).
    semantic_BT: bool, True on trigger words; "window" ignores it, the others need it.

  Returns:
    flag_BT: bool.

  Raises:
    ValueError: other shapes or dtypes, window < 1, an unknown detector, no semantic_BT.

  >>> import numpy as np
  >>> entropy_BT, mask_BT = np.float32([[0, 2, 2, 0]]), np.ones((1, 4), bool)
  >>> print(hwe_flags(entropy_BT, mask_BT, np.float32(1), window=2))
  [[ True  True  True False]]
  """
  _check_rows(entropy_BT, mask_BT)
  _check_window(window)
  threshold = jnp.asarray(threshold, jnp.float32)
  if threshold.shape not in ((), entropy_BT.shape[:1]):
    raise ValueError(f"threshold has shape {threshold.shape}; pass a scalar or one value for each "
                     f"of the {entropy_BT.shape[0]} rows")
  threshold = jnp.broadcast_to(threshold, entropy_BT.shape[:1])[:, None]
  if detector == "window":
    mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=window)
    return whole_BT & (mean_BT >= threshold)
  if detector not in ("semantic", "trigger"):
    raise ValueError(f'detector = {detector!r} must be "window", "semantic" or "trigger"')
  if semantic_BT is None:
    raise ValueError(f"detector = {detector!r} needs semantic_BT, True on trigger words")
  if semantic_BT.shape != entropy_BT.shape or semantic_BT.dtype != jnp.bool_:
    raise ValueError(f"semantic_BT is {semantic_BT.dtype}{semantic_BT.shape}; pass "
                     f"bool{entropy_BT.shape}")
  if detector == "semantic":
    return mask_BT & semantic_BT & (entropy_BT.astype(jnp.float32) >= threshold)
  mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=window)
  next_BT = jnp.pad(mean_BT[:, 1:], ((0, 0), (0, 1)))
  next_whole_BT = jnp.pad(whole_BT[:, 1:], ((0, 0), (0, 1)))
  return mask_BT & semantic_BT & next_whole_BT & (next_BT >= threshold)


@op(static=("window",))
def hwe_cover(flag_BT, mask_BT, *, window):
  """Tokens inside flagged windows: t..t+window-1 of each flag (paper section 3.2.2, W_HE).

  Args:
    flag_BT: bool, from `hwe_flags`.
    mask_BT: bool, True on response tokens.
    window: tokens covered from a flag on, >= 1; 1 covers the flagged token alone.

  Returns:
    cover_BT: bool, never outside the mask.

  Raises:
    ValueError: other shapes or dtypes, window < 1.

  >>> import numpy as np
  >>> flag_BT, mask_BT = np.bool_([[0, 1, 0, 0, 0]]), np.ones((1, 5), bool)
  >>> print(hwe_cover(flag_BT, mask_BT, window=3))
  [[False  True  True  True False]]
  """
  _check_window(window)
  for name, array in (("flag_BT", flag_BT), ("mask_BT", mask_BT)):
    if array.ndim != 2 or array.shape != mask_BT.shape or array.dtype != jnp.bool_:
      raise ValueError(f"{name} is {array.dtype}{array.shape}; pass bool[B, T] like the other")
  return mask_BT & _slide(flag_BT, False, lax.bitwise_or, (window - 1, 0), window)


def hwe_starts(flag_BT, *, detector):
  """bool [B, T]: where the windows of `flag_BT` start: at the flag, behind it with "trigger"."""
  return jnp.pad(flag_BT[:, :-1], ((0, 0), (1, 0))) if detector == "trigger" else flag_BT


def _slide(value_BT, start, combine, padding, window):
  return lax.reduce_window(value_BT, np.array(start, value_BT.dtype), combine, (1, window), (1, 1),
                           ((0, 0), padding))


def _quantile(value_BT, mask_BT, quantile):
  """Linear quantile of the masked values of each row; 0 for a row without any."""
  if value_BT.shape[1] == 0:
    return jnp.zeros(value_BT.shape[0], jnp.float32)
  sorted_BT = jnp.sort(jnp.where(mask_BT, value_BT.astype(jnp.float32), jnp.inf))
  count_B = mask_BT.sum(-1)
  # Ranks in float64, for every possible count: in float32 they are off by 4e-4 at 16,384 values,
  # and from one rank to the next entropies may jump by nats.
  rank_T = np.arange(value_BT.shape[1]) * quantile
  below_T = rank_T.astype(np.int32)
  last_B = jnp.maximum(count_B - 1, 0)
  low_B, fraction_B = jnp.asarray(below_T)[last_B], jnp.float32(rank_T - below_T)[last_B]
  low_value_B, high_value_B = (jnp.take_along_axis(sorted_BT, index_B[:, None], -1)[:, 0]
                               for index_B in (low_B, jnp.minimum(low_B + 1, last_B)))
  value_B = low_value_B + fraction_B * (high_value_B - low_value_B)
  return jnp.where(count_B > 0, value_B, 0)


def _check_rows(value_BT, mask_BT):
  if value_BT.ndim != 2 or not jnp.issubdtype(value_BT.dtype, jnp.floating):
    raise ValueError(f"values are {value_BT.dtype}{value_BT.shape}; pass floating [B, T]")
  if mask_BT.shape != value_BT.shape or mask_BT.dtype != jnp.bool_:
    raise ValueError(f"mask_BT is {mask_BT.dtype}{mask_BT.shape}; pass bool{value_BT.shape}, e.g. "
                     "mask > 0")


def _check_window(window):
  if not isinstance(window, int) or window < 1:
    raise ValueError(f"window = {window!r} must be an integer >= 1; the recipe uses 4")
