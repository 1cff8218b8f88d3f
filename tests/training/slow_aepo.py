"""AEPO as the paper has it, a sequence and a token at a time, in float64, to compare with.

Sections 3.2.1 and 3.2.2, algorithm 1, eq. 2-4, 9, 10, 27, with this repository's choices (README,
"What differs from the paper") and no code of its own. Arrays of a response have its own length;
sequence b is sample b % G of prompt b // G. A bucket is 0 easy, 1 medium, 2 hard.
"""

import math

import numpy as np


class Slow:
  """What is remembered between iterations, and the steps of one."""

  def __init__(self, config):
    self.config = config
    self.threshold = math.nan
    self.target = [math.nan] * 3
    self.multiplier = [0.0] * 3
    self.kappa = list(config.kl.start)
    self.alpha = [0.5] * 3

  def shape(self, entropies, correct):
    """Sets what the loss of this iteration needs (algorithm 1 lines 5-15), moves what it may."""
    config, w = self.config, self.config.entropy.window
    windows = [[sum(entropy[t:t + w]) / w for t in range(len(entropy) - w + 1)]
               for entropy in entropies]
    quantiles = [linear_quantile(means, config.entropy.quantile) for means in windows if means]
    self.threshold = average(self.threshold, sum(quantiles) / len(quantiles), config.entropy.decay)
    flags = [[mean >= self.threshold for mean in means] for means in windows]
    self.cover = [[any(flags[b][s] for s in range(max(0, t - w + 1), min(t + 1, len(flags[b]))))
                   for t in range(len(entropy))] for b, entropy in enumerate(entropies)]
    self.count = [sum(row) for row in flags]

    group = config.group
    self.bucket = []
    for b in range(len(correct)):
      first = b // group * group
      rate = sum(correct[first:first + group]) / group
      self.bucket.append(0 if rate >= config.reward.easy else
                         1 if rate >= config.reward.medium else 2)
    target = [scale * value
              for scale, value in zip(config.reward.target_scale, self.target, strict=True)]
    for d in range(3):
      counts = [self.count[b] for b in range(len(correct)) if self.bucket[b] == d]
      if not counts:
        continue
      mean = sum(counts) / len(counts)
      variance = sum((count - mean) ** 2 for count in counts) / len(counts)
      if math.isnan(target[d]):
        target[d] = mean
      excess = mean - target[d]
      violation = (excess, abs(excess), -excess)[d]
      self.multiplier[d] = max(0.0, violation) / (max(variance, config.reward.var_floor) + 1e-6)
      self.target[d] = average(self.target[d], mean, config.reward.target_decay)

    self.reward = []
    for b in range(len(correct)):
      excess, d = self.count[b] - target[self.bucket[b]], self.bucket[b]
      distance = (max(0, excess), abs(excess), max(0, -excess))[d]
      penalty = min(self.multiplier[d] * distance, config.reward.cap)
      self.reward.append(correct[b] - (penalty if correct[b] == 0 else 0))
    self.advantage = []
    for b in range(len(correct)):
      first = b // group * group
      rewards, right = self.reward[first:first + group], correct[first:first + group]
      mean = sum(rewards) / group
      deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (group - 1))
      advantage = (self.reward[b] - mean) / (deviation + 1e-6) if len(set(right)) > 1 else 0.0
      psi = [self.multiplier[self.bucket[b]] * max(0, windows[b][t] - self.threshold)
             if t < len(flags[b]) and flags[b][t] else 0.0 for t in range(len(entropies[b]))]
      self.advantage.append([advantage + config.reward.token_bonus * (x - sum(psi) / len(psi))
                             for x in psi])

  def loss(self, logprob, old, sampler, reference):
    """(policy loss, KL loss, d loss / d logprob); lists of arrays (lines 16-22)."""
    loss, kl = self.config.loss, self.config.kl
    tokens = sum(len(row) for row in logprob)
    policy = penalty = 0.0
    slopes = [np.zeros(len(row)) for row in logprob]
    self.kl = [np.zeros(len(row)) for row in logprob]
    self.clipped = {"low": 0, "high": 0, "dual": 0}
    for b, row in enumerate(logprob):
      share = 1 / tokens if loss.average == "token" else 1 / (len(logprob) * len(row))
      for t, now in enumerate(row):
        ratio, advantage = math.exp(now - old[b][t]), self.advantage[b][t]
        clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
        weight = share
        if loss.old_logprob == "recompute":
          weight *= min(math.exp(old[b][t] - sampler[b][t]), loss.importance_cap)
        value, slope = -advantage * ratio, -advantage * ratio
        if -advantage * clipped > value:
          value, slope = -advantage * clipped, 0.0
          self.clipped["low" if ratio < 1 else "high"] += 1
        if advantage < 0 and value > -advantage * loss.clip_dual:
          value, slope = -advantage * loss.clip_dual, 0.0
          self.clipped["dual"] += 1
        policy += weight * value
        gap = reference[b][t] - now
        self.kl[b][t] = math.exp(gap) - gap - 1
        beta = kl.beta[self.bucket[b]] * self.kappa[self.bucket[b]] * share
        beta *= kl.rho if self.cover[b][t] else 1
        penalty += beta * self.kl[b][t]
        slopes[b][t] = weight * slope + beta * (1 - math.exp(gap))
    return policy, penalty, slopes

  def control(self):
    """Moves kappa by the KL outside windows (lines 23-24)."""
    kl = self.config.kl
    for d in range(3):
      outside = [self.kl[b][t] for b in range(len(self.kl)) if self.bucket[b] == d
                 for t in range(len(self.kl[b])) if not self.cover[b][t]]
      if outside:
        mean = sum(outside) / len(outside)
        moved = self.kappa[d] * (1 + kl.rate * (mean / kl.target[d] - 1))
        self.kappa[d] = min(max(moved, kl.low), kl.high)


def average(old, new, decay):
  return new if math.isnan(old) else decay * old + (1 - decay) * new


def linear_quantile(values, quantile):
  ordered, rank = sorted(values), quantile * (len(values) - 1)
  low = math.floor(rank)
  high = min(low + 1, len(values) - 1)
  return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def moments(config, gradient, first, second):
  """Adam's moments after clipping; dicts of float64 arrays."""
  norm = math.sqrt(sum((x**2).sum() for x in gradient.values()))
  scale = min(1.0, config.clip / norm)
  return ({name: config.b1 * first[name] + (1 - config.b1) * scale * g
           for name, g in gradient.items()},
          {name: config.b2 * second[name] + (1 - config.b2) * (scale * g) ** 2
           for name, g in gradient.items()})


def descend(config, params, first, second, count):
  """Weights after AdamW's update number `count`, the first being 1."""
  return {name: x - config.learning_rate * (
    (first[name] / (1 - config.b1**count))
    / (np.sqrt(second[name] / (1 - config.b2**count)) + config.eps) + config.weight_decay * x)
          for name, x in params.items()}
