"""Measures how often few samples put a problem into another bucket than many would (eq. 9, 10).

Simulated problems have pass rates from a Beta distribution. It is fitted to the run's pass rates
after removing the variance that sampling G answers adds. A problem's true bucket is the one that 64
samples give. Suffixes: P problems; `_3` holds one value for each bucket.
"""

import numpy as np

from ares_jax import ops
from ares_jax.ops.difficulty import BUCKETS, bucket_of
from ares_jax.system import figures
from ares_jax.system.tables import format_number, text_table

GROUPS = (2, 4, 8, 16)
TRUE_SAMPLES = 64
PROBLEMS = 8192


def measure_passk(records):
  """How well 2, 4, 8 and 16 samples find the true bucket, and how errors change a run's rewards.

  Returns:
    dict: "problems" (logged ones that the distribution is fitted to), "a" and "b" (of the Beta),
    "run" (samples that the run draws), "groups": a list of dicts with "samples", "right" (share in
    the true bucket), "confusion" (shares [true][estimated]) and "reward" (mean absolute difference
    of a wrong answer's reward from that in the true bucket; None unless reward.kind is "aepo").
  """
  config = records.aepo_config()
  rates = {(line["step"], line["id"]): line["pass_rate"] for line in records.rollouts}
  if not rates:
    raise ValueError(f"{records.workdir}/rollouts.jsonl has no responses with pass rates; train "
                     "with config.aepo.log_responses > 0")
  a, b = fit_beta(np.float64([*rates.values()]), config.group)
  random = np.random.default_rng(0)
  chance_P = random.beta(a, b, PROBLEMS)
  true_P = sample_buckets(random, chance_P, TRUE_SAMPLES, config.reward)
  metrics = records.metrics["aepo"]
  groups = []
  for samples in GROUPS:
    bucket_P = sample_buckets(random, chance_P, samples, config.reward)
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (true_P, bucket_P), 1 / PROBLEMS)
    reward = None
    if metrics and config.reward.kind == "aepo":
      reward = _reward_difference(random, true_P, bucket_P, metrics[max(metrics)], config.reward)
    groups.append({"samples": samples, "right": float((true_P == bucket_P).mean()),
                   "confusion": confusion.round(4).tolist(), "reward": reward})
  return {"workdir": str(records.workdir), "problems": len(rates), "a": a, "b": b,
          "run": config.group, "groups": groups}


def fit_beta(rates, group):
  """(a, b) of the Beta distribution behind pass rates of `group` samples, by moments."""
  mean = float(np.clip(rates.mean(), 0.5 / len(rates) / group, 1 - 0.5 / len(rates) / group))
  # Var(rate) = Var(p) + E[p(1 - p)] / G, and E[p(1 - p)] = mean(1 - mean) - Var(p).
  spread = mean * (1 - mean)
  variance = (rates.var() - spread / group) / (1 - 1 / group)
  # At 0 all problems would be alike, at 1 each would be solved always or never.
  share = float(np.clip(variance / spread, 0.01, 0.99))
  return mean * (1 / share - 1), (1 - mean) * (1 / share - 1)


def sample_buckets(random, chance_P, samples, reward):
  """int [P]: the buckets that `samples` new answers to each problem give."""
  return bucket_of(random.binomial(samples, chance_P), samples=samples, easy=reward.easy,
                   medium=reward.medium)


def _reward_difference(random, true_P, bucket_P, line, reward):
  """Mean absolute difference of a wrong answer's reward between two assignments to buckets.

  N_HE is drawn from a Poisson distribution around the true bucket's mean of the last iteration,
  whose line of metrics.jsonl is `line`.
  """
  def by_bucket(metric):
    return np.float32([line[f"{metric}/{name}"] for name in BUCKETS])

  mean_3, target_3 = by_bucket("hwe/count"), by_bucket("hwe/target")
  multiplier_3 = by_bucket("hwe/multiplier")
  mean_3 = np.where(np.isnan(mean_3), np.nan_to_num(target_3), mean_3)
  count_P = random.poisson(mean_3[true_P]).astype(np.float32)
  wrong_P = np.zeros(len(true_P), np.float32)
  rewards = [np.asarray(ops.entropy_reward(
    wrong_P, count_P, assigned_P.astype(np.int32), target_3[assigned_P], multiplier_3[assigned_P],
    cap=reward.cap, penalize=reward.penalize)) for assigned_P in (true_P, bucket_P)]
  return float(np.abs(rewards[0] - rewards[1]).mean())


def passk_text(result):
  """The tables, for a terminal."""
  rows = [[row["samples"], f"{row['right']:.1%}", format_number(row["reward"])]
          for row in result["groups"]]
  parts = [f"{PROBLEMS} simulated problems, pass rates from Beta({result['a']:.2f}, "
           f"{result['b']:.2f}), fitted to {result['problems']} logged problems; true bucket: "
           f"{TRUE_SAMPLES} samples; the run draws {result['run']}", "",
           text_table(["samples", "in the true bucket", "change of a wrong answer's reward"], rows)]
  for row in result["groups"]:
    shares = [[name, *(f"{100 * share:.1f}" for share in of_bucket)]
              for name, of_bucket in zip(BUCKETS, row["confusion"], strict=True)]
    parts += ["", f"{row['samples']} samples: true bucket (rows) against estimate, % of problems",
              text_table(["", *BUCKETS], shares)]
  return "\n".join(parts)


def passk_pictures(result):
  """{"passk": figure}: share of problems in the true bucket by number of samples."""
  groups = [(f"{row['samples']} samples", [(100 * row["right"], f"{row['right']:.1%}"
             + (" (the run)" if row["samples"] == result["run"] else ""))])
            for row in result["groups"]]
  return {"passk": figures.bar_figure("Problems in their true bucket", groups,
                                      x_label="% of simulated problems")}
