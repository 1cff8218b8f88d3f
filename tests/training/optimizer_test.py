import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ares_jax.system import mesh as mesh_lib
from ares_jax.training import optimizer

CONFIG = optimizer.OptimizerConfig(
  learning_rate=0.1, schedule="constant", warmup_steps=0, final_fraction=0.1,
  b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=math.inf, moments="float32",
)  # fmt: skip


def change(**fields):
  return dataclasses.replace(CONFIG, **fields)


def stage(config=CONFIG, frozen=()):
  """The part of a stage's config that its optimizer reads."""
  return types.SimpleNamespace(optimizer=config, frozen=frozen)


def params():
  return {"w": jnp.float32([1.0, -2.0]), "b": jnp.float32([0.5])}


def grads(scale=1.0):
  return {"w": scale * jnp.float32([0.3, -0.4]), "b": scale * jnp.float32([0.0])}


@pytest.mark.parametrize(
  "step, expected",
  [(0, 0.025), (1, 0.05), (3, 0.1), (4, 0.1), (9, 0.055), (14, 0.01), (99, 0.01)],
)
def test_warms_up_then_follows_half_a_cosine(step, expected):
  config = change(schedule="cosine", warmup_steps=4)
  np.testing.assert_allclose(optimizer.learning_rate(config, step, 14), expected, rtol=1e-6)


def test_constant_stays_and_a_run_shorter_than_the_warmup_is_finite():
  np.testing.assert_allclose(optimizer.learning_rate(CONFIG, 1000, 10), 0.1, rtol=1e-6)
  config = change(schedule="cosine", warmup_steps=8)
  np.testing.assert_allclose(optimizer.learning_rate(config, 3, 4), 0.05, rtol=1e-6)


def test_step_and_total_are_traced():
  traces = []

  @jax.jit
  def rate(step, total):
    traces.append(1)
    return optimizer.learning_rate(change(schedule="cosine"), step, total)

  assert float(rate(0, 10)) == pytest.approx(0.1) and float(rate(5, 10)) == pytest.approx(0.055)
  assert float(rate(5, 5)) == pytest.approx(0.01) and len(traces) == 1


def test_the_first_step_moves_by_the_rate_against_the_sign_of_the_gradient():
  tx = optimizer.make_optimizer(CONFIG)
  new, _, metrics = optimizer.apply_update(tx, grads(), tx.init(params()), params(), 0.1)
  # Adam's first update is g / (|g| + eps).
  np.testing.assert_allclose(new["w"], [0.9, -1.9], rtol=1e-5)
  np.testing.assert_array_equal(new["b"], [0.5])
  assert float(metrics["grad_norm"]) == pytest.approx(0.5) and float(metrics["skipped"]) == 0


def test_decay_is_decoupled():
  tx = optimizer.make_optimizer(change(weight_decay=0.01))
  new, _, _ = optimizer.apply_update(tx, grads(0.0), tx.init(params()), params(), 0.1)
  np.testing.assert_allclose(new["w"], [1.0 * (1 - 0.001), -2.0 * (1 - 0.001)], rtol=1e-6)
  np.testing.assert_allclose(new["b"], [0.5 * (1 - 0.001)], rtol=1e-6)


