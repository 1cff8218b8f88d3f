import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from models import described_gpu

from ares_jax.models import attention as attention_lib
from ares_jax.models import codes
from ares_jax.models.attention import attention
from ares_jax.system import mesh as mesh_lib

RNG = np.random.default_rng(0)


def naive(q, k, v, segment, causal):
  """One row at a time, one query at a time."""
  out = np.zeros(q.shape, np.float64)
  for b, t, n in np.ndindex(*q.shape[:3]):
    kv = n // (q.shape[2] // k.shape[2])
    keys = [s for s in range(k.shape[1])
            if segment[b, s] == segment[b, t] and (s <= t or not causal)]
    score = np.array([q[b, t, n] @ k[b, s, kv] for s in keys]) / q.shape[3]**0.5
    weight = np.exp(score - score.max())
    out[b, t, n] = weight @ v[b, keys, kv] / weight.sum()
  return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, heads, kv_heads", [(1, 2, 2), (3, 4, 2), (7, 3, 1)])
def test_attention_equals_one_query_at_a_time(causal, length, heads, kv_heads):
  q = RNG.normal(size=(2, length, heads, 4)).astype(np.float32)
  k, v = RNG.normal(size=(2, 2, length, kv_heads, 4)).astype(np.float32)
  segment = np.sort(RNG.integers(1, 3, (2, length))).astype(np.int32)
  got = attention(q, k, v, segment_BT=segment, causal=causal)
  np.testing.assert_allclose(got, naive(q, k, v, segment, causal), atol=1e-5)


def test_a_changed_value_reaches_later_tokens_of_its_own_segment_only():
  q, k, v = RNG.normal(size=(3, 1, 9, 2, 4)).astype(np.float32)
  segment = np.int32([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  changed = v.copy()
  changed[0, 4] += 1
  first, second = (np.asarray(attention(q, k, x, segment_BT=segment, causal=True))
                   for x in (v, changed))
  np.testing.assert_array_equal(np.any(first != second, axis=(0, 2, 3)),
                                [0, 0, 0, 0, 1, 1, 1, 0, 0])


def test_padding_yields_finite_gradients():
  q, k, v = RNG.normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
  allowed = np.tril(np.ones((1, 6, 6), bool)) & (np.arange(6) < 2)[:, None]  # the rest see no key

  def total(q, k, v):
    return attention_lib._attend(q, k, v, allowed).sum()

  assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v))


def packed(rows, tokens, heads, kv_heads, head_dim):
  """q, k, v and segments of packed rows: three sequences, then padding."""
  rng = np.random.default_rng(tokens)
  q, k, v = (rng.normal(size=(rows, tokens, n, head_dim)).astype(np.float32)
             for n in (heads, kv_heads, kv_heads))
  cuts = np.sort(rng.integers(1, tokens, (rows, 3)), axis=1)
  segment = (np.arange(tokens)[:, None] >= cuts[:, None]).sum(-1) + 1
  return q, k, v, np.where(segment == 4, 0, segment).astype(np.int32)


