import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import kl_weight, token_kl

BETA_3 = np.float32([1, 2, 4])


def test_estimators_by_hand():
  # d = ln 2: k3 = 2 - ln 2 - 1.
  logprob_BT, ref_logprob_BT = np.zeros((1, 1), np.float32), np.full((1, 1), np.log(2), np.float32)
  for estimator, expected in (
    ("k1", -np.log(2)), ("k2", np.log(2) ** 2 / 2), ("k3", 1 - np.log(2)), ("abs", np.log(2))
  ):
    kl_BT = token_kl(logprob_BT, ref_logprob_BT, estimator=estimator)
    np.testing.assert_allclose(kl_BT, [[expected]], rtol=1e-6)


def test_estimators_match_the_release(release):
  names = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "abs": "abs"}
  for case in release["policy_loss_and_kl"]:
    logprob_BT, ref_logprob_BT = np.float32(case["logp"]), np.float32(case["ref_logp"])
    for estimator, name in names.items():
      kl_BT = token_kl(logprob_BT, ref_logprob_BT, estimator=estimator)
      np.testing.assert_allclose(kl_BT, case["kl"][name], rtol=1e-5, atol=1e-6)


def test_k3_is_clamped_and_keeps_small_values():
  gap_BT = np.float32([[1000, -1000, 5, 1e-3, 0]])
  kl_BT = token_kl(np.zeros_like(gap_BT), gap_BT)
  np.testing.assert_allclose(
    kl_BT, [[10, 10, 10, np.expm1(np.float64(1e-3)) - 1e-3, 0]], rtol=1e-3
  )
  gradient_BT = jax.grad(lambda x: token_kl(x, gap_BT).sum())(np.zeros_like(gap_BT))
  np.testing.assert_allclose(gradient_BT, [[0, 0, 0, -1e-3, 0]], atol=1e-6)


def test_k3_estimates_the_kl_of_two_distributions():
  p_V, q_V = np.float64([0.5, 0.3, 0.2]), np.float64([0.2, 0.5, 0.3])
  kl_V = np.float64(token_kl(np.float32(np.log(p_V)), np.float32(np.log(q_V))))
  np.testing.assert_allclose((p_V * kl_V).sum(), (p_V * np.log(p_V / q_V)).sum(), rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_gradients_match_finite_differences(estimator):
  formula = {
    "k1": lambda d: -d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(d) - d - 1, "abs": np.abs
  }[estimator]
  logprob_T, ref_logprob_T = np.float32([-1, -2, -0.5, -3]), np.float32([-1.2, -1, -0.7, -2.8])
  gradient_T = jax.grad(lambda x: token_kl(x, ref_logprob_T, estimator=estimator).sum())(logprob_T)
  gap_T, step = np.float64(ref_logprob_T) - logprob_T, 1e-6
  expected_T = (formula(gap_T - step) - formula(gap_T + step)) / (2 * step)
  np.testing.assert_allclose(gradient_T, expected_T, atol=1e-6)


def test_weight_is_relaxed_inside_windows_and_0_on_padding_rows():
  cover_BT = np.bool_([[0, 1], [1, 0], [0, 0], [1, 0]])
  weight_BT = kl_weight(np.int32([0, 1, 2, -1]), cover_BT, beta_3=BETA_3, rho=0.5)
  np.testing.assert_allclose(weight_BT, [[1, 0.5], [1, 2], [4, 4], [0, 0]])


def test_tokens_of_a_packed_row_have_buckets_of_their_own():
  weight_BT = kl_weight(np.int32([[0, 2, 2, -1]]), np.bool_([[0, 1, 0, 1]]), beta_3=BETA_3, rho=0.5)
  np.testing.assert_allclose(weight_BT, [[1, 2, 4, 0]])


def test_sharded_over_4_devices_equals_unsharded_and_bfloat16_gives_float32(mesh):
  rng = np.random.default_rng(0)
  logprob_BT, ref_logprob_BT = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=(2, 8, 4)))
  bucket_B, cover_BT = np.int32(rng.integers(0, 3, 8)), rng.random((8, 4)) < 0.5

  @jax.jit
  def loss_BT(logprob_BT, ref_logprob_BT, bucket_B, cover_BT):
    return token_kl(logprob_BT, ref_logprob_BT) * kl_weight(
      bucket_B, cover_BT, beta_3=BETA_3, rho=0.5
    )

  arguments = logprob_BT, ref_logprob_BT, bucket_B, cover_BT
  expected_BT = loss_BT(*arguments)
  assert expected_BT.dtype == jnp.float32
  wide = (x.astype(jnp.float32) for x in arguments[:2])
  np.testing.assert_allclose(loss_BT(*wide, bucket_B, cover_BT), expected_BT, rtol=1e-6)
  sharded_BT = loss_BT(*(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arguments))
  assert sharded_BT.sharding.spec[0] == "data"
  np.testing.assert_allclose(sharded_BT, expected_BT, rtol=1e-6)


COVER = np.zeros((2, 3), bool)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: token_kl(np.zeros((2, 3)), np.zeros((3, 2))), r"ref_logprob \(3, 2\) must have equal"),
    (lambda: token_kl(COVER, np.zeros((2, 3))), "logprob_BT has dtype bool"),
    (lambda: token_kl(np.zeros(2), np.zeros(2), estimator="k4"), "estimator = 'k4' must be one of"),
    (lambda: kl_weight(np.zeros(3, int), COVER, beta_3=BETA_3, rho=0.5), r"bucket \(3,\)"),
    (lambda: kl_weight(np.zeros(2), COVER, beta_3=BETA_3, rho=0.5), "bucket_B is float32"),
    (lambda: kl_weight(np.zeros(2, int), COVER, beta_3=BETA_3[:2], rho=0.5), r"beta \(2,\)"),
    (lambda: kl_weight(np.zeros(2, int), COVER, beta_3=BETA_3, rho=1.5), r"rho = 1.5 must be in"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
