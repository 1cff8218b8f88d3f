"""Answers problems and grades the answers, a batch at a time: the only evaluation loop.

held_out.py evaluates the stages of a run with it, predictions.py a model on a benchmark.
"""

import dataclasses
import functools
import time
from fractions import Fraction

import numpy as np

from ares_jax.data import sharded
from ares_jax.grading import quantity, sandbox
from ares_jax.grading.collection import pair_up, split_items
from ares_jax.grading.notation import normalise
from ares_jax.grading.pool import GraderError
from ares_jax.grading.response import extract_boxed, shows_work, well_formed
from ares_jax.run.responses import GradedResponses
from ares_jax.sampling.rollout import Grades
from ares_jax.sampling.sampler import SamplingConfig, stage_key
from ares_jax.system import heartbeat, hosts, shares

SEED = 0  # of the samples, the same for runs of all seeds


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """How problems are answered and graded."""

  samples: int  # answers a problem
  sampling: SamplingConfig
  judge: str = ""  # "package.module:function" that grades instead of the grader, see `verdicts`


@dataclasses.dataclass(frozen=True)
class GradedSample:
  """One answer and its grades."""

  correct: float  # 0 or 1
  format_ok: float  # 0 or 1
  truncated: float  # 1 where max_tokens cut the answer off
  tokens: int
  shows_work: float  # 0 or 1
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


def prompt_batches(generator, source, problems, batch, *, done=()):
  """Yields (indices, PromptBatch) of the first rows of a source, `batch` at a time.

  All batches have one shape: the last is filled up with rows from the front, which are not in its
  `indices`. A batch is skipped if all its indices are in `done`.

  Raises:
    ValueError: the source has fewer rows than `problems`, or a row cannot be used.
  """
  require_rows(source, problems)
  for start in range(0, problems, batch):
    numbers = np.arange(start, start + batch) % problems
    indices = numbers[:problems - start]
    if not all(index in done for index in indices):
      part = sharded.read_sharded(source, numbers, generator.encoder.encode)
      yield indices, part.prompts(generator.encoder, numbers)


def require_rows(source, problems):
  """Raises ValueError if a source has fewer rows than `problems`."""
  if len(source) < problems:
    raise ValueError(f"{problems} problems to evaluate on, the source has {len(source)}; "
                     "lower evaluate.problems")


