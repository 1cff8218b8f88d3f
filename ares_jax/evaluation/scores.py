"""Scores of graded problems: means, their 95% intervals, metrics of benchmarks.

All intervals are normal approximations over units: over problems, because the samples of a problem
are not independent, or over groups of problems where a metric scores groups (arXiv 2411.00640).

`problems` is a list of P graded.GradedProblem with N samples each.
"""

import math

import numpy as np

from ares_jax.grading.response import shows_work
from ares_jax.ops.difficulty import BUCKETS, bucket_of


def half_width(values):
  """Half the width of the 95% interval of the mean over units; None of fewer than two."""
  if len(values) < 2:
    return None
  return 1.96 * float(np.std(values, ddof=1) / math.sqrt(len(values)))


def summarize(problems):
  """Means over problems and over their samples; None without problems.

  A dict of problems (their number); accuracy, the mean share of right samples, and half_width, of
  its interval; pass_at_k, the share of problems with a right sample; length_mean and length_median,
  tokens of a sample; the shares format_ok, truncated and shows_work of samples.
  """
  if not problems:
    return {"problems": 0} | dict.fromkeys((
      "accuracy", "half_width", "pass_at_k", "length_mean", "length_median", "format_ok",
      "truncated", "shows_work"))
  rate_P, tokens_PN = _values(problems, "correct").mean(1), _values(problems, "tokens")
  working = [shows_work(sample.response) for problem in problems for sample in problem.samples]
  return {"problems": len(problems), "accuracy": float(rate_P.mean()),
          "half_width": half_width(rate_P), "pass_at_k": float((rate_P > 0).mean()),
          "length_mean": float(tokens_PN.mean()), "length_median": float(np.median(tokens_PN)),
          **{key: float(_values(problems, key).mean()) for key in ("format_ok", "truncated")},
          "shows_work": float(np.mean(working))}


def _values(problems, field):
  """[P, N]: a field of every sample."""
  return np.array([[getattr(sample, field) for sample in problem.samples] for problem in problems])


def split_problems(problems, reward):
  """{"source": {name: problems}, "level": ..., "bucket": ...}.

  Levels are in order, without problems that have none. All three buckets are there, and may be
  empty; the thresholds of `reward`, a RewardConfig, separate them.
  """
  parts = {"source": {}, "level": {}, "bucket": {name: [] for name in BUCKETS}}
  correct_PN = _values(problems, "correct")
  bucket_P = bucket_of(correct_PN.sum(1), samples=correct_PN.shape[1], easy=reward.easy,
                       medium=reward.medium)
  for problem, number in zip(problems, bucket_P, strict=True):
    parts["source"].setdefault(problem.source, []).append(problem)
    parts["level"].setdefault(problem.level, []).append(problem)
    parts["bucket"][BUCKETS[number]].append(problem)
  for field, key in (("source", None), ("level", level_order)):
    parts[field].pop(None, None)
    parts[field] = {name: parts[field][name] for name in sorted(parts[field], key=key)}
  return parts


def level_order(level):
  """Sorting key of a level: numbers by value, before all other texts."""
  return (0, float(level), level) if level.replace(".", "", 1).isdecimal() else (1, 0.0, level)


def unit_values(problems, metric):
  """{id of a problem or group: value}; the mean of the values is the score of a benchmark.

  The metrics "pass@1" and "avg@n" are the share of a problem's samples that are right; "worst" is
  the share of samples in which all variants of a group are right; "strict", WeMath's, is 1 where a
  group's whole problem and all its steps are right, 1/2 where only the whole problem is wrong, and
  else 0.

  Raises:
    ValueError: the metric needs groups and a problem has none, or a group is incomplete.
  """
  if metric in ("pass@1", "avg@n"):
    rates = _values(problems, "correct").mean(1).tolist()
    return {problem.id: rate for problem, rate in zip(problems, rates, strict=True)}
  groups = {}
  for problem in problems:
    if problem.group is None:
      raise ValueError(f"problem {problem.id} has no group; the metric {metric!r} needs one")
    groups.setdefault(problem.group, []).append(problem)
  if metric == "strict":
    return {name: float(_strict(group).mean()) for name, group in groups.items()}
  return {name: float(_values(group, "correct").min(0).mean()) for name, group in groups.items()}


def _strict(group):
  """float [N]: WeMath's value of a whole problem and its steps."""
  whole = [problem for problem in group if (problem.step or "").endswith("multi")]
  steps = [problem for problem in group if problem not in whole]
  if len(whole) != 1 or not steps:
    raise ValueError(f"group {group[0].group} has {len(whole)} whole problems and {len(steps)} "
                     "steps; the metric 'strict' needs 1 (its step ends in 'multi') and some")
  return _values(steps, "correct").min(0) * (1 + _values(whole, "correct")[0]) / 2


def percent(value, half=None):
  """A share for people, with the half-width of its interval; "-" for None."""
  if value is None:
    return "-"
  return f"{100 * value:.1f}%" + ("" if half is None else f" ±{100 * half:.1f}")
