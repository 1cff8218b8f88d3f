import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import difficulty
from ares_jax.ops.difficulty import bucket_of


def answers(number, group):
  """One group with `number` correct answers."""
  return np.float32(np.arange(group) < number)


def test_buckets_of_8_rollouts():
  correct_B = np.concatenate([answers(number, 8) for number in range(9)])
  bucket_PG = np.asarray(difficulty(correct_B, group=8)).reshape(9, 8)
  assert bucket_PG[:, 0].tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0]
  assert bucket_PG.dtype == np.int32 and np.all(bucket_PG == bucket_PG[:, :1])


@pytest.mark.parametrize(
  "group,expected",
  [(1, [2, 0]), (2, [2, 1, 0]), (3, [2, 2, 1, 0]), (4, [2, 2, 1, 0, 0]),
   (16, [2] * 6 + [1] * 6 + [0] * 5)],
)
def test_other_group_sizes_use_the_same_fractions(group, expected):
  correct_B = np.concatenate([answers(number, group) for number in range(group + 1)])
  assert difficulty(correct_B, group=group)[::group].tolist() == expected


def test_thresholds_that_floats_cannot_hold_are_reached():
  # 0.56 * 25 = 14.000000000000002 in float64, and 1/3 is no float: who reaches them counts.
  assert difficulty(answers(14, 25), group=25, easy=0.56)[0] == 0
  assert difficulty(answers(1, 3), group=3, medium=1 / 3)[0] == 1
  tenths_B = np.float32([4, 7, 5, 10, 4, 7, 10, 6, 7, 10, 7, 10, 9, 8, 9, 7]) / 10  # 12 in all
  assert difficulty(tenths_B, group=16)[0] == 0


@pytest.mark.parametrize("module", [np, jnp])
def test_counts_become_buckets_without_their_answers(module):
  right_P = module.array([8, 6, 5, 3, 2, 0])
  bucket_P = bucket_of(right_P, samples=8, easy=0.75, medium=0.375)
  assert bucket_P.tolist() == [0, 0, 1, 1, 2, 2] and bucket_P.dtype == np.int32
  assert bucket_of(module.array([14, 13]), samples=25, easy=0.56, medium=0).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [bool, np.int32, jnp.bfloat16])
def test_any_dtype_counts_exactly(dtype):
  # 257 ones are 256 in bfloat16: counts are summed in float32.
  correct_B = jnp.asarray(answers(257, 512), dtype)
  assert difficulty(correct_B, group=512, easy=257 / 512)[0] == 0


def test_permuting_prompts_permutes_buckets_and_sharded_equals_unsharded(mesh):
  correct_PG = np.random.default_rng(0).random((8, 8)) < np.linspace(0, 1, 8)[:, None]
  bucket_PG = np.asarray(difficulty(correct_PG.reshape(-1), group=8)).reshape(8, 8)
  order = np.random.default_rng(1).permutation(8)
  moved_B = difficulty(correct_PG[order].reshape(-1), group=8)
  np.testing.assert_array_equal(np.reshape(moved_B, (8, 8)), bucket_PG[order])
  sharded_B = jax.device_put(correct_PG.reshape(-1), NamedSharding(mesh, P("data")))
  np.testing.assert_array_equal(difficulty(sharded_B, group=8), bucket_PG.reshape(-1))


@pytest.mark.parametrize(
  "correct_B,kwargs,message",
  [
    (np.zeros(12), dict(group=8), "12 rows do not divide into groups of 8"),
    (np.zeros(8), dict(group=0), "groups of 0"),
    (np.zeros((2, 4)), dict(group=4), r"shape \(2, 4\); pass \[B\]"),
    (np.zeros(8), dict(group=8, easy=0.3), "medium = 0.375, easy = 0.3"),
    (np.zeros(8), dict(group=8, easy=75), "easy = 75"),
  ],
)
def test_wrong_arguments(correct_B, kwargs, message):
  with pytest.raises(ValueError, match=message):
    difficulty(correct_B.astype(np.float32), **kwargs)
