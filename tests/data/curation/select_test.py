import numpy as np

from ares_jax.data.curation import select as select_lib
from ares_jax.data.curation.select import (
  Candidates,
  length_targets,
  select_by_length,
  select_uniformly,
)


def pool(rows, names=("a",)):
  """Candidates of rows (problem, response, tokens, source, passes)."""
  columns = np.array(rows, np.int64).reshape(-1, 5).T
  return Candidates(*(column.astype(kind) for column, kind in zip(
    columns, (np.int32, np.int16, np.int32, np.int16, np.int16), strict=True)), names)


def candidates(lengths_by_passes):
  """One problem a length."""
  pairs = [(tokens, passes) for passes, lengths in lengths_by_passes.items() for tokens in lengths]
  return pool([(number, 0, tokens, 0, passes) for number, (tokens, passes) in enumerate(pairs)])


def test_target_is_linear_between_the_medians_of_the_ends():
  targets, notes = length_targets(candidates({0: [100, 10, 40], 4: [7], 8: [20, 10, 30, 20]}),
                                  samples=8)
  np.testing.assert_allclose(targets["a"], [40, 37.5, 35, 32.5, 30, 27.5, 25, 22.5, 20])
  assert notes == []


def test_a_missing_end_takes_the_nearest_bracket_and_says_so():
  targets, notes = length_targets(candidates({2: [50], 8: [10]}), samples=8)
  assert targets["a"][0] == 50 and targets["a"][8] == 10
  assert notes == ["a: no right responses at pass rate 0/8, length taken from 2/8"]


def test_keeps_lengths_closest_to_the_target_evenly_over_brackets():
  found = candidates({0: [40, 41, 90, 5, 39], 8: [10, 11, 60, 9, 12]})
  chosen, targets, _ = select_by_length(found, count=4, samples=8, rng=np.random.default_rng(0))
  tokens, passes = found.tokens[chosen], found.passes[chosen]
  assert targets["a"][0] == 40 and targets["a"][8] == 11
  assert passes.tolist() == [0, 8, 0, 8]
  assert tokens[:2].tolist() == [40, 11]
  assert all(abs(tokens - targets["a"][passes]) <= 1)


def test_other_brackets_replace_one_that_is_used_up():
  found = candidates({0: [40], 8: [10] * 9})
  chosen, _, _ = select_by_length(found, count=6, samples=8, rng=np.random.default_rng(0))
  assert found.passes[chosen].tolist() == [0, 8, 8, 8, 8, 8]


def test_a_problem_appears_once_with_its_best_response():
  found = pool([(0, response, tokens, 0, 0) for response, tokens in enumerate((5, 30, 90))])
  chosen, _, _ = select_by_length(found, count=9, samples=8, rng=np.random.default_rng(0))
  assert found.response[chosen].tolist() == [1]


def test_every_source_has_its_own_target():
  found = pool([(0, 0, 40, 0, 0), (1, 0, 10, 0, 8), (2, 0, 400, 1, 0), (3, 0, 100, 1, 8)],
               ("a", "b"))
  targets, _ = length_targets(found, samples=8)
  assert targets["a"][0] == 40 and targets["b"][0] == 400


def test_vanilla_draws_problems_and_lengths_uniformly():
  found = pool([(problem, 0, tokens, 0, 8) for problem in range(400) for tokens in (10, 30)])
  chosen = select_uniformly(found, count=300, rng=np.random.default_rng(0))
  assert len(chosen) == 300 == len(set(found.problem[chosen].tolist()))
  assert 18 < np.mean(found.tokens[chosen]) < 22


def test_without_right_responses_nothing_is_selected():
  assert len(select_uniformly(pool([]), count=3, rng=np.random.default_rng(0))) == 0
  assert len(select_by_length(pool([]), count=3, samples=8, rng=np.random.default_rng(0))[0]) == 0


def test_a_report_counts_by_source_and_bracket():
  lines = [("b", 0, [None, 40]), ("a", 8, [10, 12]), ("a", 8, [None, None]), ("b", 8, [20])]
  found = select_lib.curation_report(({"problem": number, "source": source, "passes": passes,
                                       "tokens": tokens} for number, (source, passes, tokens)
                                      in enumerate(lines)), selection="adacs", count=9, samples=8,
                                     rng=np.random.default_rng(0))
  assert (found["problems"], found["candidates"], found["wrong_candidates_dropped"]) == (4, 4, 3)
  assert found["bracket_problems"] == [1] + [0] * 7 + [3]
  # The median of 10 and 12 is 11: either is as close.
  assert sorted(pair[0] for pair in found["chosen"]) == [0, 1, 3] and [0, 1] in found["chosen"]
  assert found["source_brackets"]["a"] == {"problems": [0] * 8 + [2], "chosen": [0] * 8 + [1]}
  assert found["source_brackets"]["b"]["chosen"] == [1] + [0] * 7 + [1]
  assert found["bracket_mean_tokens_before"] == {"0": 40.0, "8": 14.0}
  assert found["bracket_quartiles"]["before"] == [[40] * 3, *[None] * 7, [11, 12, 16]]
  assert found["source_quartiles"]["b"]["after"] == [[40] * 3, *[None] * 7, [20] * 3]
