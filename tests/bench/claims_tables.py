"""Tables and a picture of the finished runs of `tests.bench.claims`.

`runs` is {arm: {seed: folder}}, and `baseline` gives the name of the arm that an arm is compared
with, which is among them.
"""

import functools
import json

import numpy as np
from scipy import stats

from ares_jax.system.figures import GREY, draw_intervals, draw_legend, new_figure
from ares_jax.system.tables import markdown_table

PAIRED = ("Means over seeds; in brackets the difference to the experiment's baseline, paired by "
          "seed, with its 95% t-interval.")


def result_tables(runs, baseline):
  """Two Markdown tables of the finished seeds: in all, and by level."""
  finished = _results(runs)
  levels = _levels(finished)
  overall = {
    "temperature 1": lambda one: 100 * one["sampled"]["accuracy"],
    "greedy": lambda one: 100 * one["greedy"]["accuracy"],
    "pass@8": lambda one: 100 * one["sampled"]["pass_at_k"],
    "tokens": lambda one: one["sampled"]["length"],
    "shaped, %": lambda one: 100 * one["shaped"],
    "last fifth": lambda one: 100 * one["last_fifth"]}
  by_level = {f"{name}, {level}": functools.partial(value, level) for level in levels
              for name, value in {
    "right": _right, "tokens": _tokens,
    "direct": lambda level, one: 100 * one["level"][level]["modes"].get("direct", 0),
    "check": lambda level, one: 100 * one["level"][level]["modes"].get("check", 0)}.items()}
  return "\n".join([
    *_paired_table(finished, baseline, overall), "", *_paired_table(finished, baseline, by_level),
    "", PAIRED, "\"shaped\" is the mean change of the advantages by the entropy term, over their "
    "mean size without it, \"last fifth\" the accuracy on training problems in the last fifth of "
    "the iterations less that in the fifth before, in points."])


def level_figure(runs, baseline):
  """A figure of the paired differences to the baseline by level, with 95% intervals."""
  finished = _results(runs)
  levels = _levels(finished)
  figure, panels = new_figure(
    "Right answers, difference to the baseline", "Tokens of an answer, difference to the baseline",
    x_label="level", y_labels=["points", "tokens"], height=6.0)
  for panel, value in zip(panels, (_right, _tokens), strict=True):
    intervals = {}
    for arm, by_seed in finished.items():
      pairs = [_paired(functools.partial(value, level), by_seed, finished[baseline(arm)])
               for level in levels]
      if arm != baseline(arm) and None not in pairs:
        intervals[f"{arm}, {len(by_seed)} seeds"] = [
          [mean + side * half for mean, half in pairs] for side in (-1, 0, 1)]
    panel.axhline(0, color=GREY, linewidth=1)
    draw_intervals(panel, [float(level) for level in levels], intervals)
    panel.xaxis.get_major_locator().set_params(integer=True)
  draw_legend(panels[0])
  return figure


def _results(runs):
  return {arm: {seed: _result(folder) for seed, folder in by_seed.items()}
          for arm, by_seed in runs.items()}


def _right(level, one):
  return 100 * one["level"][level]["accuracy"]


def _tokens(level, one):
  return one["level"][level]["length"]


def _levels(finished):
  return sorted({level for by_seed in finished.values() for one in by_seed.values()
                 for level in one["level"]}, key=float)


def transfer_table(runs, baseline, problems):
  """A Markdown table of evaluations on other problems.

  `problems` is {name: (folder under RUN/transfer, levels that count)}. A run counts once all of
  them are finished.
  """
  finished = {}
  for arm, by_seed in runs.items():
    paths = {seed: {name: run / "transfer" / folder / "results.json"
                    for name, (folder, _) in problems.items()} for seed, run in by_seed.items()}
    finished[arm] = {seed: {name: json.loads(path.read_text())["by_level"]
                            for name, path in by_name.items()}
                     for seed, by_name in paths.items()
                     if all(path.exists() for path in by_name.values())}

  def mean(name, key, scale, one):
    return scale * np.mean([one[name][level][key] for level in problems[name][1]])

  columns = {f"{name}: {heading}": functools.partial(mean, name, key, scale)
             for name in problems for heading, key, scale in (
               ("right", "accuracy", 100), ("tokens", "length_mean", 1))}
  return "\n".join([*_paired_table(finished, baseline, columns), "", PAIRED])


def _paired_table(finished, baseline, columns):
  """Lines of a table: `finished` is {arm: {seed: result}}, `columns` {name: value of a result}."""
  rows = [[arm, len(by_seed), *(_cell(value, by_seed, finished[baseline(arm)])
                                for value in columns.values())]
          for arm, by_seed in finished.items()]
  return markdown_table(["arm", "seeds", *columns], rows)


def _result(folder):
  """The evaluation after AEPO, and two numbers of its iterations.

  "shaped" is the mean of `reward/shaped_size`, "last_fifth" the accuracy on training problems in
  the last fifth of the iterations less that in the fifth before.
  """
  lines = [line for line in map(json.loads, (folder / "metrics.jsonl").open())
           if "reward/shaped_size" in line]
  accuracies = [line["reward/accuracy"] for line in lines]
  fifth = len(lines) // 5
  return json.loads((folder / "done.json").read_text())["aepo"] | {
    "shaped": np.mean([line["reward/shaped_size"] for line in lines
                       if line["reward/shaped_size"] is not None]),
    "last_fifth": np.mean(accuracies[-fifth:]) - np.mean(accuracies[-2 * fifth:-fifth])}


def _cell(value, by_seed, reference):
  if not by_seed:
    return "-"
  text = f"{np.mean([value(one) for one in by_seed.values()]):.1f}"
  paired = None if by_seed is reference else _paired(value, by_seed, reference)
  return text if paired is None else text + f" ({paired[0]:+.1f} ± {paired[1]:.1f})"


def _paired(value, by_seed, reference):
  """(mean, half of the 95% t-interval) of differences paired by seed; None of one seed."""
  differences = [value(one) - value(reference[seed]) for seed, one in by_seed.items()
                 if seed in reference]
  if len(differences) < 2:
    return None
  half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
  return np.mean(differences), half
