"""Computes the numbers of the pictures: curves, length against N_HE, entropy by difficulty."""

import numpy as np

from ares_jax.ops.difficulty import BUCKETS

# Points of a curve, at most: a screen has no pixels for more, so neighbours are averaged.
MAX_POINTS = 600
MAX_DOTS = 1200  # of the scatter plot


def curves(records):
  """{stage: {"step": [...], "values": {metric: [...]}}} of a run; a value is None if not logged."""
  found = {}
  for stage, by_step in records.metrics.items():
    if not by_step:
      continue
    first = [records.first[stage]] if stage in records.first else []
    lines = first + [by_step[step] for step in sorted(by_step)]
    names = sorted({name for line in lines for name in line} - {"stage", "step"})
    values = {name: np.float64([line.get(name) for line in lines]) for name in names}
    if stage == "aepo" and "aepo" in records.config:
      config = records.config["aepo"]
      # Tokens of answers per second, while sampling and over the complete iteration.
      tokens = values["response/tokens"] * config["prompts"] * config["group"]
      values["speed/rollout"] = tokens * values["rollout/batches"] / values["seconds/rollout"]
      values["speed/iteration"] = tokens / values["seconds/step"]
      values |= {f"kl/target/{bucket}": np.full(len(lines), target) for bucket, target in zip(
        BUCKETS, config["kl"]["target"], strict=True)}
    parts = np.array_split(np.arange(len(lines)), min(len(lines), MAX_POINTS))
    steps = np.float64([line["step"] for line in lines])
    found[stage] = {
      "step": [int(steps[part].max()) for part in parts],
      "values": {name: [_mean(array[part]) for part in parts] for name, array in values.items()}}
  return found


def _mean(values):
  """Mean of the finite values, five digits; None without any."""
  known = values[np.isfinite(values)]
  return float(f"{known.mean():.5g}") if len(known) else None


def length_against_count(annotated):
  """Length of rollouts against N_HE with the line of least squares (appendix J), as a dict.

  "dots" are [[count, tokens, bucket]], "slope" is in tokens per flagged token, "r" is Pearson's.
  None if all lengths or all counts are equal.
  """
  rows = [row for row in annotated if not row.held_out and row.count is not None]
  count = np.float64([row.count for row in rows])
  tokens = np.float64([len(row.flag) for row in rows])
  if len(rows) < 3 or count.std() == 0 or tokens.std() == 0:
    return None
  slope, intercept = np.polyfit(count, tokens, 1)
  chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_DOTS)).astype(int))
  return {"n": len(rows), "slope": float(slope), "intercept": float(intercept),
          "r": float(np.corrcoef(count, tokens)[0, 1]),
          "dots": [[int(count[index]), int(tokens[index]), rows[index].bucket] for index in chosen]}


def entropy_by_bucket(annotated):
  """Mean token entropy (nats), N_HE, length and accuracy of rollouts by difficulty (figure 4).

  The dicts of a list, one for each bucket that has answers.
  """
  found = []
  for index, name in enumerate(BUCKETS):
    rows = [row for row in annotated if not row.held_out and row.bucket == index]
    if rows:
      entropy = np.concatenate([row.entropy for row in rows])
      found.append({"bucket": name, "n": len(rows), "entropy": _mean(entropy),
                    "count": float(np.mean([row.count for row in rows])),
                    "tokens": float(np.mean([len(row.flag) for row in rows])),
                    "accuracy": float(np.mean([row.line["correct"] for row in rows]))})
  return found


def lengths(results):
  """Length and accuracy after each finished stage in results.json, by bucket and by level.

  Returns {"bucket": ..., "level": ...} of {name: {stage: {"length", "accuracy", "n"}}}.
  """
  found = {"bucket": {}, "level": {}}
  for stage, result in results.items():
    for kind, by_name in found.items():
      for name, part in result[kind].items():
        stages = by_name.setdefault(name, {})  # keeps the order of names where a stage lacks one
        if part["n"]:
          stages[stage] = {key: part[key] for key in ("length", "accuracy", "n")}
  return {kind: {name: stages for name, stages in by_name.items() if stages}
          for kind, by_name in found.items()}
