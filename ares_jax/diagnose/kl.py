"""Does the controller hold the KL outside windows at its target (algorithm 1 line 24, eq. 27)?

What the run did, and a simulation of the same controller over rates and noise. `_3` holds a value
for each bucket; in the simulation for each of three random seeds.
"""

import numpy as np

from ares_jax import ops
from ares_jax.diagnose.tables import format_number, text_table
from ares_jax.ops.difficulty import BUCKETS

RATES = (0.01, 0.03, 0.1, 0.3, 0.6, 0.9)
NOISES = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5)
STEPS = 300
# The simulated policy: of the way to the KL that a kappa leads to it goes so much an iteration.
RESPONSE = 0.3
# Over the last half: kappa at a bound in more of the iterations, its logarithm's deviation beyond.
AT_BOUND, SWING = 0.2, 0.35


def measure_kl(records):
  """What the run's controller did, by bucket, and the simulation.

  Returns:
    dict: rate, low, high, buckets (a list of dicts), simulation (a list of dicts), here (the
    simulated state at the run's rate and noise), advice (a list of sentences).

  Raises:
    ValueError: the run has no AEPO iterations yet.
  """
  config, lines = records.aepo_config().kl, [
    line for _, line in sorted(records.aepo_metrics().items())]
  if not lines:
    raise ValueError(f"{records.workdir}/metrics.jsonl has no AEPO iterations yet")
  buckets = [bucket_summary(name, lines, config, config.target[index])
             for index, name in enumerate(BUCKETS)]
  noise = [row["noise"] for row in buckets if row["noise"] is not None]
  here = simulate(config.rate, max(noise), low=config.low, high=config.high) if noise else None
  simulation = [simulate(rate, level, low=config.low, high=config.high)
                for rate in RATES for level in NOISES]
  result = {"workdir": records.workdir, "dynamic": config.dynamic, "rate": config.rate,
            "low": config.low, "high": config.high, "iterations": len(lines), "buckets": buckets,
            "simulation": simulation, "here": here}
  return result | {"advice": kl_advice(result)}


def bucket_summary(name, lines, config, target):
  """One bucket over the run: kappa, KL of the last third against its target, noise of the KL."""
  kl = np.float64([np.nan if line[f"kl/outside/{name}"] is None else line[f"kl/outside/{name}"]
                   for line in lines])
  kappa = np.float64([line[f"kl/kappa/{name}"] for line in lines])
  late = kl[len(kl) * 2 // 3 :]
  late = late[np.isfinite(late)]
  seen = kl[np.isfinite(kl) & (kl > 0)]
  # From one iteration to the next, in logarithms: the trend drops out. The median, because the
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
          "at_high": float((kappa >= config.high * 0.999).mean()), "noise": noise}


def simulate(rate, noise, *, low, high, steps=STEPS, response=RESPONSE):
  """The controller against a policy whose KL settles at target / kappa.

  Args:
    rate: of the controller, in (0, 1).
    noise: deviation of the measured KL's logarithm.
    low, high: bounds of kappa.
    steps: iterations.
    response: share of the way to the settled KL that an iteration goes, in (0, 1].

  Returns:
    dict: rate, noise, state ("stable", "oscillating", "diverging"), swing (deviation of log kappa
    over the last half), at_bound (share of it), ratio (mean KL over target).
  """
  random, size_3 = np.random.default_rng(0), np.ones(3, np.float32)
  target_3 = np.ones(3, np.float32)
  # Three seeds that start away from where they settle, the policy at four times the target.
  kappa_3, kl_3 = np.clip(np.ones(3, np.float32), low, high), np.full(3, 4.0)
  path = []
  for _ in range(steps):
    kl_3 = kl_3 + response * (1 / np.float64(kappa_3) - kl_3)
    measured_3 = np.float32(kl_3 * np.exp(noise * random.standard_normal(3) - noise**2 / 2))
    kappa_3 = np.asarray(ops.track_kl_coefficient(
      kappa_3, measured_3, size_3, target_3=target_3, rate=rate, low=low, high=high))
    path.append((kappa_3, kl_3))
  kappa, kl = (np.float64([one[part] for one in path[steps // 2 :]]) for part in (0, 1))
  at_bound = ((kappa <= low * 1.001) | (kappa >= high * 0.999)).mean()
  swing = np.log(kappa).std(0).mean()
  state = "diverging" if at_bound > AT_BOUND else "oscillating" if swing > SWING else "stable"
  return {"rate": rate, "noise": noise, "state": state, "swing": float(swing),
          "at_bound": float(at_bound), "ratio": float(kl.mean())}


def kl_advice(result):
  """What the numbers say, a sentence a finding."""
  if not result["dynamic"]:
    return ["kl.dynamic is off: kappa stays where it was."]
  found = []
  for row in result["buckets"]:
    name, ratio = row["bucket"], row["ratio"]
    if ratio is None:
      found.append(f"{name}: no tokens of this bucket in the last third; its kappa stands still.")
    elif row["kappa_last"] <= result["low"] * 1.001 and ratio < 1:
      found.append(
        f"{name}: kappa is at its lower bound and the KL still {format_number(ratio)} of its "
        "target: the budget does not bind; lower kl.target to make it.")
    elif row["kappa_last"] >= result["high"] * 0.999 and ratio > 1:
      found.append(
        f"{name}: kappa is at its upper bound and the KL {format_number(ratio)} times its "
        "target: raise kl.high or kl.beta.")
    elif 0.8 <= ratio <= 1.25:
      found.append(f"{name}: the KL is held, {format_number(ratio)} of its target.")
    else:
      found.append(
        f"{name}: the KL is {format_number(ratio)} of its target and kappa still moves "
        f"({format_number(row['kappa_last'])}, within {result['low']} to {result['high']}).")
  here = result["here"]
  if here:
    found.append(f"Simulated at the run's rate {here['rate']} and noise "
                 f"{format_number(here['noise'], 2)}: {here['state']}"
                 + ("." if here["state"] == "stable" else "; lower kl.rate."))
  return found


def kl_text(result):
  """The tables and the advice."""
  columns = ("target", "kl", "ratio", "kappa_first", "kappa_last", "kappa_least", "kappa_most",
             "at_low", "at_high", "noise")
  by_key = {(one["rate"], one["noise"]): one for one in result["simulation"]}
  return "\n".join([
    f"{result['iterations']} iterations; KL outside windows is the mean of the last third, in nats",
    text_table(["bucket", *columns], [[row["bucket"], *(format_number(row[key]) for key in columns)]
                                 for row in result["buckets"]]), "",
    f"Simulated over {STEPS} iterations: rates (rows) and noise of the KL's logarithm", text_table(
      ["rate", *NOISES], [[rate, *(by_key[rate, noise]["state"] for noise in NOISES)]
                          for rate in RATES]), "", *result["advice"]])
