import numpy as np
import pytest
import tiny

from ares_jax.evaluation import scores
from ares_jax.evaluation.graded import GradedProblem, GradedSample
from ares_jax.evaluation.results import compare_results, results_markdown, score_benchmark

REWARD = tiny.read().aepo.reward


def problem(name, right, *, tokens=10, group=None, step=None, source="s", level=None):
  samples = [GradedSample(correct=float(one), format_ok=1.0, truncated=float(tokens > 50),
                          tokens=tokens, shows_work=1.0, response="") for one in right]
  return GradedProblem(index=0, id=name, source=source, level=level, group=group, step=step,
                       answer=["1"], seconds=0.5, timed_out=0, samples=samples)


def test_average_of_samples_by_hand():
  got = score_benchmark([problem("a", [1, 1, 0, 0], tokens=10, level="1"),
                         problem("b", [1, 1, 1, 1], tokens=20, level="2"),
                         problem("c", [0, 0, 0, 0], tokens=90, level="2", source="t")],
                        "avg@n", REWARD)
  assert got["score"] == got["accuracy"] == pytest.approx(0.5)
  assert got["n"] == 4 and got["problems"] == 3
  assert got["units"] == {"a": 0.5, "b": 1.0, "c": 0.0}
  # 1.96 standard deviations of 0.5, over sqrt 3.
  assert got["half_width"] == pytest.approx(1.96 * 0.5 / 3**0.5)
  assert got["score_half_width"] == got["half_width"] and got["interval"] == [0, 1]
  assert (got["length_mean"], got["length_median"]) == (40, 20)
  assert got["truncated"] == pytest.approx(1 / 3) and got["pass_at_k"] == pytest.approx(2 / 3)
  assert got["shows_work"] == 1 and got["tokens_per_second"] == pytest.approx(480 / 1.5)
  assert got["by_level"]["2"]["accuracy"] == 0.5 and got["by_source"]["t"]["problems"] == 1
  assert {name: part["length_mean"] for name, part in got["by_bucket"].items()} == {
    "easy": 20, "medium": 10, "hard": 90}


def test_variants_of_a_problem_are_not_independent():
  # Five groups of four variants that are all right or all wrong say as much as five problems.
  rows = [problem(f"{group}{i}", [group % 2], group=str(group), source=f"s{group % 2}", level="1")
          for group in range(5) for i in range(4)]
  lone = scores.summarize([problem(str(group), [group % 2]) for group in range(5)])
  found = score_benchmark(rows, "worst", REWARD)
  for part in (found, found["by_level"]["1"]):
    assert part["problems"] == 20 and part["independent"] == 5
    assert part["half_width"] == pytest.approx(lone["half_width"])
  assert found["score_half_width"] == pytest.approx(lone["half_width"])
  # A metric of problems has the interval of the accuracy, which it is.
  assert score_benchmark(rows, "avg@n", REWARD)["score_half_width"] == found["half_width"]


def test_the_interval_over_groups_by_hand():
  # Rates 1, 1, 0 of a group and 0 of a problem without one: residuals 1/2 and -1/2.
  rows = [problem("a", [1], group="g"), problem("b", [1], group="g"), problem("c", [0], group="g"),
          problem("g", [0])]
  assert scores.summarize(rows)["half_width"] == pytest.approx(1.96 * (2 * (2 / 4)) ** 0.5 / 4)
  assert scores.summarize(rows[:3])["half_width"] is None


def test_without_groups_the_interval_is_the_plain_one_bit_for_bit():
  rates = np.random.default_rng(0).integers(0, 9, (50, 8)) > 4
  rows = [problem(str(i), right) for i, right in enumerate(rates)]
  assert scores.summarize(rows)["half_width"] == 1.96 * float(
    np.std(rates.mean(1), ddof=1) / 50**0.5)


@pytest.mark.parametrize("group, words", [(None, "over 3 problems;"),
                                          ("g", "over 2 groups of problems;")])
def test_the_page_names_what_is_independent(group, words):
  rows = [problem("a", [1], group=group), problem("b", [0], group=group), problem("c", [1])]
  head = {"benchmark": "x", "model": "m", "weights": "w", "temperature": 0, "top_p": 1,
          "max_tokens": 9, "seed": 0, "prompts": "p", "grader": "layered",
          "skipped": ["row d:1: bad"], "note": "by hand."}
  page = results_markdown(head | score_benchmark(rows, "avg@n", REWARD))
  assert f"± is 1.96 standard errors {words}" in page
  assert "1 published rows cannot be used: row d:1: bad." in page and "by hand." in page


def test_an_interval_ends_at_0_and_1_but_its_half_width_is_kept():
  got = score_benchmark([problem(str(i), [i < 1]) for i in range(10)], "pass@1", REWARD)
  half = 1.96 * 0.1
  assert got["score_half_width"] == pytest.approx(half)
  assert got["interval"] == pytest.approx([0, 0.1 + half])
  other = score_benchmark([problem(f"o{i}", [i > 0]) for i in range(10)], "pass@1", REWARD)
  assert other["interval"] == pytest.approx([0.9 - half, 1])
  said = {"model": "m", "prompts": "p", "grader": "layered"}
  found = compare_results(got | said, other | said)
  assert np.diff(found["interval"]) == pytest.approx(2 * 2**0.5 * half)


