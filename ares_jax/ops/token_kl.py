"""KL to the reference policy, token by token, and its weights (paper eq. 2, section 3.2.2).

B rows, T tokens; `_3` is one value a bucket: 0 easy, 1 medium, 2 hard.
"""

import jax.numpy as jnp

from ares_jax.ops.op import op

_ESTIMATORS = ("k1", "k2", "k3", "abs")


@op(static=("estimator",))
def token_kl(logprob_BT, ref_logprob_BT, *, estimator="k3"):
  """Estimate of KL(policy || reference) from one sampled token; d = ref_logprob - logprob.

  Args:
    logprob_BT, ref_logprob_BT: floating, nats, equal shapes.
    estimator: "k3" e^d - d - 1, with d clamped to +-20 and the value to 10 (release), >= 0;
      "k1" -d, unbiased; "k2" d^2 / 2; "abs" |d|.

  Returns:
    kl_BT: float32, nats. Where k3 is clamped its gradient is 0.

  Raises:
    ValueError: shapes that differ, wrong dtypes, an unknown estimator.

  >>> import numpy as np
  >>> print(token_kl(np.zeros((1, 2), np.float32), np.log(np.float32([[1, 2]]))))   # 2 - ln 2 - 1
  [[0.         0.30685282]]
  """
  if logprob_BT.shape != ref_logprob_BT.shape:
    raise ValueError(f"logprob {logprob_BT.shape} and ref_logprob {ref_logprob_BT.shape} must have "
                     "equal shapes")
  for name, array in (("logprob_BT", logprob_BT), ("ref_logprob_BT", ref_logprob_BT)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {array.dtype}; pass float32 or bfloat16")
  if estimator not in _ESTIMATORS:
    raise ValueError(f"estimator = {estimator!r} must be one of {', '.join(_ESTIMATORS)}")
  gap_BT = ref_logprob_BT.astype(jnp.float32) - logprob_BT.astype(jnp.float32)
  if estimator == "k1":
    return -gap_BT
  if estimator == "k2":
    return jnp.square(gap_BT) / 2
  if estimator == "abs":
    return jnp.abs(gap_BT)
  gap_BT = jnp.clip(gap_BT, -20, 20)
  # expm1: e^d - d - 1 at d = 1e-3 keeps 4 digits in float32, e^d - 1 taken apart keeps 1.
  return jnp.minimum(jnp.expm1(gap_BT) - gap_BT, 10)


@op(static=("rho",))
def kl_weight(bucket_B, cover_BT, *, beta_3, rho):
  """beta[b, t] = beta_d (rho inside high-entropy windows, 1 outside) (paper section 3.2.2).

  Args:
    bucket_B: integer; a row of another bucket (-1 for padding) weighs 0. [B, T] where rows hold
      several sequences.
    cover_BT: bool, from `hwe_cover`.
    beta_3: KL coefficient of each bucket; multiply by kappa_3 to include the controller.
    rho: relaxation inside the windows, a Python number in [0, 1]; 1 for none.

  Returns:
    weight_BT: float32.

  Raises:
    ValueError: shapes that do not fit, wrong dtypes, rho outside [0, 1].

  >>> import numpy as np
  >>> cover_BT, beta_3 = np.bool_([[0, 1]]), np.float32([1, 2, 4])
  >>> print(kl_weight(np.int32([1]), cover_BT, beta_3=beta_3, rho=0.5))
  [[2. 1.]]
  """
  shapes = cover_BT.shape[:1], cover_BT.shape
  if cover_BT.ndim != 2 or bucket_B.shape not in shapes or beta_3.shape != (3,):
    raise ValueError(f"bucket {bucket_B.shape}, cover {cover_BT.shape}, beta {beta_3.shape}: pass "
                     "[B] or [B, T], [B, T], [3]")
  if not jnp.issubdtype(bucket_B.dtype, jnp.integer) or cover_BT.dtype != jnp.bool_:
    raise ValueError(f"bucket_B is {bucket_B.dtype}, cover_BT {cover_BT.dtype}; pass int32 and "
                     "bool")
  if not 0 <= rho <= 1:
    raise ValueError(f"rho = {rho} must be in [0, 1]; 1 for no relaxation")
  bucket_BT = bucket_B.reshape(len(cover_BT), -1)  # of a token, or [B, 1] of a row
  member_BT3 = bucket_BT[:, :, None] == jnp.arange(3)[None, None]
  beta_BT = jnp.where(member_BT3, beta_3.astype(jnp.float32)[None, None], 0).sum(2)
  return beta_BT * jnp.where(cover_BT, jnp.float32(rho), 1)