def test_clips_the_global_norm_and_reports_it_before():
  tx = optimizer.make_optimizer(change(clip=1.0, eps=1.0))
  new, _, metrics = optimizer.apply_update(tx, grads(10.0), tx.init(params()), params(), 1.0)
  # Norm 5 becomes 1: gradient (.6, -.8), first Adam step g / (|g| + 1).
  np.testing.assert_allclose(new["w"], [1 - 0.6 / 1.6, -2 + 0.8 / 1.8], rtol=1e-5)
  assert float(metrics["grad_norm"]) == pytest.approx(5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
  tx = optimizer.make_optimizer(change(clip=1.0, weight_decay=0.1))
  state, start = tx.init(params()), params()
  start, state, _ = optimizer.apply_update(tx, grads(), state, start, 0.1)
  broken = {"w": jnp.float32([0.1, bad]), "b": jnp.float32([0.2])}
  step = jax.jit(lambda *args: optimizer.apply_update(tx, *args))
  for _ in range(5):
    after, after_state, metrics = step(broken, state, start, 0.1)
    assert float(metrics["skipped"]) == 1
    for old, new in zip(
      jax.tree.leaves((start, state)), jax.tree.leaves((after, after_state)), strict=True
    ):
      np.testing.assert_array_equal(old, new)


def test_frozen_leaves_have_no_moments_and_no_part_in_the_clipping():
  tx = optimizer.make_optimizer(change(clip=1.0, weight_decay=0.1), trained={"w": True, "b": False})
  state = tx.init(params())
  assert sorted(x.shape for x in jax.tree.leaves(state)) == [(), (2,), (2,)]
  huge = grads(1.0) | {"b": jnp.float32([1e6])}
  new, _, _ = optimizer.apply_update(tx, huge, state, params(), 0.1)
  np.testing.assert_array_equal(new["b"], [0.5])
  np.testing.assert_allclose(new["w"], [1 - 0.1 - 0.01, -2 + 0.1 + 0.02], rtol=1e-5)


def test_bfloat16_gradients_are_taken_bfloat16_params_refused():
  tx = optimizer.make_optimizer(CONFIG)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads())
  new, state, _ = optimizer.apply_update(tx, half, tx.init(params()), params(), 0.1)
  assert {x.dtype for x in jax.tree.leaves((new, state))} == {np.dtype("f4"), np.dtype("i4")}
  low = {"w": params()["w"].astype(jnp.bfloat16), "b": params()["b"]}
  with pytest.raises(ValueError, match=r"params\['w'\] is bfloat16"):
    optimizer.apply_update(tx, grads(), tx.init(low), low, 0.1)


@pytest.mark.parametrize("trained", [None, {"w": True, "b": False}])
def test_moments_are_sharded_like_their_parameters(trained):
  tx = optimizer.make_optimizer(change(clip=1.0, weight_decay=0.1), trained=trained)
  mesh = mesh_lib.make_mesh(2, 2)
  values = {"w": jnp.ones((4, 2)), "b": jnp.ones((3,))}
  specs = {"w": PartitionSpec("data", "model"), "b": PartitionSpec()}
  shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  state = optimizer.init_opt_state(tx, jax.device_put(values, shardings))
  moments = [x for x in jax.tree.leaves(state) if x.shape == (4, 2)]
  assert len(moments) == 2
  assert all(x.sharding.is_equivalent_to(shardings["w"], 2) for x in moments)
  others = [x for x in jax.tree.leaves(state) if x.shape != (4, 2)]
  assert others and all(x.is_fully_replicated for x in others)


def test_start_places_the_state_beside_the_params_and_freezes_parts():
  mesh = mesh_lib.make_mesh(4, 1)
  split, replicated = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
  values = {
    "text": jax.device_put(jnp.ones((8, 2)), split),
    "vision": {"w": jax.device_put(jnp.ones((3,)), replicated)},
  }
  tx = optimizer.stage_optimizer(stage(frozen=("vision",)), values)
  state = optimizer.init_opt_state(tx, values)
  assert sorted(x.shape for x in jax.tree.leaves(state)) == [(), (8, 2), (8, 2)]
  assert all(x.sharding.is_equivalent_to(split if x.ndim else replicated, x.ndim)
             for x in jax.tree.leaves(state))
  step = jax.jit(lambda *args: optimizer.apply_update(tx, *args))
  new, _, _ = step(values, state, values, 0.1)
  np.testing.assert_allclose(new["text"], 0.9, rtol=1e-5)
  np.testing.assert_array_equal(new["vision"]["w"], 1.0)
  with pytest.raises(ValueError, match=r"frozen .*'vison'"):
    optimizer.stage_optimizer(stage(frozen=("vison",)), values)
  state = optimizer.init_opt_state(optimizer.stage_optimizer(stage(), params()), params())
  assert len(jax.tree.leaves(state)) == 5


