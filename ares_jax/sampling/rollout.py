"""Rollouts: sample G responses to every prompt, grade them, keep the groups worth learning from.

P prompts, G responses to each (a group), B = P*G rows.
"""

import collections
import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
from flax import serialization

from ares_jax.data.prompts import PromptBatch
from ares_jax.grading.pool import GraderError
from ares_jax.grading.scoring import Scores
from ares_jax.models import flops as flops_lib
from ares_jax.models.vision import VisionInput
from ares_jax.sampling.sampler import EngineConfig, Samples, sample
from ares_jax.sampling.scheduler import History
from ares_jax.sampling.state import Drawing
from ares_jax.system import heartbeat, hosts, mesh
from ares_jax.system.config import optional
from ares_jax.training.batch import AnswerScores, RolloutBatch


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Online filtering (DAPO, the release): drops groups whose answers are all right or all wrong.

  The advantages of such a group are all 0.
  """

  batches: int  # prompt batches sampled per iteration at most; 1 = keep every group
  low: float  # a group whose mean is outside [low, high] is dropped
  high: float
  # Mean accuracy, or mean reward, entropy term included, as in the release: then groups all right
  # or all wrong are kept where their penalties are large enough.
  key: Literal["accuracy", "reward"] = optional("accuracy")

  def __post_init__(self):
    if self.batches < 1:
      raise ValueError(f"batches = {self.batches} must be >= 1 (1 = no filtering)")
    if not 0 <= self.low < self.high <= 1:
      raise ValueError(f"low = {self.low}, high = {self.high}: 0 <= low < high <= 1 is needed")


@dataclasses.dataclass(frozen=True)
class Grades:
  """Responses and their grades, all of them on every process."""

  texts: list  # B responses
  correct: np.ndarray  # float32 [B], 0 or 1
  format_ok: np.ndarray  # float32 [B], 0 or 1
  timed_out: int  # responses whose grading timed out or failed; they count as wrong
  scores: Scores | None = None  # of a scoring.Scorer; None where right is 1 and wrong 0

  @property
  def accuracy(self):
    """float32 [B] in [0, 1]."""
    return self.correct if self.scores is None else self.scores.accuracy


@dataclasses.dataclass(frozen=True)
class Generator:
  """Samples and grades responses; made once per run."""

  model: object  # ModelConfig
  encoder: object  # data.prompts.Encoder
  allowed: np.ndarray  # bool [V], tokens that may be sampled
  end: tuple  # end-of-turn token ids
  engine: EngineConfig
  grader: object  # grading.pool.GradingPool, or grading.scoring.Scorer in its place
  phases: object  # system.profiler.PhaseTimer
  history: History = dataclasses.field(default_factory=History)

  def sample(self, params, prompts, key, *, group, sampling, branching=None, finished=None):
    """Samples of a PromptBatch as numpy arrays; pads P to a multiple of the devices of mesh.ROWS.

    `finished` receives (row, tokens) of completed responses while others are decoded, see
    `sampler.sample`.
    """
    prompts_P = len(prompts.length)
    pad = -prompts_P % mesh.size(*mesh.ROWS)
    rows = np.arange(prompts_P + pad) % prompts_P
    vision = VisionInput(**{name: array[rows] for name, array in prompts.vision.items()})
    arrays = {"tokens": prompts.tokens[rows], "length": prompts.length[rows],
              "positions": prompts.positions[:, rows], "unit": prompts.unit[rows],
              "prompt_id": prompts.prompt_id[rows], "vision": vision}
    with self.phases("rollout"):
      drawing = Drawing(key, self.allowed, branching, group, sampling, tuple(self.end))
      samples = sample(self.model, params, arrays, drawing, self.engine, finished=finished,
                       history=self.history, working=functools.partial(self.phases, "device"))
      samples = mesh.fetch(samples)
    return jax.tree.map(lambda array: array[: prompts_P * group], samples)

  def answer(self, params, prompts, key, *, group, sampling, branching=None):
    """(Samples, Grades) of responses, each one graded while others are still decoded."""
    rows = [row for row in prompts.rows for _ in range(group)]
    # Whole groups: a reward function of a batch may compare the answers to a prompt.
    local_rows = {prompt * group + index: None  # in this order
                  for prompt in hosts.local_shard(range(len(prompts.rows)))
                  for index in range(group)}
    texts, errors = {}, []
    grading = self.grader.begin()

    def add(row, tokens):
      # Rows that are not local belong to padding or to another process.
      if row in local_rows and row not in texts:
        texts[row] = self.encoder.chat.text(tokens)
        grading.add(row, texts[row], rows[row], tokens)

    def finished(row, tokens):
      with self.phases("grading_meanwhile"):
        try:
          add(row, tokens)
        except (ValueError, heartbeat.StopRequested) as error:
          if jax.process_count() == 1:
            raise
          errors.append(error)  # the other processes hear of it after decoding, in `grade_sharded`

    def finish():
      for error in errors:
        raise error
      for row in local_rows:
        add(row, samples.tokens[row][samples.mask[row]])
      entropies = {row: samples.entropy[row][samples.mask[row]] for row in local_rows}
      return Grades([texts[row] for row in local_rows], *grading.finish(entropies))

    samples = self.sample(params, prompts, key, group=group, sampling=sampling,
                          branching=branching, finished=finished)
    with self.phases("grading"):
      return samples, grade_sharded(finish, group)

  def judge(self, texts, rows):
    """Grades of given responses to rows."""
    local = hosts.local_shard(texts)

    def grade():
      grading = self.grader.begin()
      for index, (text, row) in enumerate(zip(local, hosts.local_shard(rows), strict=True)):
        grading.add(index, text, row, self.encoder.chat.response(text))
      return Grades(local, *grading.finish())

    return grade_sharded(grade)


def grade_sharded(grade, group=1):
  """Grades of all responses; `grade` returns those of this process's `hosts.local_shard`.

  That is of groups of `group` responses.

  Raises:
    ValueError, heartbeat.StopRequested: on all processes, if `grade` raises it on one.
  """
  if jax.process_count() == 1:
    return grade()

  def message():
    try:
      return serialization.msgpack_serialize(dataclasses.asdict(grade()))
    except heartbeat.StopRequested:
      return b""

  messages = hosts.allgather(message)
  if not all(messages):
    heartbeat.heartbeat(collective=True)  # one process was asked to stop, so all stop
  shards = [_restore_grades(serialization.msgpack_restore(data)) for data in messages]
  scores = [shard.scores for shard in shards]

  def join(parts):
    groups = [[part[start : start + group] for start in range(0, len(part), group)]
              for part in parts]
    return [item for each in hosts.join_shards(groups) for item in each]

  return Grades(join([shard.texts for shard in shards]),
                np.float32(join([shard.correct for shard in shards])),
                np.float32(join([shard.format_ok for shard in shards])),
                sum(shard.timed_out for shard in shards),
                None if scores[0] is None else Scores.join(scores, join))


def _restore_grades(values):
  scores = values.pop("scores")
  return Grades(**values, scores=None if scores is None else Scores(**scores))


@dataclasses.dataclass(frozen=True)
class Rollout:
  """The graded samples of one iteration, on the host."""

  prompts: PromptBatch  # the P prompts kept
  samples: Samples  # of numpy arrays
  correct: np.ndarray  # float32 [B], 0 or 1
  format_ok: np.ndarray  # float32 [B], 0 or 1
  texts: list  # B responses
  batches: int  # prompt batches sampled
  metrics: dict
  scores: Scores | None = None

  def batch(self, rows):
    """RolloutBatch of numpy arrays; `rows` are the samples as `training.batch.pack` packs them."""
    return RolloutBatch(
      tokens=self.samples.tokens, response_mask=self.samples.mask, entropy=self.samples.entropy,
      correct=self.correct, format_ok=self.format_ok, vision=VisionInput(**self.prompts.vision),
      rows=rows, scores=AnswerScores.of(self.scores))


@dataclasses.dataclass(frozen=True)
class Group:
  """The G graded responses to one prompt."""

  prompt: PromptBatch  # of this prompt alone
  samples: Samples  # G rows
  texts: list
  correct: np.ndarray  # float32 [G]
  format_ok: np.ndarray  # float32 [G]
  scores: Scores | None


def collect(generator, params, batches, key, *, group, order, sampling, config, branching=None,
            rewards=None):
  """Samples and grades batches of prompts until P groups are worth learning from.

  Groups outside the filter's band are replaced by groups of further batches. If too few groups are
  left after `config.batches` batches, dropped groups fill the rollout, so that its shape is fixed.
  Groups on which a reward function failed are never taken; where others are too few, these repeat.

  Args:
    generator, sampling, config: Generator, SamplingConfig, FilterConfig.
    params: weights to sample from.
    batches: iterator of PromptBatch of P prompts.
    key: typed PRNG key of the run.
    group: G.
    order: function of int [P, G], the tokens of each prompt with each of its responses; returns the
      order of the prompts (training.batch.balance_minibatches).
    branching: branching.Branching, or None if every response starts at its prompt.
    rewards: function of Samples and Grades; float32 [B], what the filter with key="reward" reads.

  Returns:
    Rollout; its metrics "work/tokens" and "work/flops" count dropped groups too. "rollout/redrawn"
    is the share of tokens that were drawn twice, because pages ran out.

  Raises:
    GraderError: a reward function failed on every group.
  """
  kept, dropped, totals = [], [], collections.Counter()
  while totals["batches"] < config.batches:
    with generator.phases("data"):
      prompts = next(batches)
    samples, grades = generator.answer(params, prompts, key, group=group, sampling=sampling,
                                       branching=branching)
    value_B = grades.accuracy if config.key == "accuracy" else rewards(samples, grades)
    mean_P = value_B.reshape(-1, group).mean(1)
    failed_P = np.zeros(mean_P.shape, bool) if grades.scores is None else (
      grades.scores.failed.reshape(-1, group).any(1))
    in_band_P = (config.low <= mean_P) & (mean_P <= config.high) & ~failed_P
    totals.update(batches=1, timed_out=grades.timed_out, in_band=in_band_P.sum(),
                  correct=float(grades.accuracy.mean()), failed=failed_P.sum(),
                  redrawn=generator.history.redrawn,
                  tokens=int(samples.mask.sum() - samples.fork.sum()),
                  flops=_rollout_flops(generator.model, prompts, samples))
    _select(kept, dropped, functools.partial(_group, prompts, samples, grades, group),
            in_band_P | (config.batches == 1) & ~failed_P, failed_P)
    wanted = len(prompts.rows)
    if len(kept) == wanted:
      break
  metrics = {"work/tokens": totals["tokens"], "work/flops": totals["flops"],
             "rollout/batches": totals["batches"], "rollout/timed_out": totals["timed_out"],
             "rollout/redrawn": float(totals["redrawn"] / totals["batches"]),
             "rollout/useful": float(totals["in_band"] / (totals["batches"] * wanted)),
             "rollout/filled": (wanted - len(kept)) / wanted}
  if config.batches > 1:
    # reward/accuracy is that of the groups in the rollout, near 0.5 whatever the policy can do.
    metrics["rollout/accuracy"] = float(totals["correct"] / totals["batches"])
  groups = kept + dropped
  if not groups:
    raise GraderError(f"all {totals['failed']} groups failed, the first: {grades.scores.failure}")
  if grades.scores is not None:
    metrics["rollout/failed_groups"] = totals["failed"]
    groups = [groups[index % len(groups)] for index in range(wanted)]
  lengths_PG = [each.prompt.length[0] + each.samples.mask.sum(1) for each in groups]
  groups = [groups[index] for index in order(np.stack(lengths_PG))]
  samples = jax.tree.map(lambda *parts: np.concatenate(parts), *[each.samples for each in groups])
  metrics["rollout/truncated"] = 1 - samples.ends_with(generator.end).mean()
  if branching is not None:
    metrics["rollout/forked"] = (samples.fork > 0).mean()
  return Rollout(
    prompts=PromptBatch.join([each.prompt for each in groups]), samples=samples,
    correct=np.concatenate([each.correct for each in groups]),
    format_ok=np.concatenate([each.format_ok for each in groups]),
    texts=[text for each in groups for text in each.texts],
    batches=totals["batches"], metrics=metrics,
    scores=None if grades.scores is None else Scores.join([each.scores for each in groups]))


def _select(kept, dropped, group, useful_P, failed_P):
  """Adds the groups of one batch to `kept` and `dropped`, which hold P groups together at most.

  Those that failed are in neither. `group` returns a copy of the Group with a given index. Groups
  that are not needed are not copied: the images of a batch may be gigabytes.
  """
  for index, useful in enumerate(useful_P):
    if len(kept) == len(useful_P):
      break
    if useful:
      kept.append(group(index))
    elif not failed_P[index] and len(kept) + len(dropped) < len(useful_P):
      dropped.append(group(index))
  del dropped[len(useful_P) - len(kept):]


def _group(prompts, samples, grades, size, index):
  rows = slice(index * size, (index + 1) * size)
  return Group(prompts.take([index]), jax.tree.map(lambda x: x[rows].copy(), samples),
               grades.texts[rows], grades.correct[rows], grades.format_ok[rows],
               None if grades.scores is None else grades.scores.take(rows))


def _rollout_flops(model, prompts, samples):
  image = flops_lib.vision_flops(model.images, prompts.vision["image"])
  return sum(flops_lib.rollout_flops(model, prompts=prompts.length, answers=samples.mask.sum(1),
                                     shared=samples.fork, image=image).values())
