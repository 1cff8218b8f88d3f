"""Compares finished runs by what they were trained with, as the paper's tables 4 and 5 do.

An arm is a stage trained with the same settings under several seeds.
"""

import dataclasses
import json

import numpy as np
from scipy import stats

from ares_jax.evaluation.scores import level_order
from ares_jax.ops.difficulty import BUCKETS
from ares_jax.run.files import require_json
from ares_jax.run.identity import flatten, is_read_later, use_of
from ares_jax.system.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs of one stage that differ in their seed alone."""

  label: str  # the paper's name
  settings: dict  # what the stage was trained with: its settings and those of the stages before it
  by_seed: dict  # {seed: evaluation of the stage, from results.json}


def collect_arms(workdirs):
  """{name: {seed: evaluation}} of the finished stages of runs, by what they were trained with.

  The same stage with the same seed in two folders, for example a copied warm-up, counts once.

  Raises:
    ValueError: a folder holds no finished run, or one seed of an arm has two different results.
  """
  arms = {}
  for workdir in workdirs:
    config, results = require_json(workdir, "config.json"), require_json(workdir, "results.json")
    for stage, result in results.items():
      # Runs of one arm may differ in seed, evaluation and free settings.
      settings = {key: value for key, value in flatten(config).items()
                  if not (use_of(key).free or key == "seed" or key.startswith("evaluate.")
                          or is_read_later(stage, key))}
      arm = arms.setdefault(json.dumps(settings, sort_keys=True),
                            Arm(arm_label(config, stage), settings, {}))
      if arm.by_seed.setdefault(config["seed"], result)["sampled"] != result["sampled"]:
        raise ValueError(f"{workdir}: seed {config['seed']} of {arm.label!r} is there twice, with "
                         "different results; give one folder a seed")
  return _by_distinct_name(list(arms.values()))


def arm_label(config, stage):
  """The paper's name of a stage of this config (the dict of config.json)."""
  if stage == "warmup":
    return "warm-up"
  selection, aepo = config["curate"]["selection"], config["aepo"]
  start = "AdaCS" if selection == "adacs" else selection
  if not config["adacs"]["steps"]:
    start = "no cold start"
  if stage == "adacs":
    return f"{start} cold start"
  kind, dynamic = aepo["reward"]["kind"], aepo["kl"]["dynamic"]
  if kind in ("release", "continuous"):
    return f"{start} + {kind} reward"
  if kind == "aepo" and dynamic:
    return f"{start} + AEPO" + (" (ARES)" if start == "AdaCS" else "")
  # Both filter groups of equal answers in the paper's recipe; DAPO has no KL term (recipe.py).
  filtered = aepo["filter"]["batches"] > 1
  group = "DAPO" if filtered and not any(aepo["kl"]["beta"]) else "GRPO"
  if kind == "aepo":
    return f"{start} + {group} + entropy shaping"
  return f"{start} + {group}" + (" + dynamic KL" if dynamic else "")


def _by_distinct_name(arms):
  """{name: {seed: evaluation}}, ordered; names of one label show the settings that differ."""
  named = {}
  for arm in arms:
    others = [other.settings for other in arms if other.label == arm.label]
    keys = sorted({key for other in others for key in other.keys() | arm.settings.keys()
                   if other.get(key) != arm.settings.get(key)})
    differing = ", ".join(f"{key}={arm.settings.get(key)}" for key in keys)
    named[f"{arm.label} ({differing})" if differing else arm.label] = arm.by_seed
  return dict(sorted(named.items(), key=lambda item: (_rank(item[0]), item[0])))


def _rank(name):
  order = ("warm-up", "no cold start", "vanilla cold", "AdaCS cold", "vanilla", "AdaCS")
  return next(index for index, start in enumerate(order) if name.startswith(start))


def arm_rows(arms):
  """Means over seeds of every arm of {name: {seed: evaluation}}.

  Returns:
    list of dicts, one an arm: arm (its name); seeds; evaluated, the pairs (problems, samples each)
    of its evaluations; greedy, accuracy, pass_at_k, format_ok and length, each a mean over seeds
    with the half-width of its 95% t-interval; "bucket" and "level", {name: n, accuracy, length};
    reference, the name of the arm it is compared with, or ""; difference, the accuracy minus the
    reference's over the seeds of both. Runs of one seed share their start, so the difference varies
    less than the accuracies.
  """
  reference = _reference(arms)
  return [_arm_row(arm, by_seed, reference, arms.get(reference, {}))
          for arm, by_seed in arms.items()]


