"""Groups worth learning from: draws batches until there are enough, and brings them to their hosts.

P prompts, G responses to each (a group), B = P*G rows.
"""

import collections
import dataclasses
from typing import Literal, NamedTuple

import jax
import numpy as np

from ares_jax.data.prompts import PromptBatch
from ares_jax.data.sharded import deliver
from ares_jax.grading.pool import GraderError
from ares_jax.grading.scoring import Scores
from ares_jax.models import flops as flops_lib
from ares_jax.models.vision import VisionInput
from ares_jax.sampling.sampler import Samples
from ares_jax.system import shares
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
  drawn = _Drawn(generator.model, generator.end, config, group, branching is not None)
  while drawn.batches < config.batches and not drawn.is_complete:
    with generator.phases("data"):
      prompts = next(batches)
    samples, grades = generator.answer(params, prompts, key, group=group, sampling=sampling,
                                       branching=branching)
    value_B = grades.accuracy if config.key == "accuracy" else rewards(samples, grades)
    drawn.add(prompts, samples, grades, value_B)
    drawn.totals["redrawn"] += generator.history.redrawn
  del prompts, samples, grades  # with images that other processes will hold
  return drawn.rollout(order)


@dataclasses.dataclass
class _Drawn:
  """The groups that were drawn for a rollout, each with the number at which its prompt came."""

  model: object  # ModelConfig
  end: tuple  # end-of-turn token ids
  config: FilterConfig
  group: int  # G
  forks: bool  # whether responses may begin as another one
  wanted: int = 0  # P
  batches: int = 0
  kept: list = dataclasses.field(default_factory=list)  # numbers
  dropped: list = dataclasses.field(default_factory=list)
  groups: dict = dataclasses.field(default_factory=dict)  # {number: Group}, that this process holds
  outlines: list = dataclasses.field(default_factory=list)  # of each batch
  scores: list = dataclasses.field(default_factory=list)
  totals: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  @property
  def is_complete(self):
    """Whether P groups are kept."""
    return 0 < self.wanted == len(self.kept)

  def add(self, prompts, samples, grades, value_B):
    """Adds a batch, of whose P groups the filter reads the means of value_B; collective."""
    mean_P = value_B.reshape(-1, self.group).mean(1)
    failed_P = np.zeros(mean_P.shape, bool) if grades.scores is None else (
      grades.scores.failed.reshape(-1, self.group).any(1))
    in_band_P = (self.config.low <= mean_P) & (mean_P <= self.config.high) & ~failed_P
    outline = Outline.of(prompts, samples, grades, self.end)
    self.wanted, first = len(mean_P), self.batches * len(mean_P)
    self.batches += 1
    self.totals.update(timed_out=grades.timed_out, in_band=in_band_P.sum(),
                       correct=float(grades.accuracy[~np.repeat(failed_P, self.group)].sum()),
                       failed=failed_P.sum(),
                       tokens=int(outline.tokens.sum() - outline.fork.sum()),
                       flops=_rollout_flops(self.model, outline))
    self.outlines.append(outline)
    self.scores.append(grades.scores)
    self._select(first, in_band_P | (self.config.batches == 1) & ~failed_P, failed_P)
    chosen = self.kept + self.dropped
    self.groups |= {first + number: _group(prompts, samples, grades, self.group, index)
                    for index, number in enumerate(prompts.held) if first + number in chosen}
    self.groups = {number: self.groups[number] for number in chosen if number in self.groups}

  def _select(self, first, useful_P, failed_P):
    """Takes groups of one batch, from the number `first` on; those that failed are left out."""
    kept, dropped = self.kept, self.dropped
    for number, useful in enumerate(useful_P, start=first):
      if self.is_complete:
        break
      if useful:
        kept.append(number)
      elif not failed_P[number - first] and len(kept) + len(dropped) < self.wanted:
        dropped.append(number)
    del dropped[self.wanted - len(kept):]

  def rollout(self, order):
    """The Rollout of P groups, dropped ones where too few are kept; collective."""
    numbers, metrics, scores = np.array(self.kept + self.dropped), self._metrics(), None
    if not len(numbers):
      raise GraderError(f"all {self.totals['failed']} groups failed, the first: "
                        f"{self.scores[-1].failure}")
    if self.scores[0] is not None:
      metrics["rollout/failed_groups"] = self.totals["failed"]
      numbers = np.resize(numbers, self.wanted)
    drawn = Outline(*map(np.concatenate, zip(*self.outlines, strict=True)))
    numbers = numbers[list(order(drawn.sizes[numbers, 0], drawn.tokens[numbers]))]
    outline = Outline(*(array[numbers] for array in drawn))
    metrics["rollout/truncated"] = 1 - outline.complete.mean()
    if self.forks:
      metrics["rollout/forked"] = (outline.fork > 0).mean()
    if self.scores[0] is not None:
      rows = (numbers[:, None] * self.group + np.arange(self.group)).ravel()
      scores = Scores.join(self.scores).take(rows)
    share, groups = self._deliver(numbers)
    prompts = PromptBatch.join([each.prompt for each in groups], *outline.shape.max(0).tolist())
    return Rollout(
      prompts=dataclasses.replace(prompts, held=share.held, sizes=outline.sizes),
      samples=jax.tree.map(lambda *parts: np.concatenate(parts),
                           *[each.samples for each in groups]),
      lengths=outline.tokens.ravel(), correct=outline.correct.ravel(),
      format_ok=outline.format_ok.ravel(), texts=[text for each in groups for text in each.texts],
      batches=self.batches, metrics=metrics, scores=scores)

  def _deliver(self, numbers):
    """The Share of this process, and its Groups, which come from the processes that drew them."""
    share, receivers = shares.share(self.wanted), collections.defaultdict(set)
    for number, holders in zip(numbers.tolist(), share.holders, strict=True):
      receivers[number].update(holders)
    drawn, self.groups = self.groups, {}  # those that go elsewhere are freed
    groups = deliver(drawn, {number: share.owner[number % self.wanted] for number in receivers},
                     receivers, kinds=(Group, Samples))
    return share, [groups[numbers[place]] for place in share.held]

  def _metrics(self):
    totals, batches = self.totals, self.batches
    metrics = {"work/tokens": totals["tokens"], "work/flops": totals["flops"],
               "rollout/batches": batches, "rollout/timed_out": totals["timed_out"],
               "rollout/redrawn": float(totals["redrawn"] / batches),
               "rollout/useful": float(totals["in_band"] / (batches * self.wanted)),
               "rollout/filled": (self.wanted - len(self.kept)) / self.wanted}
    if self.config.batches > 1:
      # reward/accuracy is that of the groups in the rollout, near 0.5 whatever the policy can do.
      graded = (batches * self.wanted - totals["failed"]) * self.group
      metrics["rollout/accuracy"] = float(totals["correct"] / max(graded, 1))
    return metrics


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
