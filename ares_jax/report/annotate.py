"""Annotates logged responses with their windows, buckets, rewards and KL weights.

It calls the ops of training with the logged numbers of each iteration. Suffixes: B responses, T
tokens; `_3` holds one value for each bucket.
"""

import collections
import dataclasses

import numpy as np

from ares_jax import ops
from ares_jax.data.trigger_words import are_triggers
from ares_jax.ops.difficulty import BUCKETS, bucket_of
from ares_jax.ops.window_entropy import hwe_starts

_BATCH = 64  # responses in one call of an op


@dataclasses.dataclass(frozen=True)
class Annotated:
  """A logged response with its annotations."""

  line: dict  # of rollouts.jsonl or held_out/STAGE.jsonl
  held_out: bool
  bucket: int
  # tau, nats; None before the first AEPO iteration, or if entropies were not finite
  threshold: float | None
  count: int | None  # N_HE
  entropy: np.ndarray  # float32 [T], nats; nan where the sampler's was not finite
  flag: np.ndarray  # bool [T], high-window-entropy tokens
  cover: np.ndarray  # bool [T], inside their windows
  trigger: np.ndarray  # bool [T], in V_sem
  mean: np.ndarray  # float32 [T], window means in nats; nan if no complete window starts
  reward: dict | None  # terms of the reward; None for held-out answers, which get none
  advantage: float | None = None  # within its group; None where not all of the group was logged


def annotate(lines, metrics, config, *, held_out=False):
  """Annotates lines of rollouts.jsonl or, `held_out`, of held_out/STAGE.jsonl, in their order.

  `metrics` is {step: line of metrics.jsonl} of the AEPO stage; ValueError if a line's step is not
  in it. Held-out answers all get the last threshold, so that stages can be compared.
  """
  last = max(metrics) if metrics else None
  found = []
  # Sorted by length, so that a batch has little padding.
  order = sorted(range(len(lines)), key=lambda index: len(lines[index]["tokens"]))
  for start in range(0, len(order), _BATCH):
    batch = [lines[index] for index in order[start : start + _BATCH]]
    steps = [last if held_out else line["step"] for line in batch]
    unknown = sorted({step for step in steps if step is not None and step not in metrics})
    if unknown:
      raise ValueError(f"rollouts.jsonl has iterations that metrics.jsonl lacks: {unknown[:5]}; "
                       "give the folder of a single run")
    found += _annotate(batch, steps, metrics, config, held_out)
  found = [found[index] for index in np.argsort(order)]
  return found if held_out else _with_advantages(found, config)


def _with_advantages(rows, config):
  """The rows of rollouts with their advantages, where all answers of a group are among them."""
  groups = collections.defaultdict(list)
  for index, row in enumerate(rows):
    groups[row.line["step"], row.line["id"]].append(index)
  whole = [index for group in groups.values() if len(group) == config.group for index in group]
  if not whole:
    return rows
  correct_B = np.float32([_base_reward(rows[index].line) for index in whole])
  advantage_B = ops.group_advantage(
    np.float32([rows[index].reward["total"] for index in whole]), group=config.group,
    normalize=config.loss.advantage,
    correct_B=correct_B if config.loss.equal_groups == "zero" else None)
  rows = list(rows)
  for index, advantage in zip(whole, np.asarray(advantage_B), strict=True):
    rows[index] = dataclasses.replace(rows[index], advantage=float(advantage))
  return rows


