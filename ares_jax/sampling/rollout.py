"""Rollouts: sample G responses to every prompt, grade them, keep the groups worth learning from.

P prompts, G responses to each (a group), B = P*G rows.
"""

import collections
import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import numpy as np

from ares_jax.data.prompts import PromptBatch
from ares_jax.data.sharded import deliver, from_bytes, to_bytes
from ares_jax.grading.pool import GraderError
from ares_jax.grading.scoring import Scores
from ares_jax.models import flops as flops_lib
from ares_jax.models.vision import VisionInput
from ares_jax.sampling.sampler import EngineConfig, Samples, sample
from ares_jax.sampling.scheduler import History
from ares_jax.sampling.state import Drawing
from ares_jax.system import heartbeat, hosts, mesh, shares
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
  """Grades of the B responses to P prompts, and the texts of those that this process holds."""

  texts: list  # of the H * G responses to the prompts held
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
    """Samples of the H prompts of a PromptBatch that this process holds, as numpy arrays.

    P is padded to a multiple of the devices of mesh.ROWS. `finished` receives (row, tokens) of
    completed responses to any of the P prompts while others are decoded, see `sampler.sample`.
    """
    prompts_P, shards = len(prompts.sizes), shares.local_shards()
    devices = mesh.size(*mesh.ROWS)
    of_device = -(-prompts_P // devices)
    place = (shards[:, None] * of_device + np.arange(of_device)).ravel() % prompts_P
    here = dataclasses.replace(prompts.take(np.searchsorted(prompts.held, place)),
                               sizes=prompts.sizes[np.arange(devices * of_device) % prompts_P])
    with self.phases("rollout"):
      drawing = Drawing(key, self.allowed, branching, group, sampling, tuple(self.end))
      samples = sample(self.model, params, here, drawing, self.engine, finished=finished,
                       history=self.history, working=functools.partial(self.phases, "device"))
      samples = shares.fetch_rows(samples)
    if np.array_equal(place, prompts.held):
      return samples
    _, first = np.unique(place, return_index=True)  # prompts that fill up come again, or first
    rows = (first[:, None] * group + np.arange(group)).ravel()
    return jax.tree.map(lambda array: array[rows], samples)

  def answer(self, params, prompts, key, *, group, sampling, branching=None):
    """(Samples, Grades) of responses, each one graded while others are still decoded."""
    share = shares.share(len(prompts.sizes))
    number_of = {prompt * group + sample: index * group + sample  # of a row, among those held
                 for index, prompt in enumerate(prompts.held) for sample in range(group)}
    asked = {prompt * group + sample: row  # of responses to the prompts that this process owns
             for prompt, row in zip(prompts.held, prompts.rows, strict=True)
             if share.owner[prompt] == jax.process_index() for sample in range(group)}
    texts, errors, grading = {}, [], self.grader.begin()

    def add(row, tokens):
      # Other rows belong to padding or to another process.
      if row in asked and row not in texts:
        texts[row] = self.encoder.chat.text(tokens)
        grading.add(row, texts[row], asked[row], tokens)

    def finished(row, tokens):
      with self.phases("grading_meanwhile"):
        try:
          add(row, tokens)
        except (ValueError, heartbeat.StopRequested) as error:
          if jax.process_count() == 1:
            raise
          errors.append(error)  # the other processes hear of it after decoding, in `grade_sharded`

    def of(values, row):
      return values[number_of[row]][samples.mask[number_of[row]]]

    def finish():
      for error in errors:
        raise error
      for row in asked:
        add(row, of(samples.tokens, row))
      return grading.finish({row: of(samples.entropy, row) for row in asked})

    samples = self.sample(params, prompts, key, group=group, sampling=sampling,
                          branching=branching, finished=finished)
    with self.phases("grading"):
      graded = grade_sharded(finish, share, group)
    return samples, Grades([texts[row] if row in texts else
                            self.encoder.chat.text(of(samples.tokens, row))
                            for row in number_of], *graded)

  def judge(self, texts, rows):
    """float32 [n]: grades, 0 or 1, of n given responses to rows; those of this process alone."""
    grading = self.grader.begin()
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
      grading.add(index, text, row, self.encoder.chat.response(text))
    return grading.finish()[0]


def grade_sharded(grade, share, group):
  """The grades of all responses, as in Grades from `correct` on; collective.

  `grade` returns those of the responses to the prompts that this process owns.

  That is of groups of `group` responses.

  Raises:
    ValueError, heartbeat.StopRequested: on all processes, if `grade` raises it on one.
  """
  if jax.process_count() == 1:
    return grade()
  parts = [from_bytes(data, (Scores,)) for data in hosts.allgather(lambda: to_bytes(grade()))]
  correct, format_ok, timed_out, *scores = zip(*parts, strict=True)
  # The responses come process by process.
  place = np.argsort(np.argsort(np.repeat(share.owner, group), kind="stable"))
  return (np.concatenate(correct)[place], np.concatenate(format_ok)[place], sum(timed_out),
          *(Scores.join(each).take(place) for each in scores))


@dataclasses.dataclass(frozen=True)
class Rollout:
  """The graded samples of one iteration, on the host; those to the H prompts that it holds."""

  prompts: PromptBatch  # the P prompts kept
  samples: Samples  # of numpy arrays, H * G rows
  lengths: np.ndarray  # int [B]: tokens of each response
  correct: np.ndarray  # float32 [B], 0 or 1
  format_ok: np.ndarray  # float32 [B], 0 or 1
  texts: list  # H * G responses
  batches: int  # prompt batches sampled
  metrics: dict
  scores: Scores | None = None  # of the B responses

  def batch(self, rows):
    """RolloutBatch of numpy arrays; `rows` are the samples as `training.batch.pack` packs them."""
    return RolloutBatch(
      tokens=self.samples.tokens, response_mask=self.samples.mask, entropy=self.samples.entropy,
      correct=self.correct, format_ok=self.format_ok, vision=VisionInput(**self.prompts.vision()),
      rows=rows, scores=AnswerScores.of(self.scores))


class Outline(NamedTuple):
  """What every process knows of the groups of P prompts."""

  sizes: np.ndarray  # int64 [P, 4], as in PromptBatch
  shape: np.ndarray  # int [P, 2]: tokens and windows of its batch
  tokens: np.ndarray  # int64 [P, G]: of each response
  fork: np.ndarray  # int64 [P, G], as in Samples
  complete: np.ndarray  # bool [P, G]: whether it ends with an end-of-turn token
  correct: np.ndarray  # float32 [P, G], 0 or 1
  format_ok: np.ndarray  # float32 [P, G], 0 or 1

  @classmethod
  def of(cls, prompts, samples, grades, end):
    """The Outline of a PromptBatch with Samples and Grades; collective."""
    share, held = shares.share(len(prompts.sizes)), len(prompts.held)
    local = [samples.mask.sum(1), samples.fork, samples.ends_with(end)]
    tokens, fork, complete = np.moveaxis(shares.gather(share, np.stack(
      [each.reshape(held, -1) for each in local], -1).astype(np.int64)), -1, 0)
    shape = prompts.tokens.shape[1], prompts.shape.windows
    return cls(prompts.sizes, np.tile(shape, (len(prompts.sizes), 1)), tokens, fork,
               complete.astype(bool), grades.correct.reshape(tokens.shape),
               grades.format_ok.reshape(tokens.shape))


@dataclasses.dataclass(frozen=True)
class Group:
  """The G responses to one prompt, with the processes that hold it."""

  prompt: PromptBatch  # of this prompt alone
  samples: Samples  # G rows
  texts: list


def collect(generator, params, batches, key, *, group, order, sampling, config, branching=None,
            rewards=None):
  """Samples and grades batches of prompts until P groups are worth learning from.

  Groups outside the filter's band are replaced by groups of further batches. If too few groups are
  left after `config.batches` batches, dropped groups fill the rollout, so that its shape is fixed.
  Groups on which a reward function failed are never taken; where others are too few, these repeat.
  A group moves to the processes whose devices it is trained on.

  Args:
    generator, sampling, config: Generator, SamplingConfig, FilterConfig.
    params: weights to sample from.
    batches: iterator of PromptBatch of P prompts.
    key: typed PRNG key of the run.
    group: G.
    order: function of the tokens of prompts, int [P], and of responses, int [P, G]; returns the
      order of the prompts (training.minibatches.balance_minibatches).
    branching: branching.Branching, or None if every response starts at its prompt.
    rewards: function of Samples and Grades; float32 [B], what the filter with key="reward" reads.

  Returns:
    Rollout; its metrics "work/tokens" and "work/flops" count dropped groups too. "rollout/redrawn"
    is the share of tokens that were drawn twice, because pages ran out.

  Raises:
    GraderError: a reward function failed on every group.
  """
  # Groups have the number at which their prompt was drawn.
  kept, dropped, groups, totals = [], [], {}, collections.Counter()
  outlines, scores = [], []
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
    outline = Outline.of(prompts, samples, grades, generator.end)
    wanted, first = len(mean_P), totals["batches"] * len(mean_P)
    totals.update(batches=1, timed_out=grades.timed_out, in_band=in_band_P.sum(),
                  correct=float(grades.accuracy.mean()), failed=failed_P.sum(),
                  redrawn=generator.history.redrawn,
                  tokens=int(outline.tokens.sum() - outline.fork.sum()),
                  flops=_rollout_flops(generator.model, outline))
    outlines.append(outline)
    scores.append(grades.scores)
    _select(kept, dropped, first, in_band_P | (config.batches == 1) & ~failed_P, failed_P)
    groups |= {first + number: _group(prompts, samples, grades, group, index)
               for index, number in enumerate(prompts.held)
               if first + number in kept or first + number in dropped}
    groups = {number: groups[number] for number in kept + dropped if number in groups}
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
  numbers = np.array(kept + dropped)
  if not len(numbers):
    raise GraderError(f"all {totals['failed']} groups failed, the first: {grades.scores.failure}")
  if grades.scores is not None:
    metrics["rollout/failed_groups"] = totals["failed"]
    numbers = np.resize(numbers, wanted)
  drawn = Outline(*map(np.concatenate, zip(*outlines, strict=True)))
  numbers = numbers[list(order(drawn.sizes[numbers, 0], drawn.tokens[numbers]))]
  outline = Outline(*(array[numbers] for array in drawn))
  metrics["rollout/truncated"] = 1 - outline.complete.mean()
  if branching is not None:
    metrics["rollout/forked"] = (outline.fork > 0).mean()
  rows = (numbers[:, None] * group + np.arange(group)).ravel()
  scores = None if grades.scores is None else Scores.join(scores).take(rows)
  share, receivers = shares.share(wanted), collections.defaultdict(set)
  for number, holders in zip(numbers.tolist(), share.holders, strict=True):
    receivers[number].update(holders)
  del prompts  # with images that other processes will hold
  groups = deliver(groups, {number: share.owner[number % wanted] for number in receivers},
                   receivers, kinds=(Group, Samples))
  groups = [groups[numbers[place]] for place in share.held]
  prompts = PromptBatch.join([each.prompt for each in groups], *outline.shape.max(0).tolist())
  return Rollout(
    prompts=dataclasses.replace(prompts, held=share.held, sizes=outline.sizes),
    samples=jax.tree.map(lambda *parts: np.concatenate(parts), *[each.samples for each in groups]),
    lengths=outline.tokens.ravel(), correct=outline.correct.ravel(),
    format_ok=outline.format_ok.ravel(), texts=[text for each in groups for text in each.texts],
    batches=totals["batches"], metrics=metrics, scores=scores)


def _select(kept, dropped, first, useful_P, failed_P):
  """Adds the numbers of one batch's groups, from `first` on, to `kept` and `dropped`.

  They hold P groups together at most. Those that failed are in neither.
  """
  for number, useful in enumerate(useful_P, start=first):
    if len(kept) == len(useful_P):
      break
    if useful:
      kept.append(number)
    elif not failed_P[number - first] and len(kept) + len(dropped) < len(useful_P):
      dropped.append(number)
  del dropped[len(useful_P) - len(kept):]


def _group(prompts, samples, grades, size, index):
  """A copy, so that the rest of the batch can be freed."""
  rows = slice(index * size, (index + 1) * size)
  return Group(prompts.take([index]), jax.tree.map(lambda x: x[rows].copy(), samples),
               grades.texts[rows])


def _rollout_flops(model, outline):
  return sum(flops_lib.rollout_flops(
    model, prompts=outline.sizes[:, 0], answers=outline.tokens.ravel(),
    shared=outline.fork.ravel(),
    image=flops_lib.vision_flops(model.images, outline.sizes[:, 2:])).values())
