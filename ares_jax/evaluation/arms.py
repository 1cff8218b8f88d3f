"""Finished runs by arm: the paper's tables 4 and 5 and figure 6 for one's own runs."""

import json
import os

import numpy as np
from scipy import stats

from ares_jax.evaluation.scores import level_order
from ares_jax.ops.difficulty import BUCKETS
from ares_jax.run.files import read_json
from ares_jax.run.identity import STAGES, flatten, is_read_later, use_of


def collect_arms(workdirs):
  """{arm: {seed: result}} of every finished stage of the runs.

  An arm is what a stage was trained with: its own settings and those of the stages before it. The
  same stage with the same seed in two folders (a copied start) counts once.

  Raises:
    ValueError: a folder holds no finished run, or one seed of an arm has two different results.
  """
  found = {}
  for workdir in workdirs:
    config, results = [read_json(workdir, name) for name in ("config.json", "results.json")]
    for name, content in (("config.json", config), ("results.json", results)):
      if not content:
        raise ValueError(f"{os.path.join(workdir, name)} does not exist; give folders of finished "
                         "runs")
    settings = {key: value for key, value in flatten(config).items() if not _may_differ(key)}
    for stage in STAGES:
      if stage not in results:
        continue
      own = {key: value for key, value in settings.items() if not is_read_later(stage, key)}
      arm = found.setdefault(json.dumps(own, sort_keys=True), (arm_label(config, stage), own, {}))
      before = arm[2].get(config["seed"])
      if before is not None and before["sampled"] != results[stage]["sampled"]:
        raise ValueError(f"{workdir}: seed {config['seed']} of {arm[0]!r} is there twice, with "
                         "different results; give one folder a seed")
      arm[2][config["seed"]] = results[stage]
  return _distinct(list(found.values()))


def _may_differ(key):
  """Whether two runs of one arm may have different values of a setting."""
  return use_of(key).free or key == "seed" or key.startswith("evaluate.")


def arm_label(config, stage):
  """The paper's name of what a stage of this config is."""
  if stage == "warmup":
    return "warm-up"
  start = {"adacs": "AdaCS", "vanilla": "vanilla"}[config["curate"]["selection"]]
  start = start if config["adacs"]["steps"] else "no cold start"
  if stage == "adacs":
    return f"{start} cold start"
  kind, dynamic = config["aepo"]["reward"]["kind"], config["aepo"]["kl"]["dynamic"]
  if kind == "release":
    return f"{start} + release reward"
  # Both filter groups of equal answers in the paper's recipe; DAPO has no KL term (presets.py).
  filtered = config["aepo"]["filter"]["batches"] > 1
  group = "DAPO" if filtered and not any(config["aepo"]["kl"]["beta"]) else "GRPO"
  name = {("accuracy", False): group, ("accuracy", True): f"{group} + dynamic KL",
          ("aepo", False): f"{group} + entropy shaping", ("aepo", True): "AEPO"}[kind, dynamic]
  return f"{start} + {name}" + (" (ARES)" if (start, name) == ("AdaCS", "AEPO") else "")


def arm_rows(arms):
  """One dict an arm: seeds, means over seeds with their 95% t-intervals, lengths by difficulty.

  `asked` are the pairs (problems, samples each) of its evaluations.
  `versus` is the accuracy less that of `reference`, over the seeds of both: runs of one seed share
  their start, so the difference varies less than either. The reference is the GRPO arm with the
  most seeds, without one a DAPO arm, "" without either.
  """
  table = []
  groups = [[arm for arm in arms if arm.partition(" (")[0].endswith(group)]
            for group in (" + GRPO", " + DAPO")]
  plain = groups[0] or groups[1]
  name_of_reference = max(plain, key=lambda arm: len(arms[arm])) if plain else ""
  reference = arms[name_of_reference] if plain else {}
  for arm, by_seed in arms.items():
    results = [by_seed[seed] for seed in sorted(by_seed)]
    row = {"arm": arm, "seeds": sorted(by_seed), "reference": name_of_reference,
           "asked": sorted({(result["n"], result["samples"]) for result in results})}
    for name, pick in (("greedy", lambda r: r["greedy"]["accuracy"]),
                       ("accuracy", lambda r: r["sampled"]["accuracy"]),
                       ("pass_at_k", lambda r: r["sampled"]["pass_at_k"]),
                       ("format_ok", lambda r: r["sampled"]["format_ok"]),
                       ("length", lambda r: r["sampled"]["length"])):
      row[name] = mean_with_interval([pick(result) for result in results])
    row["versus"] = mean_with_interval([by_seed[seed]["sampled"]["accuracy"] -
                                        reference[seed]["sampled"]["accuracy"] for seed in by_seed
                                        if seed in reference])
    levels = sorted({level for result in results for level in result["level"]}, key=level_order)
    for field, names in (("bucket", BUCKETS), ("level", levels)):
      row[field] = {}
      for name in names:
        parts = [r[field][name] for r in results if name in r[field] and r[field][name]["n"]]
        row[field][name] = {"n": sum(part["n"] for part in parts), **{
          key: mean_with_interval([part[key] for part in parts]) for key in ("accuracy", "length")}}
    table.append(row)
  return table


