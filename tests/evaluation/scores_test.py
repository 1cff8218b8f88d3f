import numpy as np
import pytest

from ares_jax.evaluation import scores


def problem(name, right, *, tokens=10, group=None, step=None, source="s", level=None):
  return {"id": name, "source": source, "level": level, "group": group, "step": step, "samples": [
    {"correct": float(one), "format_ok": 1.0, "truncated": float(tokens > 50), "tokens": tokens}
    for one in right]}


def test_average_of_samples_by_hand():
  got = scores.score_benchmark([problem("a", [1, 1, 0, 0], tokens=10, level="1"),
                                problem("b", [1, 1, 1, 1], tokens=20, level="2"),
                                problem("c", [0, 0, 0, 0], tokens=90, level="2", source="t")],
                               "avg@n", easy=0.75, medium=0.375)
  assert got["score"] == pytest.approx(0.5) and got["n"] == 4 and got["problems"] == 3
  assert got["units"] == {"a": 0.5, "b": 1.0, "c": 0.0}
  assert (got["length_mean"], got["length_median"]) == (40, 20)
  assert got["truncated"] == pytest.approx(1 / 3)
  assert got["by_level"]["2"]["accuracy"] == 0.5 and got["by_source"]["t"]["problems"] == 1
  assert {name: part["length_mean"] for name, part in got["by_bucket"].items()} == {
    "easy": 20, "medium": 10, "hard": 90}


def test_worst_of_variants_needs_every_variant():
  rows = [problem("a1", [1], group="a"), problem("a2", [1], group="a"),
          problem("b1", [1], group="b"), problem("b2", [0], group="b")]
  assert scores.score_benchmark(rows, "worst", easy=0.75, medium=0.375)["score"] == 0.5
  # With two samples, each is a try at all variants: (1, 0) and (0, 1) never hold both.
  rows = [problem("a1", [1, 0], group="a"), problem("a2", [0, 1], group="a")]
  assert scores.unit_values(rows, "worst") == {"a": 0}
  with pytest.raises(ValueError, match="problem x has no group"):
    scores.unit_values([problem("x", [1])], "worst")


@pytest.mark.parametrize("steps, whole, value", [
  ([1, 1], 1, 1.0), ([1, 1], 0, 0.5), ([1, 0], 1, 0.0), ([0, 0], 0, 0.0)])
def test_strict_gives_nothing_for_a_guessed_whole(steps, whole, value):
  rows = [problem(f"s{i}", [right], group="g", step=f"2steps_{i + 1}")
          for i, right in enumerate(steps)]
  rows.append(problem("w", [whole], group="g", step="2steps_multi"))
  assert scores.unit_values(rows, "strict") == {"g": value}


def test_strict_needs_the_whole_problem():
  with pytest.raises(ValueError, match="group g has 0 whole problems and 1 steps"):
    scores.unit_values([problem("s", [1], group="g", step="2steps_1")], "strict")


def test_the_bootstrap_covers_the_mean_95_times_of_100():
  rng, hits = np.random.default_rng(1), 0
  for _ in range(200):
    low, high = scores.bootstrap(rng.random(40))
    hits += low <= 0.5 <= high
  assert 180 <= hits <= 199
  assert scores.bootstrap(np.array([1.0])) is None
  low, high = scores.bootstrap(np.arange(100) % 2.0)
  assert (low, high) == (pytest.approx(0.4, abs=0.02), pytest.approx(0.6, abs=0.02))


def test_a_comparison_is_paired_where_the_problems_are_the_same():
  base = {"score": 0.5, "interval": [0.4, 0.6], "units": {f"p{i}": float(i % 2) for i in range(40)}}
  better = base | {"score": 0.525, "units": base["units"] | {"p0": 1.0}}
  difference, (low, high), paired = scores.compare(better, base)
  assert paired and difference == pytest.approx(0.025) and 0 <= low < high < 0.1
  difference, (low, high), paired = scores.compare(base | {"units": {"q": 1.0}}, base)
  assert not paired and (low, high) == (pytest.approx(-0.1414, abs=1e-3),
                                        pytest.approx(0.1414, abs=1e-3))
