"""What the checks found as pictures: figure 2a, tokens found, the controller, the ablation."""

import json
import os

import numpy as np

from ares_jax.diagnose import kl as kl_check
from ares_jax.diagnose.tables import format_number
from ares_jax.ops.difficulty import BUCKETS
from ares_jax.report.drawing import bars, cells, lines

# Of the states of diagnose.kl.
TINTS = {"stable": "#c3e6cb", "oscillating": "#f6e3a1", "diverging": "#f2b8b5"}


def write_pictures(drawn, folder):
  """Writes FOLDER/NAME.png of every {name: image}; returns the paths."""
  os.makedirs(folder, exist_ok=True)
  paths = [os.path.join(folder, f"{name}.png") for name in drawn]
  for path, image in zip(paths, drawn.values(), strict=True):
    image.save(path, optimize=True)
  return paths


def hwe_picture(result):
  """F1 by window, a curve a quantile (figure 2a), and the tokens that the run flagged."""
  scores = result["scores"]
  windows = sorted({one["window"] for one in scores})
  by_key = {(one["window"], one["quantile"]): one for one in scores}
  quantiles = sorted({one["quantile"] for one in scores})
  series = [(f"quantile {quantile}", windows,
             [by_key[window, quantile]["f1"] for window in windows]) for quantile in quantiles]
  series.append(("every window flagged", windows,
                 [by_key[window, quantiles[0]]["every"] for window in windows]))
  series = [one for one in series if any(value is not None for value in one[2])]
  drawn = {}
  if series:
    drawn["hwe_f1"] = lines(f"F1 of HWE windows against triggers (figure 2a); {_best(result)}",
                            series, "window, tokens")
  if result["found"]:
    drawn["hwe_tokens"] = bars("Tokens that the run flagged (* in V_sem)", [
      (json.dumps(row["token"], ensure_ascii=False)[:18] + (" *" if row["trigger"] else ""),
       [(row["count"], f"{row['count']} flags, {row['entropy']:.2f} nats")])
      for row in result["found"]])
  return drawn


def _best(result):
  claim = result["claim"]
  found = "not known" if claim["best"] is None else format_number(claim["best"]["f1"])
  return f"best at w = {claim['window']}: {found}"


def kl_picture(result, records):
  """The KL outside windows against its target over the run, and the regions of the controller."""
  found = [line for _, line in sorted(records.aepo_metrics().items())]
  steps = [line["step"] for line in found]

  def by_bucket(metric):
    series = [(name, steps, [line[f"{metric}/{name}"] for line in found]) for name in BUCKETS]
    return [one for one in series if any(value is not None for value in one[2])]

  targets = [(f"target {row['bucket']}", steps, [row["target"]] * len(steps))
             for row in result["buckets"]]
  drawn = {name: lines(title, series) for name, title, series in (
    ("kl_outside", "KL outside windows, nats a token", by_bucket("kl/outside") + targets),
    ("kl_kappa", "KL coefficient kappa", by_bucket("kl/kappa"))) if series}
  by_key = {(one["rate"], one["noise"]): one["state"] for one in result["simulation"]}
  rates, noises = kl_check.RATES, kl_check.NOISES
  states = [[by_key[rate, noise] for noise in noises] for rate in rates]
  note, here = "", result["here"]
  if here:
    row = int(np.argmin(np.abs(np.log(np.float64(rates) / here["rate"]))))
    column = int(np.argmin(np.abs(np.float64(noises) - here["noise"])))
    states[row][column] += " *"
    note = (f"* nearest to the run: rate {here['rate']:g}, noise {here['noise']:.2g}, "
            f"{here['state']}")
  drawn["kl_regions"] = cells("The controller, simulated", [f"rate {rate}" for rate in rates],
                              noises, states, tints=TINTS, note=note,
                              label="noise of the KL's logarithm")
  return drawn


def ablation_picture(result):
  """Accuracy of both arms on easy and on hard problems."""
  def words(row, part):
    mean, half = row[part]["accuracy"]
    return mean, (f"{mean:.1%}" + (f" ± {half:.1%}" if half is not None else "")
                  + f" {row['arm']}, {row[part]['length'][0]:.3g} tokens")

  return {"ablation": bars("Accuracy by shaping, mean over seeds", [
    (part if part == "all" else f"{part} (level {result['levels'][part]})",
     [words(row, part) for row in result["arms"]]) for part in ("easy", "hard", "all")])}