def arms_markdown(table, paper):
  """Three Markdown tables: accuracy (tables 4, 5), length by difficulty (figure 6), by level.

  Args:
    table: of `rows`.
    paper: paper_tables.json.
  """
  reference = table[0]["reference"]
  head = ["arm", "seeds", "greedy", "sampled",
          f"less {reference}, same seeds" if reference else "-", "pass@k", "format", "tokens"]
  lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
  for row in table:
    cells = [interval_cell(row[name], 100)
             for name in ("greedy", "accuracy", "versus", "pass_at_k", "format_ok")]
    lines.append(f"| {row['arm']} | {len(row['seeds'])} | {' | '.join(cells)} | "
                 f"{interval_cell(row['length'], 1)} |")
  for title, field in (("pass rate", "bucket"), ("level", "level")):
    names = BUCKETS if field == "bucket" else sorted(
      {name for row in table for name in row[field]}, key=level_order)
    lines += ["", f"By {title}: accuracy / tokens.", "",
              "| arm | " + " | ".join(names) + " |", "|" + " --- |" * (1 + len(names))]
    for row in table:
      cells = [f"{interval_cell(part['accuracy'], 100)} / {interval_cell(part['length'], 1)}"
               if part["n"] else "-" for part in (row[field].get(name, {"n": 0}) for name in names)]
      lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
  asked = sorted({pair for row in table for pair in row["asked"]})
  lines += ["", "; ".join(f"{count} problems x {samples} samples" for count, samples in asked)
            + ". Means over seeds ± 95% t-interval; a single seed has none. Arms compare where "
            "their seeds are the same. Levels hold the same problems in all arms; by pass rate an "
            "arm sorts them by its own answers, so its hard ones are those it fails.", "",
            f"The paper's table 5 ({paper['table_5']['what']}; % right, average of 4 benchmarks): "
            + ", ".join(f"{arm} {values[-1]}" for arm, values in paper["table_5"]["rows"].items())
            + f". {paper['source']}; other models and data, so only the order compares.", "",
            "Its table 4 (% right / tokens):", "",
            "| | " + " | ".join(paper["table_4"]["columns"]) + " |",
            "|" + " --- |" * (1 + len(paper["table_4"]["columns"]))]
  lines += [f"| {arm} | " + " | ".join(
              f"{right} / {tokens:.0f}" for right, tokens in zip(
                values["accuracy"], values["tokens"], strict=True)) + " |"
            for arm, values in paper["table_4"]["rows"].items()]
  return "\n".join(lines)


def _distinct(arms):
  """{label: {seed: result}}; arms of one label are told apart by the settings that differ."""
  named = {}
  for name, own, by_seed in arms:
    others = [other for label, other, _ in arms if label == name]
    keys = sorted({key for other in others for key in other.keys() | own.keys()
                   if other.get(key) != own.get(key)})
    differing = ", ".join(f"{key}={own.get(key)}" for key in keys)
    named[f"{name} ({differing})" if differing else name] = by_seed
  return dict(sorted(named.items(), key=lambda item: _rank(item[0])))


def _rank(name):
  order = ("warm-up", "no cold start", "vanilla cold", "AdaCS cold", "vanilla", "AdaCS")
  return next(index for index, start in enumerate(order) if name.startswith(start)), name


def mean_with_interval(values):
  """(mean, half-width of the 95% t-interval over seeds or None)."""
  if not values:
    return None, None
  half = None
  if len(values) > 1:
    deviation = np.std(values, ddof=1) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1) * deviation)
  return float(np.mean(values)), half


def interval_cell(pair, factor):
  """A mean with its interval, times a factor, for people."""
  mean, half = pair
  if mean is None:
    return "-"
  return f"{factor * mean:.1f}" + ("" if half is None else f" ± {factor * half:.1f}")
