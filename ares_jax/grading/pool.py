"""Grading of responses: find the boxed answer, check the format, compare with the truth.

What a model writes is hostile. Everything in this process is linear in the text's length; formulas
go to worker processes that are killed after a time limit.
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
from ares_jax.grading.answer import MAX_LENGTH, same_answer, same_formula
from ares_jax.grading.response import extract_boxed, well_formed
from ares_jax.system.heartbeat import StopRequested, heartbeat, local_stop_requested

_CACHED = 100_000  # verdicts kept, about 20 MB


class GraderError(ValueError):
  """Grading cannot go on: the user's grader fails, or too many answers time out."""


class GradingPool:
  """Grades batches; what may hang or execute in killable worker processes, all else in this one.

  Workers start at the first formula, so a run whose answers are numbers never pays for them. They
  import neither jax nor the program that made the pool. Use as a context manager.
  """

  def __init__(self, workers=None, timeout=2.0, *, grader="layered", timeout_share=1.0):
    """
    Args:
      workers: processes; None is one a core, at most 8.
      timeout: seconds one answer may take in a worker; then it is wrong and counted.
      grader: "layered" (answer.py), "release" (mathruler) or "package.module:function", a function
        of (response, truth), the truth as the data have it, that says whether it is right: True
        or False, 1 or 0. Parts of a point are refused: pass rates count right answers.
      timeout_share: a batch of which more than this share times out stops the run.

    Raises:
      ValueError: a number is out of range, or there is no such grader.
    """
    self._workers = min(8, os.cpu_count()) if workers is None else workers
    if self._workers < 1 or timeout <= 0 or not 0 <= timeout_share <= 1:
      raise ValueError(f"workers is {workers}, timeout {timeout} s and timeout_share "
                       f"{timeout_share}; must be >= 1, > 0 and in 0..1")
    if grader == "release" and not sandbox.has_release_grader():
      raise ValueError("grader 'release' needs the package mathruler: pip install mathruler "
                       "pylatexenc, or use grader 'layered'")
    if grader not in ("layered", "release"):
      sandbox.load_grader(grader, "grader")
    self.name = grader
    self._timeout, self._timeout_share = timeout, timeout_share
    self._pool = None
    self._verdicts = collections.OrderedDict()  # _key -> 0 or 1

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()

  def close(self):
    """Ends the workers."""
    if self._pool is not None:
      self._pool.stop()
      self._pool.join()
      self._pool = None

  def grade(self, texts, truths):
    """Grades responses.

    Args:
      texts: n responses.
      truths: n right answers, each a string or a list or tuple of accepted ones.

    Returns:
      correct: float32 [n], 1 where the boxed answer is the truth (or the user's grader says so).
      format_ok: float32 [n], 1 where `well_formed`.
      timed_out: int, answers that ran out of time or memory; they count as wrong.

    Raises:
      ValueError: the lengths differ, or a truth is not a text.
      GraderError: the user's grader fails, or more than `timeout_share` of the answers time out.
      pulse.Stopped: the run was asked to stop; seen between two formulas. Of several processes
        each stops for itself: hosts.leader and shares.graded tell the others.
    """
    if len(texts) != len(truths):
      raise ValueError(f"{len(texts)} responses but {len(truths)} truths")
    grading = self.begin()
    for place, (text, truth) in enumerate(zip(texts, truths, strict=True)):
      grading.add(place, text, truth)
    return grading.finish()

  def begin(self):
    """A Grading of this pool, for responses that come one by one."""
    return Grading(self)

  def bad_truths(self, rows, batch=1024):
    """Yields (id, truth) of every row whose truth, boxed, is not graded as right.

    The user's grader may want another form than a box: it is asked, so that one that fails is
    found, and none of its rows is refused.

    Args:
      rows: iterable of dicts with "id" and "answer"; read batch by batch.
      batch: rows graded together.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, batch)):
      _beat()
      firsts = [row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
                for row in chunk]
      correct, _, _ = self.grade([f"<think> </think> \\boxed{{{truth}}}" for truth in firsts],
                                 [row["answer"] for row in chunk])
      yield from ((row["id"], row["answer"])
                  for row, right in zip(chunk, correct, strict=True)
                  if right < 1 and not self._is_users)

  def check_late(self, late, count):
    """Raises GraderError where too many of `count` pairs, these, ran out of time."""
    if len(late) > self._timeout_share * count:
      raise GraderError(f"{len(late)} of {count} answers timed out, more than the share of "
                        f"{self._timeout_share} (grade.timeout_share); the first is "
                        f"{late[0][0][-80:]!r} for {late[0][1]!r}; raise grade.timeout or "
                        "grade.workers")

  def verdict(self, pair):
    """0 or 1, or a future of what `wait` takes, for (what is graded, truth)."""
    key = _key(*pair)
    if key in self._verdicts:
      self._verdicts.move_to_end(key)
      return self._verdicts[key]
    try:
      return self.remember(pair, float(self._here(pair)))
    except _NeedsWorker:
      return self._submit(pair)

  def remember(self, pair, verdict):
    """Keeps a verdict for the next time, and returns it."""
    self._verdicts[_key(*pair)] = verdict
    if len(self._verdicts) > _CACHED:
      self._verdicts.popitem(last=False)
    return verdict

  def wait(self, pair, future):
    """The verdict of a worker, 0 or 1, or None (timed out).

    Raises:
      GraderError: the user's grader raises, hangs, dies or says something else.
      pulse.Stopped: the run was asked to stop, and the workers with it: no verdict on the answer.
    """
    try:
      verdict = future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      _beat()
      raise GraderError(f"the workers of grader {self.name!r} do not start: {error}") from error
    except (concurrent.futures.TimeoutError, pebble.ProcessExpired, MemoryError) as error:
      _beat()
      if self._is_users:
        raise GraderError(f"grader {self.name!r} hangs or dies ({type(error).__name__}, limit "
                          f"{self._timeout} s) on {pair[0][-80:]!r} for {pair[1]!r}") from error
      verdict = None
    if isinstance(verdict, str):
      raise GraderError(f"grader {self.name!r} {verdict} on {pair[0][-80:]!r} for {pair[1]!r}")
    # Of a busy moment nothing is kept: the answer has its time again where it comes again.
    return None if verdict is None else self.remember(pair, float(verdict))

  @property
  def _is_users(self):
    return self.name not in ("layered", "release")

  def _here(self, pair):
    """The verdict where this process may find it."""
    if self.name == "layered":
      return same_answer(*pair, symbolic=_needs_worker)
    raise _NeedsWorker

  def _submit(self, pair):
    module, first, task, arguments = "math_verify", _first_formula, _same_in_worker, pair
    if self.name == "release":
      module, first, task = "mathruler.grader", None, sandbox.release_grader
    elif self._is_users:
      module, first, task = self.name.partition(":")[0], None, sandbox.call_grader
      arguments = (self.name, pair[0], list(pair[1]) if isinstance(pair[1], tuple) else pair[1])
    if self._pool is None:
      self._pool = sandbox.make_pool(self._workers, module, first)
    return self._pool.schedule(task, args=arguments, timeout=self._timeout)


class Grading:
  """Responses graded while others are still written; `GradingPool.begin` makes it.

  What comes out is in the order of the places, whatever the order they came in.
  """

  def __init__(self, pool):
    self._pool = pool
    self._pairs = {}  # place -> (what is graded, truth)
    self._format_ok = {}  # place -> bool
    self._verdicts = {}  # pair -> 0 or 1, None = timed out
    self._waiting = collections.OrderedDict()  # pair -> future, in a worker

  def add(self, place, text, truth):
    """Grades a response, or hands it to a worker and does not wait.

    Args:
      place: int, in the result.
      text: the response.
      truth: right answer, a string or a list or tuple of accepted ones.

    Raises:
      ValueError: the truth is not a text.
      GraderError: the user's grader failed on a response that was added before.
    """
    pair = (extract_boxed(text) if self._pool.name == "layered" else text,
            tuple(truth) if isinstance(truth, list) else truth)
    self._pairs[place], self._format_ok[place] = pair, well_formed(text)
    if pair not in self._verdicts and pair not in self._waiting:
      verdict = self._pool.verdict(pair)
      (self._verdicts if isinstance(verdict, float) else self._waiting)[pair] = verdict
    # A stop was sent to the workers too: what they say from then on is no verdict.
    while (self._waiting and next(iter(self._waiting.values())).done()
           and not local_stop_requested()):
      self._next()

  def finish(self):
    """Waits for the workers; returns what `GradingPool.grade` returns, and raises what it does."""
    while self._waiting:
      _beat()
      self._next()
    places = sorted(self._pairs)
    pairs = [self._pairs[place] for place in places]
    late = [pair for pair in pairs if self._verdicts[pair] is None]
    self._pool.check_late(late, len(pairs))
    correct = np.float32([self._verdicts[pair] or 0 for pair in pairs])
    return correct, np.float32([self._format_ok[place] for place in places]), len(late)

  def _next(self):
    pair, future = self._waiting.popitem(last=False)
    self._verdicts[pair] = self._pool.wait(pair, future)


def _key(answer, truth):
  """What a verdict is remembered under: of a whole response its digest, not its text."""
  if answer is None or len(answer) <= MAX_LENGTH:
    return answer, truth
  return hashlib.sha256(answer.encode("utf-8", "surrogatepass")).digest(), truth


def _beat():
  """A beat where this process may stop alone, because whoever called tells the others."""
  heartbeat()
  if local_stop_requested():
    raise StopRequested


class _NeedsWorker(Exception):
  pass


def _needs_worker(answer, truth):
  raise _NeedsWorker


def _first_formula():
  """Makes the parsers, which takes twenty times as long as a formula: of no answer's time."""
  same_formula("\\frac{x}{2}+1", "1+\\frac{x}{2}")


def _same_in_worker(answer, truth):
  try:
    return same_answer(answer, truth, symbolic=same_formula)
  except (MemoryError, RecursionError):
    raise MemoryError from None
  except Exception:
    # A formula that the parser or sympy stumbles over is not the truth.
    return False