def shared(rows, tokens, heads, kv_heads, head_dim):
  """`packed`, with the segments of prompts: those of three and two answers, one alone, padding.

  Padding stands before answers too, for they begin at multiples of `step_of(tokens)`.
  """
  case = packed(rows, tokens, heads, kv_heads, head_dim)[:3]
  segment, prompt = np.zeros((2, rows, tokens), np.int32)
  rng, step = np.random.default_rng(tokens), codes.step_of(tokens)
  for row in range(rows):
    start = number = 0
    for answers in (3, 2, 0):
      of = number + 1
      for length in rng.integers(2, tokens // 9, 1 + answers):
        number, end = number + 1, start + length
        segment[row, start:end], prompt[row, start:end] = number, of
        start = -(-end // step) * step
  return *case, segment, prompt


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(function, causal, q, k, v, segment, *prompt):
  """The output on tokens that are not padding, and the gradients of a weighted sum of it."""
  def masked(q, k, v):
    out = function(q, k, v, segment, *prompt, causal=causal)
    return jnp.where(segment[:, :, None, None] > 0, out, 0)

  out, pull = jax.vjp(masked, q, k, v)
  return out, *pull(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


def dense(q, k, v, segment, *, causal):
  return attention_lib._dense(q, k, v, segment, None, causal=causal)


def splash(q, k, v, segment, *, causal):
  return attention_lib._splash(q, k, v, segment, segment, None, causal=causal)


def by_definition(q, k, v, segment, prompt, *, causal):
  index = jnp.arange(q.shape[1])
  allowed = (segment[:, None] == segment[:, :, None]) | (segment[:, None] == prompt[:, :, None])
  return attention_lib._attend(q, k, v, allowed & (index[:, None] >= index))


def whole(q, k, v, segment, prompt, *, causal):
  return attention(q, k, v, segment_BT=segment, prompt_BT=prompt, causal=causal)


def shared_splash(q, k, v, segment, prompt, *, causal):
  return attention_lib._splash(q, k, v, prompt, prompt, codes.codes(segment, prompt), causal=causal,
                               tokens=q.shape[1])


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels as plain XLA, with blocks so small that a row has several."""
  real = pl.pallas_call
  monkeypatch.setattr(pl, "pallas_call", lambda *a, **k: real(*a, **k | {"interpret": True}))
  monkeypatch.setattr(attention_lib, "SPLASH_BLOCK", 128)


# Whole blocks and padded ones; the decoder's and the vision tower's head sizes.
@pytest.mark.parametrize("kernel", [splash, attention_lib._triton])
@pytest.mark.parametrize("causal, tokens, kv_heads, head_dim",
                         [(True, 256, 2, 128), (True, 300, 1, 16), (False, 300, 4, 80)])
def test_kernels_equal_plain_attention_of_packed_rows(kernel, causal, tokens, kv_heads, head_dim,
                                                      interpreted):
  case = packed(2, tokens, 4, kv_heads, head_dim)
  got = results(kernel, causal, *case)
  for value, want in zip(got, results(dense, causal, *case), strict=True):
    assert value.dtype == want.dtype
    np.testing.assert_allclose(value, want, atol=2e-5)


# Plain attention whole and in bands, and the kernel; steps of 1, 2 and 4 tokens.
@pytest.mark.parametrize("function, tokens", [(whole, 60), (whole, 256), (whole, 600),
                                              (shared_splash, 256), (shared_splash, 600)])
def test_answers_read_the_prompt_that_they_share_and_themselves(function, tokens, interpreted):
  case = shared(2, tokens, 4, 2, 16)
  got = results(function, True, *case)
  for value, want in zip(got, results(by_definition, True, *case), strict=True):
    np.testing.assert_allclose(value, want, atol=2e-5)


@pytest.mark.parametrize("tokens", [3, 255, 256, 257, 20480, 65536, 65537, 262144])
def test_codes_say_where_prompt_and_answer_are_in_rows_of_any_length(tokens):
  # A prompt of one token, an answer up to the last step, and an answer there.
  step, index = codes.step_of(tokens), np.arange(tokens)
  begin = (tokens - 1) // step * step
  segment = np.where(index == 0, 1, np.where(index < begin, 2, 3)).astype(np.int32)[None]
  last = codes.codes(segment, np.ones_like(segment))[0, -1]
  read = np.asarray(codes.reads(tokens)(last, index))
  np.testing.assert_array_equal(read, (index < step) | (index >= begin))
  assert step <= max(1, tokens / 128) or tokens > 65536


@pytest.mark.slow
def test_near_keys_are_enough_for_short_segments_and_all_are_there_for_long_ones():
  # Blocks of 32: sequences that end within 2 blocks of keys, within 4, and beyond, and no block of
  # only padding. A row decides for both.
  lengths = [(20, 30, 40, 60, 90, 10), (250, 6)]
  segment = np.stack([np.repeat(np.arange(1, len(row) + 1), row).tolist() + [0] * (256 - sum(row))
                      for row in lengths]).astype(np.int32)
  q, k, v, _ = packed(2, 256, 4, 2, 8)
  for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
    case = q[rows], k[rows], v[rows], segment[rows]
    got = results(lambda *args, causal: attention_lib._banded(*args, None), True, *case)
    for value, want in zip(got, results(dense, True, *case), strict=True):
      np.testing.assert_allclose(value, want, atol=2e-5)


def kernels_for(platform, tokens, *, share=False):
  """Names of the kernels in the program of the gradient, lowered on this host for `platform`."""
  def total(q, k, v, segment):
    return attention(q, k, v, segment_BT=segment, causal=True,
                     prompt_BT=segment if share else None).sum()

  q, k, v, segment = packed(2, tokens, 4, 2, 64)
  program = jax.jit(jax.grad(total, (0, 1, 2)))
  with described_gpu.one_device(platform):
    module = export.export(program, platforms=[platform], disabled_checks=[
      export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")])(q, k, v, segment)
  return set(re.findall(r"(splash_mha_[a-z]+|mha_[a-z]+)[_a-z]*\b", module.mlir_module()))


@pytest.mark.parametrize("platform, kernels", [
  ("tpu", {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}),
  ("cuda", {"mha_forward", "mha_backward", "mha_preprocess"}),
  ("rocm", set()),
  ("cpu", set())])
def test_the_platform_of_the_lowering_chooses_the_kernel(platform, kernels):
  assert kernels_for(platform, 384) == kernels


def test_shared_prompts_take_the_kernel_of_a_tpu_but_not_that_for_triton():
  assert kernels_for("tpu", 384, share=True) == {f"splash_mha_{name}" for name in (
    "fwd", "dq", "dkv")}
  assert kernels_for("cuda", 384, share=True) == set()


def test_short_rows_need_no_kernel():
  assert kernels_for("tpu", attention_lib.KERNEL_TOKENS - 1) == set()


def over_mesh(data, model, heads, kv_heads, rows=8, tokens=attention_lib.KERNEL_TOKENS,
              causal=True, make=packed):
  """Largest difference of attention over a mesh from one device: output and three gradients."""
  case = make(rows, tokens, heads, kv_heads, 8)

  def split(q, k, v, segment, prompt=None, *, causal):
    return attention(q, k, v, segment_BT=segment, prompt_BT=prompt,
                     causal=causal)

  want = results(dense if make is packed else by_definition, causal, *case)
  with jax.set_mesh(mesh_lib.make_mesh(data, model, jax.devices()[:data * model])):
    got = jax.block_until_ready(results(split, causal, *mesh_lib.put(case, "data")))
  return max(float(np.abs(x - np.asarray(y)).max()) for x, y in zip(got, want, strict=True))


# Kv heads that divide over "model", one for two devices, and three query heads a device that
# belong to two of them.
@pytest.mark.slow
@pytest.mark.parametrize("data, model, heads, kv_heads",
                         [(2, 1, 4, 2), (2, 2, 4, 2), (1, 4, 8, 2), (1, 4, 12, 3)])
def test_over_2_and_4_devices_equals_one(data, model, heads, kv_heads):
  assert over_mesh(data, model, heads, kv_heads) < 1e-5


@pytest.mark.parametrize("data, model, heads, kv_heads, tokens, causal, make", [
  (2, 2, 3, 1, 256, True, packed), (1, 4, 6, 2, 301, True, packed),
  (1, 4, 3, 3, 301, False, packed), (1, 4, 3, 1, 301, True, shared)])
def test_heads_that_do_not_divide_have_a_rows_tokens_split(data, model, heads, kv_heads, tokens,
                                                           causal, make):
  assert over_mesh(data, model, heads, kv_heads, 2, tokens, causal, make) < 1e-5


@pytest.mark.slow
def test_heads_are_split_where_answers_share_prompts():
  assert over_mesh(2, 2, 4, 2, 2, make=shared) < 1e-5


def test_a_device_has_its_part_of_the_queries_and_gathers_keys():
  def split(q, k, v, segment):
    return attention(q, k, v, segment_BT=segment, causal=True)

  with jax.set_mesh(mesh_lib.make_mesh(2, 2)):
    program = str(jax.make_jaxpr(split)(*packed(2, 256, 3, 1, 8)))
  assert "f32[1,128,3,8]" in program
  assert program.count("all_gather[") == 2


# Chunks of 75 queries are padded to whole blocks; 3 heads for Triton are 4 with one of padding.
@pytest.mark.parametrize("kernel, causal, make", [
  ("tpu", True, packed), ("tpu", False, packed), ("tpu", True, shared), ("cuda", True, packed),
  ("cuda", False, packed)])
def test_kernels_of_split_tokens_equal_plain_attention(kernel, causal, make, interpreted,
                                                       monkeypatch):
  monkeypatch.setattr(attention_lib.lax, "platform_dependent",
                      lambda *arrays, default, **kernels: kernels[kernel](*arrays))
  assert over_mesh(1, 2, 3, 1, 1, 300, causal, make) < 2e-5


@pytest.mark.parametrize("parts", [2, 3, 8, 16])
def test_every_device_works_on_an_early_and_a_late_chunk(parts):
  chunks = attention_lib._chunks(parts)
  assert sorted(chunks.flat) == list(range(2 * parts))
  # A query meets as many keys as stand before it: as many pairs on every device.
  assert (chunks.sum(1) == 2 * parts - 1).all()
  assert (chunks % 2 == [0, 1]).all()


def test_chunks_are_sent_and_come_back():
  chunks, numbers = attention_lib._chunks(4), np.arange(8)[None]

  def send_and_return(x):
    there = attention_lib._send_chunks(x, chunks)
    return there, attention_lib._send_chunks(there, chunks, back=True)

  with jax.set_mesh(mesh_lib.make_mesh(1, 4)):
    there, back = jax.jit(jax.shard_map(send_and_return, in_specs=P(None, "model"),
                                        out_specs=P(None, "model")))(numbers)
  np.testing.assert_array_equal(there, chunks.reshape(1, -1))
  np.testing.assert_array_equal(back, numbers)


@pytest.mark.slow
def test_over_8_devices_equals_one():
  command = ("from models.attention_test import over_mesh\n"
             "print([over_mesh(*case) for case in ((8, 1, 4, 2), (2, 4, 8, 2), (1, 8, 8, 4))])")
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                              "PYTHONPATH": os.pathsep.join(sys.path)}
  result = subprocess.run([sys.executable, "-c", command], env=environment, text=True,
                          capture_output=True, timeout=300)
  assert result.returncode == 0, result.stderr
  assert max(map(float, result.stdout.strip("[]\n").split(","))) < 1e-5
