"""Answers problems and grades the answers, a batch at a time: the only evaluation loop.

held_out.py evaluates the stages of a run with it, predictions.py a model on a benchmark.
"""

import dataclasses
import functools
import time

import numpy as np

from ares_jax.data import sharded
from ares_jax.evaluation.judge import verdicts
from ares_jax.grading import quantity
from ares_jax.grading.notation import normalise
from ares_jax.grading.response import extract_boxed, well_formed
from ares_jax.run.responses import GradedResponses
from ares_jax.sampling.rollout import Grades
from ares_jax.sampling.sampler import SamplingConfig, stage_key
from ares_jax.system import hosts

SEED = 0  # of the samples, the same for runs of all seeds


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """Which problems are answered, and how."""

  problems: int  # the first rows of the source are answered
  samples: int  # answers a problem
  batch: int  # problems a sampling call
  sampling: SamplingConfig
  judge: str = ""  # "package.module:function" that grades instead of the grader (judge.py)


@dataclasses.dataclass(frozen=True)
class GradedSample:
  """One answer and its grades."""

  correct: float  # 0 or 1
  format_ok: float  # 0 or 1
  truncated: float  # 1 where max_tokens cut the answer off
  tokens: int
  response: str


@dataclasses.dataclass(frozen=True)
class GradedProblem:
  """A problem and its graded samples; a line of predictions.jsonl."""

  index: int  # of the row in its source
  id: str
  source: str | None
  level: str | None
  group: str | None
  step: str | None
  answer: list  # accepted truths
  seconds: float  # its part of the time that sampling and grading the batch took
  timed_out: int  # answers of the batch whose grading timed out; 0 but for its first problem
  samples: list  # of GradedSample


def graded_batches(generator, params, source, settings, *, done=()):
  """Yields (list of GradedProblem, GradedResponses) of every batch of problems.

  A problem's answers depend on its index alone, so an evaluation that was stopped and resumed gives
  the answers of one that was not.

  Args:
    generator: rollout.Generator.
    params: weights.
    source: random access to rows.
    settings: EvaluationSettings.
    done: indices that need no answer; a batch of nothing else is skipped.

  Raises:
    ValueError: a row cannot be used, or the judge fails.
    heartbeat.StopRequested: the process was asked to stop.
  """
  count, batch = settings.problems, settings.batch
  for start in range(0, count, batch):
    if all(index in done for index in range(start, min(start + batch, count))):
      continue
    # One shape: the last batch is filled up with rows from the front, whose answers are dropped.
    indices = np.arange(start, start + batch) % count
    rows, encoded = sharded.read_sharded(source, indices, generator.encoder.encode)
    prompts = generator.encoder.batch(rows, indices, encoded)
    yield _graded_batch(generator, params, prompts, indices[:count - start], settings)


def _graded_batch(generator, params, prompts, indices, settings):
  """What `graded_batches` yields, of the first prompts: those of the rows at `indices`."""
  group, rows = settings.samples, prompts.rows[:len(indices)]
  began = time.perf_counter()
  answer = functools.partial(_answer_ungraded, generator) if settings.judge else generator.answer
  samples, grades = answer(params, prompts, stage_key(SEED, "evaluate"), group=group,
                           sampling=settings.sampling)
  seconds = (time.perf_counter() - began) / len(rows)

  texts = grades.texts[:len(rows) * group]
  answered = [(rows[b // group], text) for b, text in enumerate(texts)]
  if settings.judge:
    correct = hosts.on_process_0(lambda: verdicts(settings.judge, answered))
  else:
    correct = [float(grade == 1 or within_tolerance(row, text))
               for grade, (row, text) in zip(grades.correct, answered, strict=False)]
  responses = GradedResponses(rows, samples, texts, correct, grades.format_ok, group)

  graded, problems = _graded_samples(responses, generator.end), []
  for number, (index, row) in enumerate(zip(indices, rows, strict=True)):
    level = row.get("level")
    problems.append(GradedProblem(
      index=int(index), id=row["id"], source=row.get("source"),
      level=None if level is None else str(level), group=row.get("group"), step=row.get("step"),
      answer=row["answer"], seconds=seconds, timed_out=0 if number else grades.timed_out,
      samples=graded[number * group:(number + 1) * group]))
  return problems, responses


def _answer_ungraded(generator, params, prompts, key, *, group, sampling):
  """(Samples, Grades) with `correct` None: a judge decides later."""
  samples = generator.sample(params, prompts, key, group=group, sampling=sampling)
  texts = [generator.encoder.chat.text(tokens[mask])
           for tokens, mask in zip(samples.tokens, samples.mask, strict=True)]
  return samples, Grades(texts, None, [well_formed(text) for text in texts], timed_out=0)


def _graded_samples(responses, end):
  """List of GradedSample, one a response; `end` are the tokens that end an answer."""
  samples = responses.samples
  tokens = samples.mask.sum(1)
  last = samples.tokens[np.arange(len(tokens)), np.maximum(tokens, 1) - 1]
  return [GradedSample(correct=responses.correct[b], format_ok=float(responses.format_ok[b]),
                       truncated=float(last[b] not in end), tokens=int(tokens[b]), response=text)
          for b, text in enumerate(responses.texts)]


def within_tolerance(row, text):
  """Whether the answer is a number at most the row's `tolerance` off a truth, in the same unit."""
  answer = extract_boxed(text) if row.get("tolerance") else None
  if answer is None or len(answer) >= 100:
    return False
  said, truths = quantity.parse_quantity(normalise(answer)), row["answer"]
  for truth in [truths] if isinstance(truths, str) else truths:
    right = quantity.parse_quantity(normalise(truth))
    if said and right and abs(said.number - right.number) <= row["tolerance"] and (
        None in (said.unit, right.unit) or (said.unit, said.size) == (right.unit, right.size)):
      return True
  return False
