"""Grades responses: finds the boxed answer, checks the format, compares with the truth.

A model may write anything, so its text is treated as hostile: this process does only work that is
linear in the length of the text.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import hashlib
import itertools
import os

import numpy as np
import pebble

from ares_jax.grading import sandbox
from ares_jax.grading.answer import MAX_LENGTH, Truth, as_truth, same_answer, same_formula
from ares_jax.grading.response import extract_boxed, well_formed
from ares_jax.system.heartbeat import StopRequested, heartbeat, local_stop_requested

_CACHED = 100_000  # verdicts, about 20 MB
_ENDED = concurrent.futures.TimeoutError, pebble.ProcessExpired, MemoryError


class GraderError(ValueError):
  """The user's grader fails, or too many answers time out."""


class GradingPool(sandbox.Workers):
  """Grades batches of responses; a context manager.

  Formulas and users' graders, which may hang or run any code, are left to worker processes that
  can be killed. They start at the first formula, so a run whose answers are numbers starts none.
  """

  def __init__(self, workers=None, timeout=2.0, *, grader="layered", timeout_share=1.0):
    """Raises ValueError where a number is out of range, or the grader does not load.

    Args:
      workers: number of processes; None is one a core, at most 8.
      timeout: seconds that one answer may take in a worker; then it is wrong and counted.
      grader: "layered" (answer.py), "release" (mathruler) or "package.module:function", a function
        of (response, truth as the data have it) that returns True or False, 1 or 0. Fractions are
        refused: pass rates count right answers.
      timeout_share: a batch of which more than this share times out stops the run.
    """
    self._workers = min(8, os.cpu_count()) if workers is None else workers
    if self._workers < 1 or timeout <= 0 or not 0 <= timeout_share <= 1:
      raise ValueError(f"workers is {workers}, timeout {timeout} s and timeout_share "
                       f"{timeout_share}; must be >= 1, > 0 and in 0..1")
    if grader == "release" and not sandbox.has_release_grader():
      raise ValueError("grader 'release' needs the package mathruler: pip install mathruler "
                       "pylatexenc, or use grader 'layered'")
    if grader not in ("layered", "release"):
      sandbox.load_function(grader, "grader")
    self.name = grader
    self._timeout, self._timeout_share = timeout, timeout_share
    self._verdicts = collections.OrderedDict()  # _key -> 0 or 1

  def grade(self, texts, truths):
    """Grades n responses by n truths, each an `answer.Truth`, or a text or several accepted ones.

    Returns:
      correct: float32 [n], 1 where the boxed answer is the truth (or the user's grader says so).
      format_ok: float32 [n], 1 where `well_formed`.
      timed_out: int, number of answers that ran out of time or memory; they count as wrong.

    Raises:
      ValueError: the lengths differ, or a truth is not a text.
      GraderError: the user's grader fails, or more than `timeout_share` of the answers time out.
      StopRequested: this process was asked to stop. `rollout.grade_sharded` tells the others.
    """
    if len(texts) != len(truths):
      raise ValueError(f"{len(texts)} responses but {len(truths)} truths")
    grading = self.begin()
    for index, (text, truth) in enumerate(zip(texts, truths, strict=True)):
      grading.add(index, text, truth)
    return grading.finish()

  def begin(self):
    """A new Grading, for responses that arrive one by one."""
    return Grading(self)

  def bad_truths(self, rows, batch=1024):
    """Yields every row whose truth is not graded as right when it stands in a box.

    A user's grader is called too, so that one that fails is found early, but it may expect another
    form than a box, so no row is yielded for it. `batch` of the `rows` are graded together.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, batch)):
      heartbeat_or_stop()
      truths = [Truth.of(row) for row in chunk]
      boxes = [f"<think> </think> \\boxed{{{truth.texts[0]}}}" for truth in truths]
      correct, _, _ = self.grade(boxes, truths)
      if not self._is_users:
        yield from itertools.compress(chunk, correct < 1)

  # The methods below are for Grading. A pair is (boxed answer or complete response, Truth).

  @property
  def _is_users(self):
    return self.name not in ("layered", "release")

  def verdict(self, pair):
    """The verdict on a pair, 0 or 1, or a future that `wait` turns into one."""
    key = _key(*pair)
    if key in self._verdicts:
      self._verdicts.move_to_end(key)
      return self._verdicts[key]
    try:
      return self._remember(pair, float(self._grade_here(pair)))
    except _NeedsWorker:
      return self._submit(pair)

  def _grade_here(self, pair):
    """The verdict where this process may find it; _NeedsWorker where it takes a worker."""
    if self.name == "layered":
      return same_answer(*pair, symbolic=_needs_worker)
    raise _NeedsWorker

  def _submit(self, pair):
    """A future of the verdict of a worker."""
    response, accepted = pair[0], pair[1].accepted
    if self.name == "layered":
      module, task, arguments = "ares_jax.grading.parsers", _same_in_worker, pair
    elif self.name == "release":
      module, task, arguments = "mathruler.grader", sandbox.release_grader, (
        response, pair[1].texts)
    else:
      module, task = self.name.rpartition(":")[0], sandbox.call_grader
      arguments = self.name, response, accepted if isinstance(accepted, str) else list(accepted)
    if self._pool is None:
      self._pool = sandbox.make_pool(self._workers, module)
    return self._pool.schedule(task, args=arguments, timeout=self._timeout)

  def wait(self, pair, future):
    """The verdict of a worker, 0 or 1, or None where it timed out.

    Raises GraderError where the user's grader raises, hangs, dies or returns something else, and
    StopRequested where this process was asked to stop: a stopped worker's result is no verdict.
    """
    error = future.exception()  # not raised: sys.exit() of a worker is not ours
    if error is not None:
      failure = worker_failure(error, f"grader {self.name!r}", f"limit {self._timeout} s")
      if not self._is_users and isinstance(error, _ENDED):
        return None  # not remembered: the machine may have been busy, so the answer may try again
    else:
      verdict = future.result()
      failure = verdict if isinstance(verdict, str) else None
    if failure is not None:
      raise GraderError(f"grader {self.name!r} {failure} on {pair[0][-80:]!r} for "
                        f"{pair[1].accepted!r}") from error
    return self._remember(pair, float(verdict))

  def _remember(self, pair, verdict):
    self._verdicts[_key(*pair)] = verdict
    if len(self._verdicts) > _CACHED:
      self._verdicts.popitem(last=False)
    return verdict

  def check_timeouts(self, timed_out, count):
    """Raises GraderError where the pairs that timed out are too many of `count` pairs."""
    if len(timed_out) > self._timeout_share * count:
      answer, truth = timed_out[0]
      raise GraderError(f"{len(timed_out)} of {count} answers timed out, more than the share of "
                        f"{self._timeout_share} (grade.timeout_share); the first is "
                        f"{answer[-80:]!r} for {truth.accepted!r}; raise grade.timeout or "
                        "grade.workers")


class Grading:
  """Responses that are graded while others are still written, in any order."""

  def __init__(self, pool):
    self._pool = pool
    self._pairs = {}  # index -> (boxed answer or complete response, Truth)
    self._format_ok = {}  # index -> bool
    self._verdicts = {}  # pair -> 0 or 1, None = timed out
    self._waiting = collections.OrderedDict()  # pair -> future, in a worker

  def add(self, index, text, truth, tokens=()):
    """Grades the response `text`, or sends it to a worker without waiting.

    `index` is its index in the result; `truth` is a Truth, or the row that has it, or a text or
    several accepted ones. Raises ValueError where it is not, GraderError where the user's grader
    failed on a response that was added before. The ids `tokens` are for scoring.Scoring, which
    takes the place of this class.
    """
    pair = (extract_boxed(text) if self._pool.name == "layered" else text, as_truth(truth))
    self._pairs[index], self._format_ok[index] = pair, well_formed(text)
    if pair not in self._verdicts and pair not in self._waiting:
      verdict = self._pool.verdict(pair)
      (self._verdicts if isinstance(verdict, float) else self._waiting)[pair] = verdict
    # After a stop signal, which workers get too, their results are not verdicts.
    while (self._waiting and next(iter(self._waiting.values())).done()
           and not local_stop_requested()):
      self._wait_for_first()

  def finish(self, entropies=None):
    """Waits for the workers; returns and raises as `GradingPool.grade`; entropies are not used."""
    while self._waiting:
      heartbeat_or_stop()
      self._wait_for_first()
    indices = sorted(self._pairs)
    pairs = [self._pairs[index] for index in indices]
    verdicts = [self._verdicts[pair] for pair in pairs]
    timed_out = [pair for pair in pairs if self._verdicts[pair] is None]
    self._pool.check_timeouts(timed_out, len(indices))
    return (np.float32([verdict or 0 for verdict in verdicts]),
            np.float32([self._format_ok[index] for index in indices]), len(timed_out))

  def _wait_for_first(self):
    pair, future = self._waiting.popitem(last=False)
    self._verdicts[pair] = self._pool.wait(pair, future)


def _key(answer, truth):
  """The key of a verdict in the cache; for a long response it has a digest instead of the text."""
  if answer is None or len(answer) <= MAX_LENGTH:
    return answer, truth
  return hashlib.sha256(answer.encode("utf-8", "surrogatepass")).digest(), truth


def worker_failure(error, what, limit):
  """How an error ended a task of a worker, in words; GraderError where none of `what` starts."""
  heartbeat_or_stop()
  if isinstance(error, concurrent.futures.process.BrokenProcessPool):
    raise GraderError(f"the workers of {what} do not start: {error}") from error
  if isinstance(error, _ENDED):
    return f"hangs or dies ({type(error).__name__}, {limit})"
  return f"raises {sandbox.describe(error)}"


def heartbeat_or_stop():
  """A heartbeat where this process may stop alone: the caller tells the other processes."""
  heartbeat()
  if local_stop_requested():
    raise StopRequested


class _NeedsWorker(Exception):
  """Two formulas have to be compared, or the grader is not ours."""


def _needs_worker(answer, truth):
  raise _NeedsWorker


def _same_in_worker(answer, truth):
  try:
    return same_answer(answer, truth, symbolic=same_formula)
  except (MemoryError, RecursionError):
    raise MemoryError from None
  except Exception:  # a formula that makes the parser or sympy fail is wrong
    return False
