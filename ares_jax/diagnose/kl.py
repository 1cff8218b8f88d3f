"""Checks that the controller holds the KL outside windows at its target (algorithm 1, eq. 27).

It summarises what the run's controller did, and simulates the same controller over rates and noise.
Suffix `_3`: one value for each bucket; in the simulation, for each of three random seeds.
"""

import numpy as np

from ares_jax import ops
from ares_jax.ops.difficulty import BUCKETS
from ares_jax.system import figures
from ares_jax.system.figures import Curve
from ares_jax.system.tables import format_number, text_table

RATES = (0.01, 0.03, 0.1, 0.3, 0.6, 0.9)
NOISES = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5)
STEPS = 300
# In an iteration the simulated policy goes this share of the way to the KL that kappa leads to.
RESPONSE = 0.3
# Limits over the last half: share of iterations with kappa at a bound, deviation of log kappa.
AT_BOUND, SWING = 0.2, 0.35
TINTS = {"stable": "#c3e6cb", "oscillating": "#f6e3a1", "diverging": "#f2b8b5"}


def measure_kl(records):
  """What the controller of a run's records did, by bucket, and the simulation.

  Returns:
    dict: "dynamic", "rate", "low", "high" (config.kl), "iterations", "steps" (their numbers),
    "buckets" (a list of `bucket_summary`), "simulation" (a list of `simulate`), "here" (the
    simulation at the run's rate and noise, or None), "advice" (a list of sentences).
  """
  config = records.aepo_config().kl
  lines = [line for _, line in sorted(records.metrics["aepo"].items())]
  if not lines:
    raise ValueError(f"{records.workdir}/metrics.jsonl has no AEPO iterations yet")
  buckets = [bucket_summary(name, lines, config, config.target[index])
             for index, name in enumerate(BUCKETS)]
  noise = [row["noise"] for row in buckets if row["noise"] is not None]
  here = simulate(config.rate, max(noise), low=config.low, high=config.high) if noise else None
  simulation = [simulate(rate, level, low=config.low, high=config.high)
                for rate in RATES for level in NOISES]
  result = {"workdir": str(records.workdir), "dynamic": config.dynamic, "rate": config.rate,
            "low": config.low, "high": config.high, "iterations": len(lines),
            "steps": [line["step"] for line in lines], "buckets": buckets,
            "simulation": simulation, "here": here}
  return result | {"advice": kl_advice(result)}