def test_single_samples_are_not_sorted_by_difficulty():
  assert score_benchmark([problem("a", [1])], "pass@1", REWARD)["by_bucket"] == {}


def test_parts_are_by_value_and_levels_by_number():
  problems = [problem(level, [1], level=level) for level in ("10", "2", "b", "a")]
  assert list(scores.split_problems([*problems, problem("x", [1])], REWARD)["level"]) == [
    "2", "10", "a", "b"]


def test_no_problems_have_no_means():
  means = scores.summarize([])
  assert means.pop("problems") == 0 and set(means.values()) == {None}
  assert means.keys() | {"problems"} == scores.summarize([problem("a", [1])]).keys()


def test_worst_of_variants_needs_every_variant():
  rows = [problem("a1", [1], group="a"), problem("a2", [1], group="a"),
          problem("b1", [1], group="b"), problem("b2", [0], group="b")]
  assert score_benchmark(rows, "worst", REWARD)["score"] == 0.5
  # With two samples, each is a try at all variants: (1, 0) and (0, 1) never hold both.
  rows = [problem("a1", [1, 0], group="a"), problem("a2", [0, 1], group="a")]
  assert scores.unit_values(rows, "worst") == {"a": 0}


def test_groups_are_checked_before_anything_is_answered():
  row = {"id": "x", "group": None, "step": None}
  scores.check_groups([row], "pass@1")
  with pytest.raises(ValueError, match="problem x has no group"):
    scores.check_groups([row], "worst")


@pytest.mark.parametrize("steps, whole, value", [
  ([1, 1], 1, 1.0), ([1, 1], 0, 0.5), ([1, 0], 1, 0.0), ([0, 0], 0, 0.0)])
def test_strict_gives_nothing_for_a_guessed_whole(steps, whole, value):
  rows = [problem(f"s{i}", [right], group="g", step=f"2steps_{i + 1}")
          for i, right in enumerate(steps)]
  rows.append(problem("w", [whole], group="g", step="2steps_multi"))
  assert scores.unit_values(rows, "strict") == {"g": value}


def test_strict_needs_the_whole_problem():
  part = {"id": "s", "group": "g", "step": "2steps_1"}
  whole = part | {"id": "w", "step": "2steps_multi"}
  scores.check_groups([part, whole], "strict")
  with pytest.raises(ValueError, match="group g has 0 whole problems and 1 steps"):
    scores.check_groups([part], "strict")
  with pytest.raises(ValueError, match="1 of 2 groups are incomplete: group h has 1 whole"):
    scores.check_groups([part, whole, whole | {"group": "h"}], "strict")


def test_the_interval_covers_the_mean_95_times_of_100():
  rng, hits = np.random.default_rng(1), 0
  for _ in range(200):
    values = rng.random(40)
    hits += abs(values.mean() - 0.5) <= scores.half_width(values)
  assert 180 <= hits <= 199
  assert scores.half_width([1.0]) is None


@pytest.mark.parametrize("count, share, near", [(1000, 0.5, 0.002), (200, 0.1, 0.006),
                                                (30, 0.4, 0.02)])
def test_the_interval_is_that_of_a_bootstrap(count, share, near):
  values = np.float64(np.arange(count) < share * count)
  rng = np.random.default_rng(0)
  means = rng.multinomial(count, np.full(count, 1 / count), size=4000) @ values / count
  half = scores.half_width(values)
  np.testing.assert_allclose(np.percentile(means, [2.5, 97.5]), [share - half, share + half],
                             atol=near)


def test_a_comparison_is_paired_where_the_problems_are_the_same():
  base = {"score": 0.5, "interval": [0.4, 0.6], "units": {f"p{i}": float(i % 2) for i in range(40)},
          "groups": {}, "model": "m", "prompts": "x", "grader": "layered", "length_mean": 10.0}
  better = base | {"score": 0.525, "units": base["units"] | {"p0": 1.0}, "length_mean": 12.0}
  found = compare_results(better, base)
  assert found["paired"] and found["same_prompts"] and found["length_difference"] == 2
  assert found["difference"] == pytest.approx(0.025)
  # One of 40 differences is 1: 1.96 standard deviations of sqrt(1/40), over sqrt 40.
  assert found["interval"] == pytest.approx([0.025 - 0.049, 0.025 + 0.049], abs=1e-3)
  # Residuals of the 20 groups of two: 1.9 once, where both problems differ, and -0.1 else.
  better = base | {"units": base["units"] | {"p0": 1.0, "p20": 1.0},
                   "groups": {f"p{i}": str(i % 20) for i in range(40)}}
  found = compare_results(better, base)
  assert np.diff(found["interval"]) == pytest.approx(2 * 1.96 * (20 / 19 * 3.8)**0.5 / 40)
  found = compare_results(base | {"units": {"q": 1.0}}, base)
  assert not found["paired"]
  assert found["interval"] == pytest.approx([-0.1414, 0.1414], abs=1e-3)  # sqrt(.1 ** 2 + .1 ** 2)
