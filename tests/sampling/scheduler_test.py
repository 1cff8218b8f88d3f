import dataclasses

import jax
import numpy as np
import pytest
import tiny

from ares_jax.run import model as model_lib
from ares_jax.sampling.sampler import EngineConfig
from ares_jax.sampling.scheduler import (
  CachePlan,
  History,
  Scheduler,
  plan_cache,
  rows_that_fit,
)
from ares_jax.system import mesh


def test_plans_as_many_pages_as_cache_gib_holds():
  # 2 layers x 1 kv head x 16 x keys and values, float32: 256 bytes per token.
  model = model_lib.model_config(tiny.read().model)
  sizes = dict(prompts=400, prompt_tokens=32, group=4, tokens=64)

  def plan(tokens=10**6, slots=0, **changes):
    with jax.set_mesh(mesh.make_mesh(4, 1)):
      return plan_cache(model, EngineConfig(tokens * 256 / 2**30, slots, 4, 16), **sizes | changes)

  # Beside the read of one prompt of 32 tokens; a page has 8.
  assert plan(32 + 25 * 8, 12) == CachePlan(
    prompts=100, group=4, prompt_tokens=32, tokens=64, page_tokens=8, pages=25, slots=3, read=1,
    chunk=16)
  # What the engine does not say follows from the sizes.
  with jax.set_mesh(mesh.make_mesh(4, 1)):
    derived = plan_cache(model, EngineConfig(1.0), **sizes | {"tokens": 1000})
  assert (derived.read, derived.chunk, derived.page_tokens) == (100, 15, 64)
  # The largest prompts and answers of two prompts: 2 x 4 pages, 8 x (8 + 1).
  assert plan(prompts=8, slots=100).pages == 2 * 4 + 8 * 9
  # By the first guess, fewer slots where lengths are not known to be equal.
  assert plan(32 + 90 * 8).slots > 20
  equal = History()
  equal.add(plan(), np.full(100, 64), 0)
  assert plan(32 + 90 * 8, history=equal).slots == 10
  with pytest.raises(ValueError, match="raise engine.cache_gib"):
    plan(32 + 12 * 8)
  assert plan(32 + 13 * 8).slots >= 1  # one prompt of 4 pages, one answer of up to 9


def test_survival_counts_responses_that_go_on_as_long_as_they_last():
  history = History()
  history.add(CachePlan(1, 1, 1, 8, 2, 1, 1, 1, 1), np.int32([2, 2, 8, 8]), 0)
  got = history.survival(4)
  np.testing.assert_allclose(got, [1, 0.5, 0.5, 0.5, 0], atol=0.02)
  # Many that end at once, and many that are known to last three pages.
  lasting = history.survival(4, ended_B=[3] * 1000, going_S=[2] * 1000)
  np.testing.assert_allclose(lasting, [1, 1, 1, 1, 0], atol=0.02)
  short = history.survival(4, ended_B=[0] * 1000)
  np.testing.assert_allclose(short[:3], [1, 0.03, 0.03], atol=0.02)


def test_rows_start_as_long_as_their_pages_are_expected_to_fit():
  always = np.array([1.0, 1.0, 1.0, 0.0])  # every response has 3 pages, and parts of others: 3.5
  idle = np.full((2, 4), -1)
  np.testing.assert_array_equal(rows_that_fit(always, [35, 34], idle), [10, 9])
  # A row that begins its last page will hold 3.5, and none later.
  idle[0, 0] = 2
  np.testing.assert_array_equal(rows_that_fit(always, [35, 3], idle), [10, 0])
  # Half of the responses have a page, half of them three: at most 1.5 or 0.5 x 3.5 pages each.
  np.testing.assert_array_equal(
    rows_that_fit(np.array([1.0, 0.5, 0.5, 0.0]), [35], idle[1:]), [20])


SIZES = CachePlan(prompts=3, group=2, prompt_tokens=8, tokens=16, page_tokens=8, pages=30, slots=4,
                  read=1, chunk=8)


def chunk(scheduler, rows=12, ended=(), idle=()):
  """`next_chunk` of two devices with 4 slots each: rows that have ended, and slots without one."""
  done_S = np.where(np.isin(np.arange(8), idle), -1, 3)
  limit_D, prompt_DR = scheduler.next_chunk(np.isin(np.arange(rows), ended), done_S,
                                            np.full(rows, 16))
  return limit_D.tolist(), None if prompt_DR is None else prompt_DR.tolist()


def test_prompts_are_read_until_the_rows_that_fit_have_work():
  scheduler = Scheduler(SIZES, np.full(6, 8), History())
  for number in range(2):
    assert chunk(scheduler, idle=range(8)) == ([4, 4], [[number], [number]])
  assert chunk(scheduler, idle=range(8)) == ([4, 4], None)
  # Of device 0 one row of four has ended, which is not worth a read for all devices. Then two have.
  assert chunk(scheduler, ended=[0], idle=[0])[1] is None
  assert chunk(scheduler, ended=[0, 1], idle=[0, 1]) == ([4, 4], [[2], [2]])
  assert chunk(scheduler, ended=[0, 1], idle=range(8))[1] is None


def test_a_prompt_is_not_read_where_the_longest_row_would_not_find_pages():
  # A prompt has 1 page, an answer up to 3; as far as is known, answers have one.
  sizes = dataclasses.replace(SIZES, pages=5, group=1)
  history = History()
  history.add(sizes, np.full(100, 1), 0)
  scheduler = Scheduler(sizes, np.full(6, 8), history)
  for _ in range(2):
    assert chunk(scheduler, rows=6, idle=range(8))[1] is not None
  assert chunk(scheduler, rows=6, idle=range(8)) == ([2, 2], None)
  # The row of a prompt has ended: its page is free.
  assert chunk(scheduler, rows=6, ended=[0, 3], idle=range(8))[1] == [[2], [2]]


def test_an_empty_device_may_always_decode_a_row():
  history = History()
  history.add(SIZES, np.full(100, 16), 0)  # 2.5 pages a row, beside a prompt's
  scheduler = Scheduler(dataclasses.replace(SIZES, pages=3), np.full(6, 8), history)
  assert chunk(scheduler, idle=range(8)) == ([1, 1], None)  # and no page for a prompt
  scheduler = Scheduler(dataclasses.replace(SIZES, pages=4), np.full(6, 8), history)
  assert chunk(scheduler, idle=range(8)) == ([1, 1], [[0], [0]])
  assert chunk(scheduler, idle=range(8)) == ([1, 1], None)