def bucket_summary(name, lines, config, target):
  """One bucket over the run, as a dict.

  "outside" and "kappa" hold a value for each iteration; "kl" is the mean of the last third, "ratio"
  the same over its target, "noise" the deviation of the KL's logarithm.
  """
  outside, kappas = ([line[f"kl/{part}/{name}"] for line in lines] for part in ("outside", "kappa"))
  kl, kappa = np.float64(outside), np.float64(kappas)
  late = kl[len(kl) * 2 // 3 :]
  late = late[np.isfinite(late)]
  seen = kl[np.isfinite(kl) & (kl > 0)]
  # Differences of logarithms between iterations remove the trend. Their median is used because the
  # first iterations, where policy and reference are still equal, jump by 20 and more.
  noise = None
  if len(seen) > 4:
    change = np.diff(np.log(seen))
    noise = float(1.4826 * np.median(np.abs(change - np.median(change))) / np.sqrt(2))
  return {"bucket": name, "target": target, "seen": int(np.isfinite(kl).sum()),
          "kl": float(late.mean()) if len(late) else None,
          "ratio": float(late.mean() / target) if len(late) else None,
          "kappa_first": float(kappa[0]), "kappa_last": float(kappa[-1]),
          "kappa_least": float(kappa.min()), "kappa_most": float(kappa.max()),
          "at_low": float((kappa <= config.low * 1.001).mean()),
          "at_high": float((kappa >= config.high * 0.999).mean()), "noise": noise,
          "outside": outside, "kappa": kappas}


def simulate(rate, noise, *, low, high):
  """The controller against a policy whose KL settles at target / kappa, with kappa in [low, high].

  `noise` is the deviation of the measured KL's logarithm.

  Returns:
    dict: "rate", "noise", "state" ("stable", "oscillating" or "diverging"), and over the last half
    "swing" (deviation of log kappa), "at_bound" (share of iterations), "ratio" (mean KL over
    target).
  """
  random, one_3 = np.random.default_rng(0), np.ones(3, np.float32)
  # The policy starts at four times the target, so that the controller has something to do.
  kappa_3, kl_3 = np.clip(one_3, low, high), np.full(3, 4.0)
  path = []
  for _ in range(STEPS):
    kl_3 = kl_3 + RESPONSE * (1 / np.float64(kappa_3) - kl_3)
    measured_3 = np.float32(kl_3 * np.exp(noise * random.standard_normal(3) - noise**2 / 2))
    kappa_3 = np.asarray(ops.track_kl_coefficient(
      kappa_3, measured_3, one_3, target_3=one_3, rate=rate, low=low, high=high))
    path.append((kappa_3, kl_3))
  kappa, kl = np.float64(path[STEPS // 2 :]).swapaxes(0, 1)
  at_bound = ((kappa <= low * 1.001) | (kappa >= high * 0.999)).mean()
  swing = np.log(kappa).std(0).mean()
  state = "diverging" if at_bound > AT_BOUND else ("oscillating" if swing > SWING else "stable")
  return {"rate": rate, "noise": noise, "state": state, "swing": float(swing),
          "at_bound": float(at_bound), "ratio": float(kl.mean())}


def kl_advice(result):
  """A list of sentences: one for each bucket, then one for the simulation."""
  if not result["dynamic"]:
    return ["kl.dynamic is off, so kappa does not change."]
  found = []
  for row in result["buckets"]:
    name, ratio = row["bucket"], row["ratio"]
    if ratio is None:
      found.append(f"{name}: the last third has no tokens of this bucket, so its kappa does not "
                   "change.")
    elif row["kappa_last"] <= result["low"] * 1.001 and ratio < 1:
      found.append(f"{name}: kappa is at its lower bound and the KL is only {format_number(ratio)} "
                   "of its target, so the budget does not bind; lower kl.target.")
    elif row["kappa_last"] >= result["high"] * 0.999 and ratio > 1:
      found.append(f"{name}: kappa is at its upper bound and the KL is {format_number(ratio)} "
                   "times its target; raise kl.high or kl.beta.")
    elif 0.8 <= ratio <= 1.25:
      found.append(f"{name}: the KL is held at {format_number(ratio)} of its target.")
    else:
      found.append(f"{name}: the KL is {format_number(ratio)} of its target and kappa still moves "
                   f"({format_number(row['kappa_last'])}, between {result['low']} and "
                   f"{result['high']}).")
  here = result["here"]
  if here:
    found.append(f"Simulated at the run's rate {here['rate']} and noise "
                 f"{format_number(here['noise'], 2)}: {here['state']}"
                 + ("." if here["state"] == "stable" else "; lower kl.rate."))
  return found


def kl_text(result):
  """The tables and the advice, for a terminal."""
  columns = ("target", "kl", "ratio", "kappa_first", "kappa_last", "kappa_least", "kappa_most",
             "at_low", "at_high", "noise")
  rows = [[row["bucket"], *(format_number(row[key]) for key in columns)]
          for row in result["buckets"]]
  states = _states(result)
  return "\n".join([
    f"{result['iterations']} iterations; KL outside windows is the mean of the last third, in nats",
    text_table(["bucket", *columns], rows), "",
    f"Simulated over {STEPS} iterations: rates (rows) and noise of the KL's logarithm",
    text_table(["rate", *NOISES], [[rate, *row] for rate, row in zip(RATES, states, strict=True)]),
    "", *result["advice"]])


def kl_pictures(result):
  """{name: figure}: KL outside windows and kappa over the run, and the simulated states."""
  steps, found = result["steps"], {}
  targets = [Curve(f"target {row['bucket']}", steps, [row["target"]] * len(steps))
             for row in result["buckets"]]
  for name, title, key, unit, others in (
      ("kl_outside", "KL outside windows", "outside", "nats a token", targets),
      ("kl_kappa", "KL coefficient kappa", "kappa", "factor of kl.beta", [])):
    curves = [Curve(row["bucket"], steps, row[key]) for row in result["buckets"]
              if any(value is not None for value in row[key])] + others
    found[name] = figures.curve_figure(title, curves, y_label=unit)
  states, here, title = _states(result), result["here"], "The controller, simulated"
  if here:
    row = int(np.argmin(np.abs(np.log(np.float64(RATES) / here["rate"]))))
    column = int(np.argmin(np.abs(np.float64(NOISES) - here["noise"])))
    states[row][column] += " *"
    title += (f"; * is nearest to the run (rate {here['rate']:g}, noise {here['noise']:.2g}: "
              f"{here['state']})")
  found["kl_states"], [panel] = figures.new_figure(title, x_label="noise of the KL's logarithm",
                                                   y_labels=["rate of the controller"])
  figures.draw_states(panel, RATES, NOISES, states, TINTS)
  return found


def _states(result):
  """states[rate][noise] of the simulation."""
  by_key = {(one["rate"], one["noise"]): one["state"] for one in result["simulation"]}
  return [[by_key[rate, noise] for noise in NOISES] for rate in RATES]
