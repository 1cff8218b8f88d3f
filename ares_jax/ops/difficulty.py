"""Difficulty of a prompt from the answers to it (paper section 3.2.2, eq. 9 and 10).

B = P*G rows, row b = p*G + g. Buckets are int32: 0 easy, 1 medium, 2 hard.
"""

import jax.numpy as jnp

from ares_jax.ops.op import op

BUCKETS = ("easy", "medium", "hard")


@op(static=("group", "easy", "medium"))
def difficulty(correct_B, *, group, easy=0.75, medium=0.375):
  """Bucket of every row from the pass rate of its group (paper eq. 9, 10).

  Args:
    correct_B: bool or number, 0 or 1, or an accuracy in between.
    group: G, rollouts a prompt, an integer; divides B.
    easy, medium: Python numbers, lowest pass rates of the easy and the medium bucket,
      0 <= medium <= easy <= 1; of 8 rollouts 6 correct are easy, 3 medium, 2 hard.

  Returns:
    bucket_B: int32, equal within a group.

  Raises:
    ValueError: not [B], B not divisible by group, fractions out of order.

  >>> import numpy as np
  >>> print(difficulty(np.float32([1, 1, 1, 1, 0, 1, 0, 0]), group=2))
  [0 0 0 0 1 1 2 2]
  """
  if correct_B.ndim != 1:
    raise ValueError(f"correct_B has shape {correct_B.shape}; pass [B], one value a row")
  if not isinstance(group, int) or group < 1 or correct_B.shape[0] % group:
    raise ValueError(f"{correct_B.shape[0]} rows do not divide into groups of {group!r}; pass "
                     "whole groups")
  if not 0 <= medium <= easy <= 1:
    raise ValueError(f"medium = {medium}, easy = {easy}: need 0 <= medium <= easy <= 1")
  right_P = correct_B.astype(jnp.float32).reshape(-1, group).sum(1)
  return jnp.repeat(bucket_of(right_P, samples=group, easy=easy, medium=medium), group)


def bucket_of(right_P, *, samples, easy, medium):
  """int32 [P]: buckets of prompts with `right_P` correct answers of `samples`; numpy or jax.

  Of accuracies between 0 and 1, right_P is their sum.
  """
  # Count answers, do not divide: 3 of 8 must reach 0.375 however a division rounds. Accuracies
  # between 0 and 1 round too: 16 tenths in float32 whose sum is 12 add up to 11.999999.
  easy_count, medium_count = (easy - 1e-5) * samples, (medium - 1e-5) * samples
  return (right_P < easy_count).astype("int32") + (right_P < medium_count)
