"""Samples G responses to every prompt and grades them.

P prompts, G responses to each (a group), B = P*G rows.
"""

import dataclasses
import functools

import jax
import numpy as np

from ares_jax.data.sharded import from_bytes, to_bytes
from ares_jax.grading.scoring import Scores
from ares_jax.sampling.sampler import EngineConfig, sample
from ares_jax.sampling.scheduler import History
from ares_jax.sampling.state import Drawing
from ares_jax.system import heartbeat, hosts, mesh, shares


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

  `grade` returns those of the groups, of `group` responses each, that this process owns.

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
