import dataclasses

import numpy as np
import pytest

from ares_jax.plan.rollouts import lengths, simulate
from ares_jax.sampling.scheduler import CachePlan, History

SIZES = CachePlan(prompts=2, group=2, prompt_tokens=8, tokens=16, page_tokens=8, pages=40, slots=4,
                  read=2, chunk=4)
PROMPT_P, LENGTH_B = [5, 8], [3, 16, 1, 2]


def test_steps_and_cached_tokens_are_those_by_hand():
  found = simulate(SIZES, PROMPT_P, LENGTH_B, history=History())
  assert (found.steps, found.tokens, found.redrawn, found.most_busy) == (16, 22, 0, 4)
  # A row of 3 tokens after a prompt of 5 reads 6, 7 and 8.
  read = sum(sum(prompt + done for done in range(1, length + 1))
             for prompt, length in zip([5, 5, 8, 8], LENGTH_B, strict=True))
  assert found.read == read
  # Both rows of prompt 0 go on for 3 steps, those of prompt 1 for one.
  assert found.read_once == read - 3 * 5 - 1 * 8


def test_rows_are_put_back_where_pages_run_out_and_all_end():
  # Equal answers that the first guess takes for short ones: a prompt, and 3 pages a row at the end.
  sizes = dataclasses.replace(SIZES, prompts=4, prompt_tokens=5, pages=10, slots=8)
  history = History()
  found = simulate(sizes, [5] * 4, [16] * 8, history=history)
  assert found.redrawn > 0 and found.tokens == 8 * 16 + found.redrawn
  assert history.redrawn == found.redrawn / found.tokens
  # With what was learnt, rows start only as their pages fit.
  assert simulate(sizes, [5] * 4, [16] * 8, history=history).redrawn < found.redrawn


def test_lengths_are_those_that_words_describe(tmp_path):
  drawn = lengths("lognormal:0.15", 10_000, 1000)
  assert abs(np.median(drawn) - 150) < 5 and drawn.max() == 1000
  assert 0.985 < (drawn < 1000).mean() < 0.995
  np.testing.assert_array_equal(lengths("equal", 2, 7), [7, 7])
  (tmp_path / "lengths").write_text("5\n9\n\n")
  assert set(lengths(str(tmp_path / "lengths"), 50, 7)) == {5, 7}
  for median in ("2", "", "x"):
    with pytest.raises(ValueError, match=f"lognormal:{median}: the median is a share"):
      lengths(f"lognormal:{median}", 1, 1)
