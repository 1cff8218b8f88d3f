"""The kernels of paged attention against the form in XLA, on CPU, and their programs for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.gpu import paged_attention as gpu
from models import described_gpu, paging

from ares_jax.models import paged

HEADS, QUERIES, SIZE, PAGES, TOKENS = 2, 3, 128, 40, 16
LENGTH_P, PROMPT_TOKENS = np.int32([37, 16]), 37
# Three rows of prompt 0, one of prompt 1, an idle one; tokens after the prompt before the new one.
QUERY_B, DONE_B = np.int32([2, 0, 3, 6, 1]), np.int32([0, 40, 11, 0, 26])


def inputs(dtype=jnp.bfloat16, first=0):
  random = np.random.default_rng(0)
  q = jnp.asarray(random.normal(size=(5, HEADS, QUERIES, SIZE)) * SIZE**-0.5, dtype)
  pages = paged.Pages(*(jnp.asarray(random.normal(size=(HEADS, 2 * PAGES, TOKENS, SIZE)), dtype)
                        for _ in range(2)))
  numbers = iter(random.permutation(PAGES).astype(np.int32))
  table_PM = np.array([[next(numbers) for _ in range(3)] for _ in LENGTH_P])
  table_BM = np.full((5, 8), PAGES, np.int32)
  for row, prompt in enumerate(np.minimum(QUERY_B // 3, 1)):
    length = LENGTH_P[prompt] + DONE_B[row] + 1
    shared = LENGTH_P[prompt] // TOKENS
    table_BM[row, :shared] = table_PM[prompt, :shared]
    own = -(-length // TOKENS) - shared
    table_BM[row, shared : shared + own] = [next(numbers) for _ in range(own)]
    if LENGTH_P[prompt] % TOKENS:  # the last page of a prompt is copied
      for layer in (0, PAGES):
        source, to = table_PM[prompt, shared] + layer, table_BM[row, shared] + layer
        pages = paged.Pages(*(x.at[:, to].set(x[:, source]) for x in (pages.k, pages.v)))
  reads = paging.reads(table_PM, table_BM, LENGTH_P, QUERY_B, DONE_B, group=3,
                       prompt_tokens=PROMPT_TOKENS, live=41)
  return q, pages, reads, first


BUSY = QUERY_B < 6


def test_xla_reads_a_rows_own_pages_and_its_prompt():
  q, pages, reads, first = inputs(jnp.float32, PAGES)
  got = paged._by_xla(q, pages, reads, first)
  table = np.minimum(reads.table, PAGES - 1)
  for row in np.flatnonzero(BUSY):
    k, v = (np.asarray(x)[:, PAGES + table[row]].reshape(HEADS, -1, SIZE) for x in
            (pages.k, pages.v))
    k, v = (x[:, : reads.length[row] + 1] for x in (k, v))
    weights = jax.nn.softmax(jnp.einsum("kqh,ksh->kqs", q[row], k), -1)
    np.testing.assert_allclose(got[row], jnp.einsum("kqs,ksh->kqh", weights, v), atol=2e-5)


@pytest.mark.parametrize("first", [0, PAGES])
def test_reading_the_pool_by_pages_equals_reading_rows_by_tokens(first):
  q, pages, reads, _ = inputs(jnp.float32)
  own = paged.own_pages(reads.table, reads.length, reads.prompt_length, reads.active, PAGES, TOKENS)
  # Copies of a prompt's last page are a row's own; an idle row has none.
  np.testing.assert_array_equal(np.bincount(own[0], minlength=6)[:5] > 0, BUSY)
  got = paged._by_xla(q, pages, reads.replace(own=own), first)
  np.testing.assert_allclose(got[BUSY], paged._by_xla(q, pages, reads, first)[BUSY], atol=1e-5)


def int8_inputs(dtype=jnp.float32, first=0):
  """`inputs` with pages of int8, and scales that differ by prompt."""
  q, pages, reads, first = inputs(dtype, first)
  pages = jax.tree.map(lambda x: jnp.clip(jnp.round(40 * x), -127, 127).astype(jnp.int8), pages)
  random, prompt_B = np.random.default_rng(1), np.minimum(QUERY_B // 3, 1)
  scales = paged.Scales(*(jnp.float32(random.uniform(0.01, 0.04, (2, HEADS, SIZE)))[prompt_B]
                          for _ in range(2)))
  return q, pages, reads.replace(scales=scales), first


@pytest.mark.parametrize("by_pages", [False, True])
def test_int8_pages_hold_numbers_times_the_scales_of_a_row(by_pages):
  q, pages, reads, first = int8_inputs(first=PAGES)
  own = paged.own_pages(reads.table, reads.length, reads.prompt_length, reads.active, PAGES, TOKENS)
  got = paged.attend(q, pages, reads.replace(own=own if by_pages else None), first)
  for row in np.flatnonzero(BUSY):
    k, v = (x * scale[row][:, None, None] for x, scale in (
      (pages.k, reads.scales.k), (pages.v, reads.scales.v)))
    want = paged.attend(q, paged.Pages(k, v), reads.replace(scales=None), first)
    np.testing.assert_allclose(got[row], want[row], atol=1e-5)


def test_scales_of_a_prompt_fit_its_keys_however_they_are_turned():
  random = np.random.default_rng(0)
  k, v = (random.normal(size=(1, 2, 5, 1, 4)) for _ in range(2))
  k[0, 1, 3:] = v[0, 1, 3:] = np.nan  # beyond the second prompt's length
  scales = paged.prompt_scales(jnp.float32(k), jnp.float32(v), np.int32([5, 3]))
  most = paged.INT8_MOST / paged.RANGE
  pair = np.hypot(k[0, 1, :3, 0, :2], k[0, 1, :3, 0, 2:]).max(0)
  np.testing.assert_allclose(most * scales.k[1, 0, 0], np.tile(pair, 2), rtol=1e-6)
  np.testing.assert_allclose(most * scales.v[1, 0, 0], abs(v[0, 1, :3, 0]).max(0), rtol=1e-6)
  # Beyond the range they are cut; at 0 nothing is divided by 0.
  np.testing.assert_array_equal(paged.to_int8(jnp.float32([-9, 0.26, 9, 0, 1]), jnp.float32(
    [0.05, 0.1, 0.05, 0, 0])), [-127, 3, 127, 0, 127])


@pytest.mark.slow
def test_the_tpu_kernel_reads_int8_pages_like_xla():
  q, pages, reads, first = int8_inputs(jnp.bfloat16, PAGES)
  arguments = q * reads.scales.k[:, :, None], pages, reads, first
  with pltpu.force_tpu_interpret_mode():
    got = paged._by_kernel(*arguments, kernel=paged._tpu)
  want = paged._by_xla(*arguments)
  np.testing.assert_allclose(got[BUSY], want[BUSY], atol=0.02 * np.abs(want[BUSY]).max())


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, PAGES])
def test_the_tpu_kernel_equals_xla(first):
  arguments = inputs(first=first)
  want = paged._by_xla(*arguments)
  with pltpu.force_tpu_interpret_mode():
    got = paged._by_kernel(*arguments, kernel=paged._tpu)
  np.testing.assert_allclose(got[BUSY], want[BUSY], atol=0.02)


@pytest.mark.slow
def test_the_tpu_kernel_takes_rows_in_parts_whose_tables_fit(monkeypatch):
  monkeypatch.setattr(paged, "TABLE_BYTES", 2 * 8 * 4)
  with pltpu.force_tpu_interpret_mode():
    got = paged._by_kernel(*inputs(), kernel=paged._tpu)
  np.testing.assert_allclose(got[BUSY], paged._by_xla(*inputs())[BUSY], atol=0.02)


@pytest.mark.slow
def test_the_gpu_kernel_equals_xla(monkeypatch):
  arguments = inputs(jnp.float32, PAGES)
  kernel = functools.partial(gpu.paged_attention, interpret=True)
  monkeypatch.setattr(gpu, "paged_attention", kernel)
  got = paged._by_kernel(*arguments, kernel=paged._gpu)
  np.testing.assert_allclose(got[BUSY], paged._by_xla(*arguments)[BUSY], atol=1e-4)


def test_the_gpu_kernel_is_lowered_for_cuda():
  with described_gpu.one_device("cuda"):
    lowered = jax.jit(paged.attend).trace(*inputs()).lower(lowering_platforms=("cuda",))
  assert "triton" in lowered.as_text()
