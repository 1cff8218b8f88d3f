"""Programs for described TPU slices, made without a TPU: attention compiled, the 7B model lowered.

`bench/compile_7b.py` compiles the whole model; that takes minutes.
"""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from bench import compile_7b
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax.models import paged
from ares_jax.models.attention import attention
from ares_jax.models.config import SIZE_7B

pytestmark = pytest.mark.slow

pytest.importorskip("libtpu", reason="needs `pip install libtpu`")
TOKENS, WINDOWS = 20480, 384
SIDES = TOKENS, WINDOWS * SIZE_7B.vision.window_patches  # of the squares that must not exist


@pytest.mark.parametrize("config, part, model, shared", [
  (SIZE_7B, "decoder", 1, False), (SIZE_7B, "decoder", 4, False), (SIZE_7B, "decoder", 8, False),
  (SIZE_7B, "vision", 2, False), (SIZE_7B, "decoder", 1, True), (SIZE_7B, "decoder", 8, True)
], ids=["7b", "7b split 4", "7b split 8 by tokens", "vision split 2", "7b, shared prompts",
        "7b split 8 by tokens, shared prompts"])
def test_attention_of_long_rows_compiles_for_8_chips_in_a_gibibyte(config, part, model, shared):
  mesh = compile_7b.tpu_mesh("v5e:2x4", model)
  size, tokens = (config, SIDES[0]) if part == "decoder" else (config.vision, SIDES[1])
  kv_heads = size.kv_heads if part == "decoder" else size.heads
  rows = 8 // model
  split = lambda heads: "model" if heads % model == 0 else None  # noqa: E731
  array = lambda heads: jax.ShapeDtypeStruct(  # noqa: E731
    (rows, tokens, heads, size.head_dim), jnp.bfloat16,
    sharding=NamedSharding(mesh, P("data", None, split(heads))))
  segment = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=NamedSharding(mesh, P("data")))

  def total(q, k, v, segment, prompt):
    return attention(q, k, v, segment_BT=segment, prompt_BT=prompt,
                     causal=part == "decoder").astype(jnp.float32).sum()

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(
      array(size.heads), array(kv_heads), array(kv_heads), segment,
      segment if shared else None).compile()
  # bfloat16 scores of one head would be 0.8 GiB, and a chip has 2 heads or more.
  assert program.memory_analysis().temp_size_in_bytes < 2**30
  text = program.as_text()
  assert all(f"splash_mha_{kernel}_segmented" in text for kernel in ("fwd", "dq", "dkv"))


# 1, 2 and 4 kv heads a chip.
@pytest.mark.parametrize("topology, model, dtype", [
  ("v5e:2x4", 4, "bfloat16"), ("v5e:2x4", 2, "bfloat16"), ("v5e:2x4", 2, "int8"),
  ("v6e:2x4", 4, "bfloat16"), ("v5p:2x2x1", 1, "bfloat16"), ("v5p:2x2x1", 1, "int8")])
def test_paged_attention_of_7b_compiles_in_place(topology, model, dtype):
  rows, entries, pages, tokens = 512, 320, 100, 64  # tables of 640 KiB: two calls
  mesh = compile_7b.tpu_mesh(topology, model)

  def array(dtype, shape, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

  held = array(dtype, (SIZE_7B.kv_heads, SIZE_7B.layers * pages, tokens, 128), "model")
  row = array(jnp.int32, (rows,))
  scale = array(jnp.float32, (rows, SIZE_7B.kv_heads, 128))
  reads = paged.Reads(
    table=array(jnp.int32, (rows, entries)), length=row, active=array(bool, (rows,)), own=None,
    prompt_length=row, prompts=array(jnp.int32, (16, 64)), prompts_length=array(jnp.int32, (16,)),
    query=row, group=8, prompt_tokens=4096, live=16384,
    scales=paged.Scales(scale, scale) if dtype == "int8" else None)
  new = array(jnp.bfloat16, (rows, SIZE_7B.kv_heads, 128), None, "model")
  q = array(jnp.bfloat16, (rows, SIZE_7B.kv_heads, 7, 128), None, "model")

  def layers(pages, q, new, reads):
    def layer(index, carry):
      q, pages = carry
      pages = paged.write_token(pages, reads, index * 100, new, new)
      return paged.attend(q, pages, reads, index * 100).astype(q.dtype), pages

    return jax.lax.fori_loop(0, SIZE_7B.layers, layer, (q, pages))

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = jax.jit(layers, donate_argnums=0).lower(
      paged.Pages(held, held), q, new, reads).compile()
  memory = program.memory_analysis()
  width = jnp.dtype(dtype).itemsize
  assert memory.alias_size_in_bytes == 2 * width * 28 * 100 * 64 * 128 * 4 // model
  # Gathered pages of all rows would be 2.5 GiB a kv head.
  assert memory.temp_size_in_bytes < 2**27


def test_7b_gradient_of_packed_rows_holds_each_kernel_once_a_pass_and_no_scores():
  mesh = compile_7b.tpu_mesh("v5e:8x8", 1)
  text = compile_7b.gradient(SIZE_7B, mesh, 64, TOKENS, WINDOWS).as_text()
  kernels = collections.Counter(re.findall(r'kernel_name = "splash_mha_([a-z]+)', text))
  # The decoder's loop and the vision tower's: forward, again for the backward pass, backward.
  assert kernels == {"fwd": 4, "dq": 2, "dkv": 2}
  for side in SIDES:
    assert re.search(rf"x{side}x", text)
    assert not re.search(rf"tensor<[\dx]*x{side}x{side}x", text)