def run_moments(moments, matrix, gradients):
  """(weights after updates of rate 0.1, bytes of the state) with one kind of moments."""
  tx = optimizer.make_optimizer(change(moments=moments, b2=0.9))
  values = {"w": jnp.asarray(matrix)}
  state = tx.init(values)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  update = jax.jit(lambda *args: optimizer.apply_update(tx, *args))
  for gradient in gradients:
    values, state, metrics = update({"w": jnp.asarray(gradient)}, state, values, 0.1)
    assert float(metrics["skipped"]) == 0
  broken, broken_state, metrics = update({"w": jnp.full(matrix.shape, jnp.nan)}, state, values, 0.1)
  assert float(metrics["skipped"]) == 1
  jax.tree.map(np.testing.assert_array_equal, (broken, broken_state), (values, state))
  return np.asarray(values["w"]), size


def test_smaller_moments_keep_their_arithmetic_and_leave_a_broken_gradient_alone():
  rng = np.random.default_rng(0)
  matrix = np.float32(rng.standard_normal((128, 256)))
  # Of rank 1 in size, where rows and columns say all about the squares.
  size = np.outer(rng.uniform(0.5, 2, 128), rng.uniform(0.5, 2, 256))
  gradients = [np.float32(size * rng.choice([-1, 1], matrix.shape)) for _ in range(3)]
  exact, full = run_moments("float32", matrix, gradients)
  first, three_quarters = run_moments("bfloat16", matrix, gradients)
  factored, quarter = run_moments("factored", matrix, gradients)
  count = matrix.size
  assert (full, three_quarters) == (8 * count + 4, 6 * count + 4)
  assert quarter == 2 * count + 4 * (128 + 256) + 12  # two counts, and an empty leaf
  assert np.abs(exact - matrix).max() > 0.1
  np.testing.assert_allclose(first, exact, atol=2e-3)  # of steps of 0.1: 8 bits
  assert np.abs(first - exact).max() > 0
  # By hand: the update over its root mean square, averaged and made up for its start at 0.
  mean, expected = 0, matrix
  for step, gradient in enumerate(gradients):
    mean = 0.9 * mean + 0.1 * gradient / size
    expected = expected - 0.1 * mean / (1 - 0.9 ** (step + 1))
  np.testing.assert_allclose(factored, expected, atol=2e-3)


def test_factors_are_replicated_and_the_rest_of_the_state_is_split():
  mesh = mesh_lib.make_mesh(2, 2)
  split = NamedSharding(mesh, PartitionSpec("data", "model"))
  values = {"w": jax.device_put(jnp.ones((128, 256)), split)}
  tx = optimizer.stage_optimizer(stage(change(moments="factored")), values)
  with jax.set_mesh(mesh):
    state = optimizer.init_opt_state(tx, values)
    specs = {"w": PartitionSpec("data", "model")}
    _, after = jax.jit(lambda *args: optimizer.keep_layout(tx, *args, specs))(values, state)
  for leaf in (*jax.tree.leaves(state), *jax.tree.leaves(after)):
    if leaf.shape == (128, 256):
      assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_equivalent_to(split, 2)
    else:
      assert leaf.is_fully_replicated
  assert sorted(x.shape for x in jax.tree.leaves(state)) == sorted(
    x.shape for x in jax.tree.leaves(after))


@pytest.mark.parametrize(
  "fields",
  [
    dict(learning_rate=-1.0), dict(learning_rate=math.inf), dict(warmup_steps=-1),
    dict(final_fraction=1.5), dict(b1=1.0), dict(b2=-0.1), dict(eps=0.0),
    dict(weight_decay=-0.1), dict(clip=0.0),
  ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(fields):
  with pytest.raises(ValueError, match=f"^{next(iter(fields))} is "):
    change(**fields)
