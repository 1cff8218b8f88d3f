import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models.random_folder import SMALL

from ares_jax.models import qwen25_vl, weights
from ares_jax.plan.jaxpr_cost import traced_flops
from ares_jax.system import mesh

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8 * 8 * 8  # FLOPs of the product of two squares


def count(function, *arguments, platform="cpu"):
  return traced_flops(jax.jit(function).trace(*arguments).jaxpr, platform=platform)


def test_a_product_is_two_flops_a_multiply_add():
  left, right = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 2, 3), (5, 3, 4)))
  assert count(lambda a, b: a @ b + 1, left, right) == 2 * 5 * 2 * 3 * 4


def test_loops_count_as_often_as_they_run():
  def scanned(x):
    return jax.lax.scan(lambda x, _: (jax.lax.scan(
      lambda x, _: (x @ x, None), x, length=3)[0], None), x, length=5)[0]

  assert count(scanned, SQUARE) == 15 * ONE
  assert count(lambda x: jax.lax.fori_loop(2, 9, lambda _, x: x @ x, x), SQUARE) == 7 * ONE


def test_a_loop_that_may_end_early_counts_to_its_bound():
  def until(x):
    return jax.lax.while_loop(lambda c: (c[0] < 11) & (c[1].sum() > 0),
                              lambda c: (c[0] + 1, c[1] @ c[1]), (jnp.int32(0), x))

  assert count(until, SQUARE) == 11 * ONE
  with pytest.raises(ValueError, match="has no visible bound"):
    count(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x), SQUARE)


def test_loops_under_vmap_count_to_their_bound():
  def until(end, x):
    return jax.lax.while_loop(lambda c: (c[0] < 3) & (c[0] < end),
                              lambda c: (c[0] + 1, c[1] @ c[1]), (jnp.int32(0), x))

  ends = jax.ShapeDtypeStruct((5,), jnp.int32)
  assert count(jax.vmap(until, (0, None)), ends, SQUARE) == 5 * 3 * ONE


def test_a_part_of_a_constant_is_the_one_that_is_taken():
  def of_part(x):
    heavy = jax.lax.dynamic_slice(jnp.array([True, False]), (1,), (1,)).reshape(())
    return jax.lax.cond(heavy, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert count(of_part, SQUARE) == ONE


def test_layers_that_differ_by_a_constant_count_by_their_own_branch():
  heavy = np.array([False, True, False, False])

  def layers(x):
    def layer(x, is_heavy):
      return jax.lax.cond(is_heavy, lambda x: x @ x @ x, lambda x: x @ x, x), None

    return jax.lax.scan(layer, x, heavy)[0].sum()

  assert count(layers, SQUARE) == 5 * ONE
  # Backward each product is two, whichever branch; forward they stay.
  assert count(jax.grad(layers), SQUARE) == 3 * 5 * ONE


def test_of_a_choice_that_is_not_known_the_larger_counts():
  choice = jax.ShapeDtypeStruct((), bool)
  assert count(lambda on, x: jax.lax.cond(on, lambda x: x @ x @ x, lambda x: x @ x, x), choice,
               SQUARE) == 2 * ONE


def test_the_branch_of_the_platform_counts():
  def of_platform(x):
    return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x @ x)

  assert count(of_platform, SQUARE, platform="tpu") == ONE
  assert count(of_platform, SQUARE) == 2 * ONE


def test_every_device_counts_its_own_part():
  with jax.set_mesh(mesh.make_mesh(2, 2)):
    split = jax.shard_map(lambda a, b: a @ b, in_specs=(P("data"), P()), out_specs=P("data"))
    # Rows are split over 2 of the 4 devices: the other 2 do the same again.
    assert count(split, SQUARE, SQUARE) == 2 * ONE


# On 4 devices, which 2 heads do not divide over, each has an early and a late chunk of 256 queries.
@pytest.mark.parametrize("devices", [1, 4])
def test_a_causal_kernel_counts_the_blocks_it_works_on(devices):
  from ares_jax.models.attention import SPLASH_BLOCK, attention

  blocks, heads, size = 4, 2, 128
  tokens = blocks * SPLASH_BLOCK
  x = jax.ShapeDtypeStruct((1, tokens, heads, size), jnp.bfloat16)
  segment = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

  def total(q, k, v, segment):
    return attention(q, k, v, segment_BT=segment, causal=True).sum()

  with jax.set_mesh(mesh.make_mesh(1, devices, jax.devices()[:devices])):
    forward = count(total, x, x, x, segment, platform="tpu")
    backward = count(jax.grad(total, (0, 1, 2)), x, x, x, segment, platform="tpu")
  product = 2 * heads * tokens**2 * size * (blocks + 1) / (2 * blocks)
  assert forward == 2 * product
  # The scores again in both kernels: dq from 3 products, dk and dv from 4; and o by do.
  assert backward == 9 * product + 2 * heads * tokens * size


def test_a_paged_kernel_whose_lengths_are_unknown_counts_nothing():
  from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

  pages, lengths, tables = jnp.ones((1, 40, 64, 128), jnp.bfloat16), jnp.ones(4, int), (4, 8)
  assert count(lambda q: paged_attention(
    q, pages, pages, lengths, jnp.zeros(tables, int), pages_per_compute_block=8) @ jnp.ones(
      (128, 3)), jnp.ones((4, 7, 128)), platform="tpu") == 2 * 4 * 7 * 128 * 3


@pytest.mark.slow
def test_a_model_in_a_scan_counts_like_one_without_and_like_xla():
  size = dataclasses.replace(
    SMALL, embed=128, layers=3, heads=2, kv_heads=1, mlp=512, vocab=256,
    vision=dataclasses.replace(SMALL.vision, out=128))
  params = jax.eval_shape(
    lambda key: weights.init(weights.weight_table(size), key), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

  def loss(size, params, tokens):
    embeds = qwen25_vl.embed(size, params, tokens, None, None)
    positions = jnp.broadcast_to(jnp.arange(64), (3, 2, 64))
    states = qwen25_vl.hidden(size, params, embeds, positions, jnp.ones((2, 64), jnp.int32))
    return (states @ qwen25_vl.unembedding(size, params).T).mean()

  def trace(**changes):
    return jax.jit(jax.grad(loss, 1), static_argnums=0).trace(
      dataclasses.replace(size, **changes), params, tokens)

  kept, unrolled, again = (traced_flops(trace(**changes).jaxpr, platform="cpu") for changes in (
    {}, {"unroll": 3}, {"remat": "block"}))
  assert kept == unrolled
  block = 2 * 128 * size.embed * (size.head_dim * 2 * (2 + 1) + 3 * size.mlp)
  # Each quarter of 64 queries meets the keys up to its own end, 5/8 of the square; two products.
  scores = 2 * 2 * 2 * 2 * 64**2 * 5 / 8 * size.head_dim
  head = 2 * 128 * size.embed * size.vocab
  assert kept == 3 * (3 * (block + scores) + head)
  # Computed again but for the last product, which no gradient needs.
  assert again == kept + 3 * (block + scores - 2 * 128 * size.embed * size.mlp)
  # XLA counts what is not a product too: here 2% more.
  theirs = trace(unroll=3).lower().compile().cost_analysis()["flops"]
  assert kept < theirs < 1.05 * kept
