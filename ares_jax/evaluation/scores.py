"""Scores of graded problems: means, their 95% intervals, metrics of benchmarks.

All intervals are normal approximations over what is independent: problems, as the samples of a
problem are not, or groups, as the variants of a problem are not (arXiv 2411.00640).

`problems` is a list of P graded.GradedProblem with N samples each.
"""

import math

import numpy as np

from ares_jax.ops.difficulty import BUCKETS, bucket_of

_OF_PROBLEMS = ("pass@1", "avg@n")  # metrics that score problems; the others score groups


def half_width(values, cluster=None):
  """1.96 standard errors of the mean: half the width of its 95% interval.

  `cluster` numbers the independent cluster of each value (`cluster_numbers`); None where every
  value is independent. None of fewer than two clusters.
  """
  n = len(values)
  k = n if cluster is None else len(set(cluster))
  if k < 2:
    return None
  if k == n:
    return 1.96 * float(np.std(values, ddof=1) / math.sqrt(n))
  residual_K = np.bincount(cluster, np.asarray(values) - np.mean(values))
  return 1.96 * math.sqrt(k / (k - 1) * float(np.sum(residual_K**2))) / n


def cluster_numbers(groups):
  """Numbers from 0 for a list of groups: equal ones share a number, each None has its own."""
  numbers = {}
  return [numbers.setdefault(("alone", index) if group is None else ("group", group), len(numbers))
          for index, group in enumerate(groups)]


def summarize(problems):
  """Means over problems and over their samples; None without problems.

  A dict of problems (their number); independent, the number of groups, where a problem without one
  counts as one; accuracy, the mean share of right samples, and half_width, of its interval between
  these groups; pass_at_k, the share of problems with a right sample; length_mean and length_median,
  tokens of a sample; the shares format_ok, truncated and shows_work of samples.
  """
  if not problems:
    return {"problems": 0} | dict.fromkeys((
      "independent", "accuracy", "half_width", "pass_at_k", "length_mean", "length_median",
      "format_ok", "truncated", "shows_work"))
  rate_P, tokens_PN = _values(problems, "correct").mean(1), _values(problems, "tokens")
  cluster_P = cluster_numbers([problem.group for problem in problems])
  return {"problems": len(problems), "independent": len(set(cluster_P)),
          "accuracy": float(rate_P.mean()), "half_width": half_width(rate_P, cluster_P),
          "pass_at_k": float((rate_P > 0).mean()),
          "length_mean": float(tokens_PN.mean()), "length_median": float(np.median(tokens_PN)),
          **{key: float(_values(problems, key).mean())
             for key in ("format_ok", "truncated", "shows_work")}}


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


def unit_groups(problems, metric):
  """{id of a problem: its group}, of those that have one; empty if the metric scores groups."""
  return {problem.id: problem.group for problem in problems
          if metric in _OF_PROBLEMS and problem.group is not None}


def unit_values(problems, metric):
  """{id of a problem or group: value}; the mean of the values is the score of a benchmark.

  The metrics "pass@1" and "avg@n" are the share of a problem's samples that are right; "worst" is
  the share of samples in which all variants of a group are right; "strict", WeMath's, is 1 where a
  group's whole problem and all its steps are right, 1/2 where only the whole problem is wrong, and
  else 0. `check_groups` says which problems have such values.
  """
  if metric in _OF_PROBLEMS:
    rates = _values(problems, "correct").mean(1).tolist()
    return {problem.id: rate for problem, rate in zip(problems, rates, strict=True)}
  groups = {}
  for problem in problems:
    groups.setdefault(problem.group, []).append(problem)
  if metric == "strict":
    return {name: float(_strict(group).mean()) for name, group in groups.items()}
  return {name: float(_values(group, "correct").min(0).mean()) for name, group in groups.items()}


def _strict(group):
  """float [N]: WeMath's value of a whole problem and its steps."""
  (whole,) = [problem for problem in group if _is_whole(problem.step)]
  steps = [problem for problem in group if problem is not whole]
  return _values(steps, "correct").min(0) * (1 + _values([whole], "correct")[0]) / 2


def _is_whole(step):
  """Whether a part of a problem, by WeMath's name of it ("2steps_1", "2steps_multi"), is all."""
  return (step or "").endswith("multi")


def check_groups(rows, metric):
  """Raises ValueError where a metric of groups has no value of these rows (dicts).

  Every row then needs a group, and for "strict" each group one whole problem and some steps.
  """
  if metric in _OF_PROBLEMS:
    return
  steps = {}
  for row in rows:
    if row["group"] is None:
      raise ValueError(f"problem {row['id']} has no group; the metric {metric!r} needs one: a "
                       "column of ids that all variants of a problem share")
    steps.setdefault(row["group"], []).append(_is_whole(row["step"]))
  bad = [name for name, whole in steps.items() if whole.count(True) != 1 or len(whole) < 2]
  if metric == "strict" and bad:
    whole = steps[bad[0]].count(True)
    raise ValueError(
      f"{len(bad)} of {len(steps)} groups are incomplete: group {bad[0]} has {whole} whole "
      f"problems and {len(steps[bad[0]]) - whole} steps; the metric 'strict' needs 1 (its step "
      "ends in 'multi') and some; give the whole file")


def percent(value, half=None):
  """A share for people, with the half-width of its interval; "-" for None."""
  if value is None:
    return "-"
  return f"{100 * value:.1f}%" + ("" if half is None else f" ±{100 * half:.1f}")
