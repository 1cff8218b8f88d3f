import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from models import golden_batch, paging

from ares_jax.models import paged, weights
from ares_jax.models.decoder import decode_step, hidden, prefill
from ares_jax.system import mesh as mesh_lib

CONFIG = golden_batch.config("tied")
PARAMS = weights.init(weights.weight_table(CONFIG), jax.random.key(0))
RNG = np.random.default_rng(0)
B, T = 3, 12
EMBEDS = RNG.normal(size=(B, T, CONFIG.embed)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (3, B, T))
ONES = np.ones((B, T), np.int32)
HIDDEN = jax.jit(hidden, static_argnums=0)


STEP = jax.jit(decode_step, static_argnums=0)


def test_prefill_and_single_steps_equal_one_pass_over_the_sequence():
  length = np.int32([4, 1, 7])
  whole = HIDDEN(CONFIG, PARAMS, EMBEDS, POSITIONS, ONES)
  states, k, v = jax.jit(prefill, static_argnums=0)(
    CONFIG, PARAMS, EMBEDS[:, :7], POSITIONS[:, :, :7], length)
  np.testing.assert_allclose(states, whole[np.arange(B), length - 1], atol=1e-5)
  # Four slots, two rows a prompt: the slots' order is free, and one of them has no row.
  place = np.int32([4, 6, 1, 2])
  pages, table_PM, table_BM = paging.lay_out(CONFIG, k, v, length, [2, -1, 0, 1], 5)
  rows = np.minimum(place // 2, 2)
  for count in range(5):
    at = length[rows] + count
    states, pages = STEP(
      CONFIG, PARAMS, EMBEDS[rows, at][:, None], np.broadcast_to(at[None, :, None], (3, 4, 1)),
      pages, paging.reads(table_PM, table_BM, length, place, count, group=2, prompt_tokens=7,
                          live=5))
    np.testing.assert_allclose(states[place < 6], whole[rows, at][place < 6], atol=1e-5)


def test_pages_of_others_are_not_read_and_not_written():
  length = np.int32([4, 1, 7])
  _, k, v = jax.jit(prefill, static_argnums=0)(
    CONFIG, PARAMS, EMBEDS[:, :7], POSITIONS[:, :, :7], length)
  pages, table_PM, table_BM = paging.lay_out(CONFIG, k, v, length, [0, 1, -1], 2)
  read = paging.reads(table_PM, table_BM, length, np.int32([0, 1, 3]), 0, group=1, prompt_tokens=7,
                      live=2)
  total = pages.k.shape[1] // CONFIG.layers
  held = np.unique(np.concatenate([table_PM.ravel(), table_BM.ravel()]))
  other = np.setdiff1d(np.arange(total), held)
  assert len(other) > 3
  other = np.concatenate([other + total * layer for layer in range(CONFIG.layers)])
  spoilt = paged.Pages(*(x.at[:, other].set(77) for x in (pages.k, pages.v)))
  inputs = EMBEDS[:, 7:8], POSITIONS[:, :, 7:8]
  (got, after), (want, _) = (STEP(CONFIG, PARAMS, *inputs, x, read) for x in (spoilt, pages))
  np.testing.assert_array_equal(got[:2], want[:2])
  assert (after.k[:, other] == 77).all()
  # Every layer wrote one token of two rows; the idle one wrote nothing.
  changed = (after.k != spoilt.k).any((0, 3)).sum()
  assert changed == 2 * CONFIG.layers


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_loop_of_steps_never_copies_the_pages(unroll):
  config = dataclasses.replace(CONFIG, unroll=unroll)
  total, width = 29, 6
  shape = f"{config.kv_heads},{config.layers * total},{paging.A},{config.head_dim}"

  @functools.partial(jax.jit, donate_argnums=1)
  def run(params, pages, read):
    def body(carry):
      count, states, pages = carry
      states, pages = decode_step(
        config, params, states[:, None], jnp.broadcast_to(read.length[:, None], (3, 4, 1)), pages,
        read.replace(length=read.length + count))
      return count + 1, states, pages

    start = 0, jnp.ones((4, config.embed)), pages
    return jax.lax.while_loop(lambda carry: carry[0] < 9, body, start)

  like = jax.ShapeDtypeStruct(tuple(map(int, shape.split(","))), jnp.float32)
  read = paging.reads(np.zeros((2, 2), np.int32), np.zeros((4, width), np.int32), np.int32([5, 7]),
                      np.arange(4), 0, group=2, prompt_tokens=7, live=12)
  text = run.lower(PARAMS, paged.Pages(like, like), read).compile().as_text()
  assert re.search(rf"f32\[{shape}\]", text)
  assert not re.findall(rf"= f32\[{shape}\]\S* copy\(.*", text)


@functools.partial(jax.jit, static_argnums=0)
def gradient(config, params):
  return jax.grad(lambda params: jnp.sum(jnp.sin(
    hidden(config, params, EMBEDS[:, :2], POSITIONS[:, :, :2], ONES[:, :2]))))(params)


@pytest.mark.parametrize("change", [{"remat": "block"}, {"remat": "dots"}, {"unroll": 2}])
@pytest.mark.slow
def test_remat_and_unroll_change_no_gradient(change):
  want = gradient(CONFIG, PARAMS)
  got = gradient(dataclasses.replace(CONFIG, **change), PARAMS)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), got, want)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_features_of_deepstack_are_not_kept_once_a_block(remat):
  config = dataclasses.replace(golden_batch.config("qwen3_vl"), remat=remat, layers=5)
  params = jax.eval_shape(
    functools.partial(weights.init, weights.weight_table(config)), jax.random.key(0))
  text = str(jax.make_jaxpr(jax.grad(lambda params, embeds: hidden(
    config, params, embeds, POSITIONS, ONES).sum(), argnums=(0, 1)))(
      params, np.zeros((B, T, 3 * config.embed), np.float32)))
  assert f"f32[2,{B},{T},{config.embed}]" in text and f"f32[5,2,{B},{T}" not in text


