"""From graded answers to a benchmark's score, with intervals.

A problem is a dict as `predictions.py` writes it: id, source, level, group, step, and `samples`, a
list of dicts with correct, format_ok, truncated (0 or 1) and tokens.
"""

import numpy as np

from ares_jax.ops.difficulty import BUCKETS, bucket_of

RESAMPLES = 2000  # of the bootstrap; the interval's ends then move by about 0.1 of its half-width


def score_benchmark(problems, metric, *, easy, medium):
  """All that is reported of a benchmark.

  Args:
    problems: list of dicts, see above; all have the same number of samples.
    metric: "pass@1" and "avg@n", the mean over problems of the share right; "worst", the share of
      groups with every variant right; "strict", WeMath's: 1 for a problem right with all its steps,
      1/2 where only the whole is wrong, else 0.
    easy, medium: shares of right answers from which a problem counts as easy, as medium.

  Returns:
    dict: score and its 95% bootstrap interval [low, high] over units (problems or groups), units
    {id: value}, n, problems, length, shares, and the same by source, level and bucket.
  """
  units = unit_values(problems, metric)
  values = np.array(list(units.values()))
  n = len(problems[0]["samples"])
  result = {"metric": metric, "n": n, "problems": len(problems), "units": units,
            "score": float(values.mean()),
            "interval": bootstrap(values)} | summarize_answers(problems)
  for field in ("source", "level"):
    names = sorted({problem[field] for problem in problems} - {None},
                   key=level_order if field == "level" else None)
    result[f"by_{field}"] = {name: summarize_answers([p for p in problems if p[field] == name])
                             for name in names}
  right = np.array([sum(sample["correct"] for sample in problem["samples"])
                    for problem in problems])
  bucket = bucket_of(right, samples=n, easy=easy, medium=medium)
  # One sample says nothing about difficulty.
  result["by_bucket"] = {} if n == 1 else {
    name: summarize_answers([p for p, own in zip(problems, bucket, strict=True) if own == index])
    for index, name in enumerate(BUCKETS) if (bucket == index).any()}
  return result


def level_order(level):
  """A key of sorting: levels by number where they are numbers, else as text."""
  return (0, float(level), level) if level.replace(".", "", 1).isdecimal() else (1, 0.0, level)


def unit_values(problems, metric):
  """{id of the unit: its value in 0..1}."""
  if metric in ("pass@1", "avg@n"):
    return {problem["id"]: rate_of(problem) for problem in problems}
  groups = {}
  for problem in problems:
    if problem["group"] is None:
      raise ValueError(f"problem {problem['id']} has no group; the metric {metric!r} needs one")
    groups.setdefault(problem["group"], []).append(problem)
  if metric == "worst":
    return {name: float(np.mean(_right(group).min(0))) for name, group in groups.items()}
  values = {}
  for name, group in groups.items():
    whole = [p for p in group if (p["step"] or "").endswith("multi")]
    steps = [p for p in group if p not in whole]
    if len(whole) != 1 or not steps:
      raise ValueError(f"group {name} has {len(whole)} whole problems and {len(steps)} steps; the "
                       "metric 'strict' needs 1 (its step ends in 'multi') and some")
    all_steps = _right(steps).min(0)
    values[name] = float(np.mean(all_steps * (1 + _right(whole)[0]) / 2))
  return values


def summarize_answers(problems):
  """Means over problems, lengths over samples."""
  samples = [sample for problem in problems for sample in problem["samples"]]
  tokens = np.array([sample["tokens"] for sample in samples])
  return {"problems": len(problems),
          "accuracy": float(np.mean([rate_of(problem) for problem in problems])),
          "length_mean": float(tokens.mean()), "length_median": float(np.median(tokens)),
          "truncated": float(np.mean([sample["truncated"] for sample in samples])),
          "format_ok": float(np.mean([sample["format_ok"] for sample in samples]))}


def rate_of(problem):
  """Share of a problem's samples that are right."""
  return float(np.mean([sample["correct"] for sample in problem["samples"]]))


def bootstrap(values):
  """95% interval [low, high] of the mean over resampled units; None for a single one."""
  if len(values) < 2:
    return None
  # Drawing how often each unit comes is drawing units with replacement; 10 MB at 12,000 units.
  rng, count = np.random.default_rng(0), len(values)
  means = np.concatenate([
    rng.multinomial(count, np.full(count, 1 / count), size=100) @ values / count
    for _ in range(RESAMPLES // 100)])
  return [float(end) for end in np.percentile(means, [2.5, 97.5])]


def compare(result, other):
  """(difference, [low, high], paired) of two results of one benchmark.

  Paired by unit where both have the same; else from both intervals' half-widths.
  """
  difference = result["score"] - other["score"]
  if result.get("units") and result["units"].keys() == other.get("units", {}).keys():
    pairs = np.array([result["units"][name] - other["units"][name] for name in result["units"]])
    return difference, bootstrap(pairs), True
  halves = [(r["interval"][1] - r["interval"][0]) / 2 for r in (result, other) if r["interval"]]
  half = float(np.hypot(*halves)) if len(halves) == 2 else None
  return difference, None if half is None else [difference - half, difference + half], False


def _right(problems):
  """float [problems, samples]: 1 where right."""
  return np.array([[float(sample["correct"] >= 1) for sample in problem["samples"]]
                   for problem in problems])
