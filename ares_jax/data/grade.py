"""Grading of responses: find the boxed answer, check the format, compare with the truth.

What a model writes is hostile. Everything in this process is linear in the text's length; formulas
go to worker processes that are killed after a time limit.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import resource
import sys
import threading

import numpy as np
import pebble

from ares_jax.data.answer import normalise, same_answer, same_formula

__all__ = ["GradingPool", "extract_boxed", "normalise", "same_answer", "thought", "well_formed"]

_LOOKED_AT = 20_000  # last characters of a response in which the box is searched
_CACHED = 100_000  # verdicts kept, about 20 MB
_MEMORY = 2 << 30  # bytes of address space of a worker
_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)


def extract_boxed(text):
  """What stands in the last balanced `\\boxed{...}` of the answer, or None.

  The answer is what follows the last `</think>`; a text with neither `<think>` nor `</think>` is
  all answer, one whose `<think>` never ends has none.
  """
  _, closed, answer = text.rpartition("</think>")
  if not closed and "<think>" in text:
    return None
  answer = answer[-_LOOKED_AT:]
  found, opened = None, []  # opened: where each open brace's content starts; -1 = no box
  for match in _BRACE.finditer(answer):
    if match[1]:
      opened.append(match.end())
    elif match[2] == "{":
      opened.append(-1)
    elif match[2] == "}" and opened:
      start = opened.pop()
      if start >= 0:
        found = answer[start : match.start()].strip()
  return found


def well_formed(text):
  """Whether the response is `<think> ... </think>` and then a `\\boxed{...}` (release's format)."""
  return text.lstrip().startswith("<think>") and "</think>" in text and (
    extract_boxed(text) is not None
  )  # fmt: skip


def thought(text):
  """Whether there is any working between `<think>` and `</think>`."""
  _, opened, rest = text.partition("<think>")
  return bool(opened) and bool(rest.partition("</think>")[0].strip())


class GradingPool:
  """Grades batches; formulas in killable worker processes, all else in this one.

  Workers start at the first formula, so a run whose answers are numbers never pays for them. They
  import neither jax nor the program that made the pool. Use as a context manager.
  """

  def __init__(self, workers=None, timeout=2.0):
    """
    Args:
      workers: processes; None is one a core, at most 8.
      timeout: seconds one formula may take; then the answer is wrong and counted.

    Raises:
      ValueError: `workers` < 1 or `timeout` <= 0.
    """
    self._workers = min(8, os.cpu_count()) if workers is None else workers
    if self._workers < 1 or timeout <= 0:
      raise ValueError(f"workers is {workers} and timeout {timeout} s; must be >= 1 and > 0")
    self._timeout = timeout
    self._pool = None
    self._verdicts = collections.OrderedDict()  # (answer, truth) -> bool, None = timed out

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
      correct: float32 [n], 1 where the boxed answer is the truth.
      formatted: float32 [n], 1 where `well_formed`.
      timed_out: int, answers that ran out of time or memory; they count as wrong.

    Raises:
      ValueError: the lengths differ, or a truth is not a text.
    """
    if len(texts) != len(truths):
      raise ValueError(f"{len(texts)} responses but {len(truths)} truths")
    pairs = [
      (extract_boxed(text), tuple(truth) if isinstance(truth, list) else truth)
      for text, truth in zip(texts, truths, strict=True)
    ]
    verdicts = self._settle(dict.fromkeys(pairs))
    correct = np.float32([verdicts[pair] is True for pair in pairs])
    formatted = np.float32([well_formed(text) for text in texts])
    return correct, formatted, sum(verdicts[pair] is None for pair in pairs)

  def _settle(self, pairs):
    """{pair: True, False or None (timed out)}."""
    verdicts, waiting = {}, {}
    for pair in pairs:
      if pair in self._verdicts:
        verdicts[pair] = self._verdicts[pair]
        self._verdicts.move_to_end(pair)
        continue
      try:
        verdicts[pair] = same_answer(*pair, symbolic=_needs_worker)
      except _NeedsWorker:
        waiting[pair] = self._submit(pair)
    for pair, future in waiting.items():
      try:
        verdicts[pair] = future.result()
      except (concurrent.futures.TimeoutError, pebble.ProcessExpired, MemoryError):
        verdicts[pair] = None
    for pair in pairs:
      self._verdicts[pair] = verdicts[pair]
    while len(self._verdicts) > _CACHED:
      self._verdicts.popitem(last=False)
    return verdicts

  def _submit(self, pair):
    if self._pool is None:
      self._pool = pebble.ProcessPool(
        max_workers=self._workers, initializer=_prepare_worker, context=_Context()
      )
    return self._pool.schedule(_same_in_worker, args=pair, timeout=self._timeout)


class _NeedsWorker(Exception):
  pass


def _needs_worker(answer, truth):
  raise _NeedsWorker


def _same_in_worker(answer, truth):
  try:
    return same_answer(answer, truth, symbolic=same_formula)
  except (MemoryError, RecursionError):
    raise MemoryError from None
  except Exception:
    # A formula that the parser or sympy stumbles over is not the truth.
    return False


def _prepare_worker():
  """Runs first in a worker: memory limit, no secrets, imports before the clock of a task starts."""
  import math_verify  # noqa: F401

  os.environ.clear()
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Process(multiprocessing.context.SpawnProcess):
  """A spawned process that does not import the parent's `__main__` (train.py, and with it jax)."""

  _lock = threading.Lock()

  def start(self):
    main = sys.modules["__main__"]
    hidden = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    with self._lock, contextlib.ExitStack() as stack:
      # multiprocessing finds the main module by these two; without them it imports none.
      stack.callback(vars(main).update, hidden)
      main.__spec__ = None
      vars(main).pop("__file__", None)
      super().start()


class _Context(multiprocessing.context.SpawnContext):
  Process = _Process
