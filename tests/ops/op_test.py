import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax import difficulty, hwe_multiplier, kl_weight, ops, window_entropy


def test_lists_are_arrays():
  assert difficulty([1, 1, 0, 1], group=2).tolist() == [0, 0, 1, 1]
  mean_BT, _ = window_entropy([[1.0, 3.0]], [[True, True]], window=2)
  assert mean_BT.tolist() == [[2, 0]]
  weight_BT = kl_weight([0], [[True, False]], beta_3=(2.0, 1.0, 1.0), rho=0.5)
  assert weight_BT.tolist() == [[1, 2]]


def test_lists_of_the_wrong_shape_are_a_value_error():
  with pytest.raises(ValueError, match=r"mean_3 has shape \(2,\)"):
    hwe_multiplier([1.0, 2.0], [1.0] * 3, [1.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("group", [np.int64(2), np.array(2), jnp.int32(2)])
def test_scalars_of_numpy_and_jax_are_settings(group):
  assert difficulty(np.float32([1, 1, 0, 0]), group=group).tolist() == [0, 0, 2, 2]


def test_a_setting_that_is_traced_or_an_array_says_so():
  weigh = jax.jit(lambda rho: kl_weight([0], [[True]], beta_3=[1.0, 1.0, 1.0], rho=rho))
  with pytest.raises(ValueError, match="rho = .* must be a Python number"):
    weigh(0.5)
  with pytest.raises(ValueError, match="group = .* must be a Python number"):
    difficulty([1, 1], group=np.array([1, 2]))


@pytest.mark.parametrize(
  "name", ["difficulty", "entropy_reward", "token_entropy", "token_kl", "window_entropy"])
def test_names_shared_with_a_module_are_the_function(name):
  names = {}
  exec(f"import ares_jax.ops.{name} as shared", names)
  assert names["shared"] is getattr(ops, name)