def _reference(arms):
  """Name of the GRPO arm with the most seeds, without one a DAPO arm; "" if there is neither."""
  for group in (" + GRPO", " + DAPO"):
    plain = [arm for arm in arms if arm.partition(" (")[0].endswith(group)]
    if plain:
      return max(plain, key=lambda arm: len(arms[arm]))
  return ""


def _arm_row(arm, by_seed, reference, reference_by_seed):
  results = [by_seed[seed] for seed in sorted(by_seed)]
  row = {"arm": arm, "seeds": sorted(by_seed), "reference": reference,
         "evaluated": sorted({(result["n"], result["samples"]) for result in results})}
  row["greedy"] = mean_with_interval([result["greedy"]["accuracy"] for result in results])
  for key in ("accuracy", "pass_at_k", "format_ok", "length"):
    row[key] = mean_with_interval([result["sampled"][key] for result in results])
  row["difference"] = mean_with_interval([
    by_seed[seed]["sampled"]["accuracy"] - reference_by_seed[seed]["sampled"]["accuracy"]
    for seed in by_seed if seed in reference_by_seed])
  levels = sorted({level for result in results for level in result["level"]}, key=level_order)
  for field, names in (("bucket", BUCKETS), ("level", levels)):
    row[field] = {}
    for name in names:
      parts = [result[field][name] for result in results
               if result[field].get(name, {"n": 0})["n"]]
      row[field][name] = {"n": sum(part["n"] for part in parts), **{
        key: mean_with_interval([part[key] for part in parts]) for key in ("accuracy", "length")}}
  return row


def arms_markdown(table, paper):
  """Markdown of rows of `arm_rows`, like tables 4 and 5 and figure 6, and of paper_tables.json."""
  reference = table[0]["reference"]
  lines = markdown_table(
    ["arm", "seeds", "greedy", "sampled", f"less {reference}, same seeds" if reference else "-",
     "pass@k", "format", "tokens"],
    [[row["arm"], len(row["seeds"]),
      *(interval_cell(row[name], 100)
        for name in ("greedy", "accuracy", "difference", "pass_at_k", "format_ok")),
      interval_cell(row["length"], 1)] for row in table])
  levels = sorted({name for row in table for name in row["level"]}, key=level_order)
  for title, field, names in (("pass rate", "bucket", BUCKETS), ("level", "level", levels)):
    lines += ["", f"By {title}: accuracy / tokens.", "", *markdown_table(["arm", *names], [
      [row["arm"], *(_part_cell(row[field].get(name)) for name in names)] for row in table])]
  evaluated = sorted({pair for row in table for pair in row["evaluated"]})
  lines += [
    "", "; ".join(f"{count} problems x {samples} samples" for count, samples in evaluated)
    + ". Means over seeds ± 95% t-interval; a single seed has none. Compare arms of the same "
    "seeds. A level has the same problems in all arms. A pass rate is an arm's own: its hard "
    "problems are those it fails.", "", *_paper_lines(paper)]
  return "\n".join(lines)


def _part_cell(part):
  if part is None or not part["n"]:
    return "-"
  return f"{interval_cell(part['accuracy'], 100)} / {interval_cell(part['length'], 1)}"


def _paper_lines(paper):
  """Lines of Markdown: the paper's tables 5 and 4."""
  table_4, table_5 = paper["table_4"], paper["table_5"]
  rows = [[arm, *(f"{right} / {tokens:.0f}" for right, tokens in zip(
    values["accuracy"], values["tokens"], strict=True))] for arm, values in table_4["rows"].items()]
  return [f"The paper's table 5 ({table_5['what']}; % right, average of 4 benchmarks): "
          + ", ".join(f"{arm} {values[-1]}" for arm, values in table_5["rows"].items())
          + f". {paper['source']}; other models and data, so only the order compares.", "",
          "Its table 4 (% right / tokens):", "", *markdown_table(["", *table_4["columns"]], rows)]


def mean_with_interval(values):
  """(mean, half-width of its 95% t-interval over seeds or None); (None, None) of no values."""
  if not values:
    return None, None
  half = None
  if len(values) > 1:
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
  return float(np.mean(values)), half


def interval_cell(pair, factor):
  """Text of a mean with its interval, times a factor; "-" for None."""
  mean, half = pair
  if mean is None:
    return "-"
  return f"{factor * mean:.1f}" + ("" if half is None else f" ± {factor * half:.1f}")
