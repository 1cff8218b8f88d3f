"""Rollouts: sample G responses a prompt, grade them, keep the groups that teach something."""

import dataclasses
import functools

import jax
import numpy as np
from flax import serialization

from ares_jax.data.prompts import PromptBatch
from ares_jax.models import flops as flops_lib
from ares_jax.models.vision import VisionInput
from ares_jax.sampling.sampler import EngineConfig, sample
from ares_jax.system import heartbeat, hosts, mesh
from ares_jax.training.batch import RolloutBatch


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Online filtering (DAPO, the release): groups all right or all wrong teach nothing."""

  batches: int  # prompt batches sampled an iteration at most; 1 = keep every group
  low: float  # a group whose mean accuracy is outside [low, high] is dropped
  high: float

  def __post_init__(self):
    if self.batches < 1:
      raise ValueError(f"batches = {self.batches} must be >= 1 (1 = no filtering)")
    if not 0 <= self.low < self.high <= 1:
      raise ValueError(f"low = {self.low}, high = {self.high}: 0 <= low < high <= 1 is needed")


@dataclasses.dataclass(frozen=True)
class Generator:
  """What sampling needs besides weights and prompts; made once a run.

  Attributes:
    model: ModelConfig.
    encoder: data.prompts.Encoder.
    allowed: bool [V] numpy, tokens that may be drawn.
    end: end-of-turn token ids.
    engine: sampler.EngineConfig.
    grader: data.grade.GradingPool.
    phases: metrics.PhaseTimer.
  """

  model: object
  encoder: object
  allowed: np.ndarray
  end: tuple
  engine: EngineConfig
  grader: object
  phases: object

  def sample(self, params, prompts, key, *, group, sampling, branching=None, finished=None):
    """Samples of a PromptBatch as numpy arrays; pads P so that the devices divide it.

    `finished` takes (row, tokens) of responses while others are decoded, see `sampler.sample`.
    """
    prompts_P = len(prompts.length)
    pad = -prompts_P % mesh.size(*mesh.ROWS)
    rows = np.arange(prompts_P + pad) % prompts_P
    arrays = {
      "tokens": prompts.tokens[rows],
      "length": prompts.length[rows],
      "positions": prompts.positions[:, rows],
      "unit": prompts.unit[rows],
      "prompt_id": prompts.prompt_id[rows],
      "vision": VisionInput(**{name: array[rows] for name, array in prompts.vision.items()}),
    }
    with self.phases("rollout"):
      samples = sample(self.model, params, arrays, key, self.allowed, group=group,
                       sampling=sampling, engine=self.engine, end=self.end, branching=branching,
                       finished=finished, working=functools.partial(self.phases, "device"))
      samples = mesh.fetch(samples)
    return jax.tree.map(lambda array: array[: prompts_P * group], samples)

  def answer(self, params, prompts, key, *, group, sampling, branching=None):
    """`sample`, each response graded while others are decoded: what waits for grading is the rest.

    Returns:
      samples, texts, correct float32 [B], format_ok float32 [B], answers that timed out.
    """
    truths = [row["answer"] for row in prompts.rows for _ in range(group)]
    own, texts, faults = hosts.local_shard(range(len(truths))), {}, []
    grading = self.grader.begin()

    def add(row, tokens):
      if row in own and row not in texts:  # others are of padding, or of another process
        texts[row] = self.encoder.chat.text(tokens)
        grading.add(row, texts[row], truths[row])

    def finished(row, tokens):
      with self.phases("grading_meanwhile"):
        try:
          add(row, tokens)
        except (ValueError, heartbeat.StopRequested) as error:
          if jax.process_count() == 1:
            raise
          faults.append(error)  # the others decode on: told to them when all have ended

    def rest():
      for error in faults:
        raise error
      for row in own:
        add(row, samples.tokens[row][samples.mask[row]])
      return [texts[row] for row in own], *grading.finish()

    samples = self.sample(params, prompts, key, group=group, sampling=sampling,
                          branching=branching, finished=finished)
    with self.phases("grading"):
      return samples, *grade_sharded(rest)

  def judge(self, texts, truths):
    """(texts, correct, format_ok, answers that timed out) of texts that are there."""
    own = hosts.local_shard(texts)
    return grade_sharded(lambda: (own, *self.grader.grade(own, hosts.local_shard(truths))))


def grade_sharded(grade):
  """(texts, correct, format_ok, number timed out) of all responses; each process grades a shard.

  Args:
    grade: function that returns the same four for the responses of `hosts.local_shard`. Where it
      raises ValueError or StopRequested on one process, all processes raise it.
  """
  if jax.process_count() == 1:
    return grade()

  def local():
    try:
      return serialization.msgpack_serialize(list(grade()))
    except heartbeat.StopRequested:
      return b""

  parts = hosts.allgather(local)
  if not all(parts):
    heartbeat.heartbeat(collective=True)  # one process was asked to stop: all do
  texts, correct, format_ok, timed_out = zip(*map(serialization.msgpack_restore, parts),
                                             strict=True)
  return (hosts.join_shards(texts), np.float32(hosts.join_shards(correct)),
          np.float32(hosts.join_shards(format_ok)), sum(timed_out))


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One iteration's graded samples, on the host."""

  prompts: object  # data.prompts.PromptBatch of the P prompts kept
  samples: object  # sampler.Samples of numpy arrays
  correct: np.ndarray  # float32 [B], 0 or 1
  format_ok: np.ndarray  # float32 [B], 0 or 1
  texts: list  # B responses
  batches: int  # prompt batches drawn
  metrics: dict

  def batch(self, rows):
    """RolloutBatch of numpy arrays; `rows` are the same samples as `rows.pack` lays them out."""
    return RolloutBatch(
      tokens=self.samples.tokens, response_mask=self.samples.mask, entropy=self.samples.entropy,
      correct=self.correct, format_ok=self.format_ok, vision=VisionInput(**self.prompts.vision),
      rows=rows)