def answer_batch(generator, params, indices, prompts, settings):
  """(list of GradedProblem, GradedResponses) of a batch of `prompt_batches`.

  A problem's answers depend on its index alone, so an evaluation that was stopped and resumed gives
  the answers of one that was not.

  Raises:
    ValueError: the judge fails.
    heartbeat.StopRequested: the process was asked to stop.
  """
  group, share = settings.samples, shares.share(len(prompts.sizes))
  began = time.perf_counter()
  answer = functools.partial(_answer_ungraded, generator) if settings.judge else generator.answer
  samples, grades = answer(params, prompts, stage_key(SEED, "evaluate"), group=group,
                           sampling=settings.sampling)
  seconds = (time.perf_counter() - began) / len(indices)

  # Every process learns all rows and texts, but no image.
  local = zip([row | {"images": []} for row in prompts.rows], *(
    [list(values[start:start + group]) for start in range(0, len(values), group)]
    for values in (grades.texts, samples.mask.sum(1).tolist(),
                   samples.ends_with(generator.end).tolist())), strict=True)
  rows, *of_rows = zip(*sharded.gather(share, list(local))[:len(indices)], strict=True)
  texts, tokens_B, complete_B = (sum(values, []) for values in of_rows)
  answered = [(rows[b // group], text) for b, text in enumerate(texts)]
  if settings.judge:
    correct = hosts.on_process_0(lambda: verdicts(settings.judge, answered))
    format_ok = [float(well_formed(text)) for text in texts]
  else:
    correct = [float(grade == 1 or within_tolerance(row, text))
               for grade, (row, text) in zip(grades.correct, answered, strict=False)]
    format_ok = grades.format_ok[:len(texts)]

  graded = [GradedSample(correct=correct[b], format_ok=float(format_ok[b]),
                         truncated=float(not complete_B[b]), tokens=int(tokens_B[b]),
                         shows_work=float(shows_work(text)), response=text)
            for b, text in enumerate(texts)]
  problems = []
  for number, (index, row) in enumerate(zip(indices, rows, strict=True)):
    level = row.get("level")
    problems.append(GradedProblem(
      index=int(index), id=row["id"], source=row.get("source"),
      level=None if level is None else str(level), group=row.get("group"), step=row.get("step"),
      answer=row["answer"], seconds=seconds, timed_out=0 if number else grades.timed_out,
      samples=graded[number * group:(number + 1) * group]))
  return problems, GradedResponses(prompts.rows, prompts.held, samples, grades.texts, correct,
                                   format_ok, group)


def _answer_ungraded(generator, params, prompts, key, *, group, sampling):
  """(Samples, Grades) without grades: a judge decides later."""
  samples = generator.sample(params, prompts, key, group=group, sampling=sampling)
  texts = [generator.encoder.chat.text(tokens[mask])
           for tokens, mask in zip(samples.tokens, samples.mask, strict=True)]
  return samples, Grades(texts, None, None, timed_out=0)


def verdicts(name, answered):
  """Grades of a user's judge: 0.0 or 1.0 for each (row, text of the response) of `answered`.

  Unlike a grader, a judge sees the questions and has no time limit; the watchdog does not end it.
  It runs in this process, with its environment and network, because it often asks a service that
  needs a key. It is called with a list of dicts: "id", "question", "truths" (list), "response" (the
  whole text) and "answer" (the content of its box, or None).

  Raises:
    ValueError: there is no such function.
    GraderError: the judge raises, or does not return True or False, 1 or 0, for each answer.
  """
  items = [{"id": row["id"], "question": row["question"],
            "truths": [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"]),
            "response": text, "answer": extract_boxed(text)} for row, text in answered]
  function = sandbox.load_function(name, "judge")
  try:
    with heartbeat.without_watchdog():
      returned = list(function(items))
  except BaseException as error:  # sys.exit() too: a judge must not end the command unseen
    raise GraderError(f"judge {name!r} raises {sandbox.describe(error)}"
                      f" on {len(items)} answers from {items[0]['id']!r} on; those before are "
                      "kept") from error
  if len(returned) != len(items):
    raise GraderError(f"judge {name!r} returns {len(returned)} verdicts for {len(items)} answers")
  grades = [sandbox.zero_or_one(verdict) for verdict in returned]
  for item, verdict, grade in zip(items, returned, grades, strict=True):
    if grade is None:
      raise GraderError(f"judge {name!r} returns {verdict!r} for {item['id']!r}, neither 0 nor 1")
  return grades


def within_tolerance(row, text):
  """Whether an answer's numbers are at most the row's `tolerance` off a truth's, in the same units.

  Where a truth has several parts, `tolerance` may be a list, one for each part (0: it must be
  equal). The parts of a list may stand in any order.
  """
  is_number = row.get("tolerance") and not row.get("options")  # an option is right or wrong
  answer = extract_boxed(text) if is_number else None
  if answer is None or len(answer) >= 100:
    return False
  truths = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
  return any(_parts_near(normalise(answer), normalise(truth), row["tolerance"]) for truth in truths)


def _parts_near(answer, truth, tolerance):
  said, wanted = _quantities(answer), _quantities(truth)
  several = tolerance if isinstance(tolerance, list) else [tolerance] * len(wanted)
  if not len(said) == len(wanted) == len(several) or None in said + wanted:
    return False
  return pair_up(zip(wanted, several, strict=True), said, lambda part, each: _near(each, *part))


def _quantities(text):
  """The Quantity of each part of a normalised text, None for a part that is no quantity."""
  whole = quantity.parse_quantity(text)  # "1,234" has one part
  return [whole] if whole else [quantity.parse_quantity(part) for part in
                                split_items(text, (",", ";", " and "))]


def _near(said, right, limit):
  """Whether two quantities differ by at most `limit`, a float that is taken as its digits say."""
  same_unit = None in (said.unit, right.unit) or (said.unit, said.size) == (right.unit, right.size)
  return same_unit and abs(said.number - right.number) <= Fraction(str(limit))
