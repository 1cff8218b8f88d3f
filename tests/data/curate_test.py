import numpy as np

from ares_jax.data.curate import Candidate, length_targets, select, vanilla


def candidates(lengths_by_passes, source="a", first=0):
  """One problem a length."""
  made = []
  for passes, lengths in lengths_by_passes.items():
    for tokens in lengths:
      made.append(Candidate(first + len(made), "x" * tokens, tokens, source, passes))
  return made


def test_target_is_linear_between_the_medians_of_the_ends():
  targets, notes = length_targets(candidates({0: [100, 10, 40], 4: [7], 8: [20, 10, 30, 20]}),
                                  samples=8)
  np.testing.assert_allclose(targets["a"], [40, 37.5, 35, 32.5, 30, 27.5, 25, 22.5, 20])
  assert notes == []


def test_a_missing_end_takes_the_nearest_bracket_and_says_so():
  targets, notes = length_targets(candidates({2: [50], 8: [10]}), samples=8)
  assert targets["a"][0] == 50 and targets["a"][8] == 10
  assert notes == ["a: no problems at pass rate 0/8, length taken from 2/8"]


def test_keeps_lengths_closest_to_the_target_evenly_over_brackets():
  pool = candidates({0: [40, 41, 90, 5, 39], 8: [10, 11, 60, 9, 12]})
  chosen, targets, _ = select(pool, count=4, samples=8, rng=np.random.default_rng(0))
  assert targets["a"][0] == 40 and targets["a"][8] == 11
  assert sorted(c.tokens for c in chosen if c.passes == 0)[0] >= 39
  assert {c.passes for c in chosen} == {0, 8}
  assert [sum(c.passes == p for c in chosen) for p in (0, 8)] == [2, 2]
  assert all(abs(c.tokens - targets["a"][c.passes]) <= 1 for c in chosen)


def test_an_exhausted_bracket_leaves_its_share_to_the_others():
  chosen, _, _ = select(candidates({0: [40], 8: [10] * 9}), count=6, samples=8,
                        rng=np.random.default_rng(0))
  assert [sum(c.passes == p for c in chosen) for p in (0, 8)] == [1, 5]


def test_a_problem_appears_once_with_its_best_response():
  pool = [Candidate(0, text, tokens, "a", 0) for text, tokens in (("s", 5), ("m", 30), ("l", 90))]
  chosen, _, _ = select(pool, count=9, samples=8, rng=np.random.default_rng(0))
  assert [c.response for c in chosen] == ["m"]


def test_every_source_has_its_own_target():
  pool = candidates({0: [40], 8: [10]}) + candidates({0: [400], 8: [100]}, "b", first=2)
  targets, _ = length_targets(pool, samples=8)
  assert targets["a"][0] == 40 and targets["b"][0] == 400


def test_vanilla_draws_problems_and_lengths_uniformly():
  pool = [Candidate(problem, "", tokens, "a", 8) for problem in range(400) for tokens in (10, 30)]
  chosen = vanilla(pool, count=300, rng=np.random.default_rng(0))
  assert len(chosen) == 300 == len({c.problem for c in chosen})
  assert 18 < np.mean([c.tokens for c in chosen]) < 22
