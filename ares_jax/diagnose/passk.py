"""How often do few samples put a problem into another bucket than many would (eq. 9, 10)?

Problems are drawn from a Beta distribution that has the mean and variance of the run's pass rates
less the noise of G samples; their truth is the bucket of 64 samples.
"""

import numpy as np

from ares_jax import ops
from ares_jax.diagnose.tables import format_number, text_table
from ares_jax.ops.difficulty import BUCKETS, bucket_of

GROUPS = (2, 4, 8, 16)
TRUTH = 64
PROBLEMS = 8192


def measure_passk(records):
  """Confusions of bucket assignments by number of samples, and what they do to rewards.

  Returns:
    dict: problems (logged ones that the distribution is fitted to), a, b (of the Beta), groups:
    a list of dicts with samples, right (share), confusion (shares [truth][estimate]), reward (mean
    absolute difference of a wrong answer's reward to the true bucket's; None without AEPO's).

  Raises:
    ValueError: the run has no logged rollouts.
  """
  config = records.aepo_config()
  rates = list({(line["step"], line["id"]): line["pass_rate"]
                for line in records.rollouts}.values())
  if not rates:
    raise ValueError(f"{records.workdir}/rollouts.jsonl has no responses with pass rates; train "
                     "with config.aepo.log_responses > 0")
  a, b = fit_beta(np.float64(rates), config.group)
  random = np.random.default_rng(0)
  chance_P = random.beta(a, b, PROBLEMS)
  truth_P = assign_buckets(random, chance_P, TRUTH, config.reward)
  metrics = records.aepo_metrics()
  groups = []
  for samples in GROUPS:
    guess_P = assign_buckets(random, chance_P, samples, config.reward)
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (truth_P, guess_P), 1 / PROBLEMS)
    groups.append({"samples": samples, "right": float((truth_P == guess_P).mean()),
                   "confusion": confusion.round(4).tolist(),
                   "reward": _effect(random, truth_P, guess_P, metrics[max(metrics)], config.reward)
                   if metrics and config.reward.kind == "aepo" else None})
  return {"workdir": records.workdir, "problems": len(rates), "a": a, "b": b,
          "run": config.group, "groups": groups}


def fit_beta(rates, group):
  """(a, b) of the Beta distribution behind pass rates of `group` samples, by moments."""
  mean = float(np.clip(rates.mean(), 0.5 / len(rates) / group, 1 - 0.5 / len(rates) / group))
  # Var(rate) = Var(p) + E[p(1 - p)] / G, and E[p(1 - p)] = mean(1 - mean) - Var(p).
  spread = mean * (1 - mean)
  variance = (rates.var() - spread / group) / (1 - 1 / group)
  # Kept off both ends: all problems alike, or each always or never solved.
  share = float(np.clip(variance / spread, 0.01, 0.99))
  return mean * (1 / share - 1), (1 - mean) * (1 / share - 1)


def assign_buckets(random, chance_P, samples, reward):
  """int [P]: buckets of problems by `samples` fresh answers to each."""
  return bucket_of(random.binomial(samples, chance_P), samples=samples, easy=reward.easy,
                   medium=reward.medium)


def _effect(random, truth_P, guess_P, line, reward):
  """Mean |reward of the guessed bucket - of the true one| of a wrong answer.

  N_HE is drawn around the true bucket's mean of the last iteration (Poisson).
  """
  def of_bucket(metric):
    values = [line[f"{metric}/{name}"] for name in BUCKETS]
    return np.float32([np.nan if value is None else value for value in values])

  mean_3, target_3, multiplier_3 = map(of_bucket, ("hwe/count", "hwe/target", "hwe/multiplier"))
  mean_3 = np.where(np.isnan(mean_3), np.nan_to_num(target_3), mean_3)
  count_P = random.poisson(mean_3[truth_P]).astype(np.float32)
  wrong_P = np.zeros(len(truth_P), np.float32)
  rewards = [np.asarray(ops.entropy_reward(
    wrong_P, count_P, bucket_P.astype(np.int32), target_3[bucket_P], multiplier_3[bucket_P],
    cap=reward.cap, penalize=reward.penalize)) for bucket_P in (truth_P, guess_P)]
  return float(np.abs(rewards[0] - rewards[1]).mean())


def passk_text(result):
  """The tables."""
  parts = [f"{PROBLEMS} simulated problems, pass rates Beta({result['a']:.2f}, {result['b']:.2f}) "
           f"as of {result['problems']} logged problems; truth: {TRUTH} samples; the run draws "
           f"{result['run']}", "",
           text_table(["samples", "in the true bucket", "change of a wrong answer's reward"],
                 [[row["samples"], f"{row['right']:.1%}", format_number(row["reward"])]
                  for row in result["groups"]])]
  for row in result["groups"]:
    parts += ["", f"{row['samples']} samples: truth (rows) against estimate, % of problems",
              text_table(["", *BUCKETS], [[name, *(f"{100 * share:.1f}" for share in shares)]
                                          for name, shares
                                          in zip(BUCKETS, row["confusion"], strict=True)])]
  return "\n".join(parts)