def collect(generator, params, batches, key, *, group, order, sampling, config,
            branching=None):
  """Samples and grades until P groups are worth learning from.

  Groups outside the filter's band are replaced by groups of further batches. When
  `config.batches` are drawn and too few are left, dropped groups fill up: shapes stay static.

  Args:
    generator: Generator.
    params: weights to sample from.
    batches: iterator of PromptBatch of P prompts.
    key: typed PRNG key of the run.
    group: G.
    order: of int [P, G], tokens of each prompt with each of its responses: the order of prompts
      (rows.balance).
    sampling: SamplingConfig.
    config: FilterConfig.
    branching: branching.Branching, or None where every response starts at its prompt.

  Returns:
    Rollout; of its metrics "work/tokens" are drawn, and "work/flops" what drawing them needs.
  """
  kept, dropped, drawn, in_band, timed_out, tokens, flops = [], [], 0, 0, 0, 0, 0.0
  while drawn < config.batches:
    with generator.phases("data"):
      prompts = next(batches)
    samples, texts, correct, format_ok, late = generator.answer(
      params, prompts, key, group=group, sampling=sampling, branching=branching)
    drawn, timed_out = drawn + 1, timed_out + late
    tokens += int(samples.mask.sum() - samples.fork.sum())
    flops += _drawing_flops(generator.model, prompts, samples)
    rate = correct.reshape(-1, group).mean(1)
    inside = (config.low <= rate) & (rate <= config.high)
    useful, in_band = inside | (config.batches == 1), in_band + inside.sum()
    groups = len(prompts.rows)
    for index in range(groups):
      # No more than an iteration holds: a batch's images may be gigabytes.
      if len(kept) >= groups or not useful[index] and len(kept) + len(dropped) >= groups:
        continue
      rows = slice(index * group, (index + 1) * group)
      part = (prompts.take([index]), jax.tree.map(lambda x, rows=rows: x[rows].copy(), samples),
              texts[rows], correct[rows], format_ok[rows])
      (kept if useful[index] else dropped).append(part)
    del dropped[max(0, groups - len(kept)):]
    if len(kept) >= groups:
      break
  # Work of all that was drawn: dropped groups are shorter or longer than those kept.
  metrics = {"work/tokens": tokens, "work/flops": flops,
             "rollout/batches": drawn, "rollout/timed_out": timed_out,
             "rollout/useful": float(in_band / (drawn * groups)),
             "rollout/filled": max(0, groups - len(kept)) / groups}
  chosen = (kept + dropped)[:groups]
  lengths = [prompt.length[0] + samples.mask.sum(1) for prompt, samples, *_ in chosen]
  chosen = [chosen[place] for place in order(np.stack(lengths))]
  prompts = PromptBatch.join([part[0] for part in chosen])
  samples = jax.tree.map(lambda *parts: np.concatenate(parts), *[part[1] for part in chosen])
  correct, format_ok = (np.concatenate([part[index] for part in chosen]) for index in (3, 4))
  texts = [text for part in chosen for text in part[2]]
  metrics["rollout/truncated"] = 1 - np.isin(
    samples.tokens[np.arange(len(texts)), np.maximum(samples.mask.sum(1), 1) - 1],
    generator.end).mean()
  if branching is not None:
    metrics["rollout/forked"] = (samples.fork > 0).mean()
  return Rollout(prompts, samples, correct, format_ok, texts, drawn, metrics)


def _drawing_flops(model, prompts, samples):
  image = flops_lib.vision_flops(model.vision, prompts.vision["image"])
  return sum(flops_lib.rollout_flops(model, prompts=prompts.length, answers=samples.mask.sum(1),
                                     shared=samples.fork, image=image).values())