@pytest.mark.slow
def test_between_blocks_a_rows_tokens_are_split_over_the_model_axis():
  config = dataclasses.replace(golden_batch.config("untied"), remat="block")
  mesh = mesh_lib.make_mesh(2, 2)
  with jax.set_mesh(mesh):
    def array(dtype, shape, *spec):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding(*spec))

    text = jax.jit(jax.grad(lambda *arrays: hidden(config, *arrays).sum())).lower(
      weights.abstract(weights.weight_table(config), mesh, jnp.float32),
      array(jnp.float32, (2, T, config.embed), "data"),
      array(jnp.int32, (3, 2, T), None, "data"), array(jnp.int32, (2, T), "data"),
    ).compile().as_text()
  # What every block keeps for the backward pass, of one of two rows: half of its tokens.
  assert f"f32[{config.layers},1,{T // 2},{config.embed}]" in text
  assert f"f32[{config.layers},1,{T},{config.embed}]" not in text


def test_a_prefill_leaves_a_rows_tokens_together():
  config = golden_batch.config("untied")
  params = jax.eval_shape(
    functools.partial(weights.init, weights.weight_table(config)), jax.random.key(0))
  embeds, positions, ints, length = (jax.ShapeDtypeStruct(*array) for array in (
    ((2, T, config.embed), jnp.float32), ((3, 2, T), jnp.int32), ((2, T), jnp.int32),
    ((2,), jnp.int32)))
  with jax.set_mesh(mesh_lib.make_mesh(2, 2)):
    whole = str(jax.make_jaxpr(functools.partial(prefill, config))(
      params, embeds, positions, length))
    split = str(jax.make_jaxpr(functools.partial(hidden, config))(
      params, embeds, positions, ints))
  assert "sharding_constraint" in split and "sharding_constraint" not in whole


def matmul_flops(jaxpr):
  """Multiply-adds of every matmul of a program, bodies of loops times their length."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contract, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contract)
    for inner in jex.jaxprs_in_params(equation.params):
      total += matmul_flops(inner) * equation.params.get("length", 1)
  return total


def test_every_matmul_runs_once_per_needed_pass():
  def total(config, params, embeds):
    return jnp.sum(hidden(config, params, embeds, POSITIONS, ONES))

  def flops(remat, differentiate):
    function = functools.partial(total, dataclasses.replace(CONFIG, remat=remat))
    function = jax.grad(function, argnums=(0, 1)) if differentiate else function
    return matmul_flops(jax.make_jaxpr(function)(PARAMS, EMBEDS).jaxpr)

  blocks = PARAMS["blocks"]
  matrices = sum(blocks[name].size for name in ("q", "k", "v", "o", "gate", "up", "down")) * B * T
  # Queries 0-2, 3-5, 6-8, 9-11 against 3, 6, 9, 12 keys, scores and values.
  mixing = 2 * CONFIG.layers * B * CONFIG.heads * CONFIG.head_dim * 3 * (3 + 6 + 9 + 12)
  assert flops("none", False) == matrices + mixing
  assert flops("none", True) == 3 * (matrices + mixing)
  # The backward pass of a block repeats its forward pass, without the last matmul, whose result
  # only the next block needs.
  last = blocks["down"].size * B * T
  assert flops("block", True) == 4 * (matrices + mixing) - last
  assert flops("dots", True) == 3 * matrices + 4 * mixing