def _annotate(batch, steps, metrics, config, held_out):
  """Annotates a batch after padding it to one shape."""
  lengths = [len(line["tokens"]) for line in batch]
  # Powers of two, so that few programs are compiled.
  capacity = max(32, 1 << (max(lengths) - 1).bit_length()) if max(lengths) else 32
  entropy_BT, mask_BT, trigger_BT = (np.zeros((_BATCH, capacity), kind)
                                     for kind in (np.float32, bool, bool))
  threshold_B = np.full(_BATCH, np.inf, np.float32)
  for row, (line, length, step) in enumerate(zip(batch, lengths, steps, strict=True)):
    entropy_BT[row, :length], mask_BT[row, :length] = line["entropy"], True
    trigger_BT[row, :length] = are_triggers(line["tokens"])
    if step is not None:
      threshold_B[row] = metrics[step]["hwe/threshold"]
  window = config.entropy.window
  mean_BT, complete_BT = ops.window_entropy(entropy_BT, mask_BT, window=window)
  flag_BT = ops.hwe_flags(entropy_BT, mask_BT, threshold_B, window=window,
                          detector=config.entropy.detector, semantic_BT=trigger_BT)
  cover_BT = ops.hwe_cover(hwe_starts(flag_BT, detector=config.entropy.detector), mask_BT,
                           window=window if config.entropy.cover == "window" else 1)
  mean_BT = np.where(complete_BT, mean_BT, np.nan)
  flag_BT, cover_BT = np.asarray(flag_BT), np.asarray(cover_BT)
  right_B = np.float64([line["pass_rate"] * config.group for line in batch])
  if not any("accuracy" in line for line in batch):
    right_B = np.round(right_B)
  bucket_B = bucket_of(right_B, samples=config.group, easy=config.reward.easy,
                       medium=config.reward.medium)
  found = []
  for row, (line, length, step) in enumerate(zip(batch, lengths, steps, strict=True)):
    bucket, count, threshold = int(bucket_B[row]), int(flag_BT[row].sum()), float(threshold_B[row])
    found.append(Annotated(
      line=line, held_out=held_out, bucket=bucket, count=None if step is None else count,
      threshold=threshold if np.isfinite(threshold) else None,
      reward=None if held_out else _reward_terms(line, bucket, count, metrics, config),
      **{name: array_BT[row, :length] for name, array_BT in (
        ("entropy", entropy_BT), ("flag", flag_BT), ("cover", cover_BT), ("trigger", trigger_BT),
        ("mean", mean_BT))}))
  return found


def _base_reward(line):
  """What a logged response is worth before AEPO shapes its reward."""
  return line.get("reward", line["correct"])


def _reward_terms(line, bucket, count, metrics, config):
  """The terms of a response's reward and its KL weights."""
  reward, step, name = config.reward, line["step"], BUCKETS[bucket]
  now, before = metrics[step], metrics.get(step - 1)  # the first iteration has no line before it
  target, multiplier = now[f"hwe/target/{name}"], now[f"hwe/multiplier/{name}"]
  correct_B, count_B = np.float32([line["correct"]]), np.float32([count])
  bucket_B, target_B = np.int32([bucket]), np.float32([target])
  total_B = correct_B
  if reward.kind == "aepo":
    total_B = ops.entropy_reward(correct_B, count_B, bucket_B, target_B, np.float32([multiplier]),
                                 cap=reward.cap, penalize=reward.penalize)
  elif reward.kind == "continuous":
    total_B = ops.continuous_reward(correct_B, count_B, np.float32([line["pass_rate"]]), target_B,
                                    np.float32([multiplier]), cap=reward.cap,
                                    penalize=reward.penalize)
  elif reward.kind == "release":
    alpha = before[f"reward/alpha/{name}"] if before else 0.5
    total_B, _ = ops.release_reward(correct_B, count_B, bucket_B, target_B, np.float32([alpha]))
  # A line has kappa after its update; the iteration used the kappa of the line before.
  kappa_3 = np.float32([before[f"kl/kappa/{bucket}"] for bucket in BUCKETS] if before
                       else config.kl.start)
  weight = np.asarray(ops.kl_weight(
    bucket_B, np.bool_([[False, True]]), beta_3=np.float32(config.kl.beta) * kappa_3,
    rho=config.kl.rho if config.kl.dynamic else 1.0))[0]
  base, shaping = _base_reward(line), float(total_B[0] - correct_B[0])
  return {"accuracy": base, "shaping": shaping,
          "total": base + shaping if "reward" in line else float(total_B[0]),
          "target": target, "multiplier": multiplier, "kl_outside": float(weight[0]),
          "kl_inside": float(weight[1])}
