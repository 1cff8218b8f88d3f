"""Asks judges: functions of a user that run in this process, for they need its network and keys.

A judge is asked in a thread, or in an event loop where it is async, while answers are still
decoded. Every result is a line of a file, and what was answered there is not asked again.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import random
import threading
import time

from ares_jax.grading import functions
from ares_jax.grading.pool import GraderError
from ares_jax.system.config import optional

_PAUSE = 1.0  # seconds before the first retry; each next one waits twice as long


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
  """How judges are asked."""

  concurrency: int = optional(16, free=True)  # calls at one time
  timeout: float = optional(60.0, free=True)  # seconds a call
  retries: int = optional(3, free=True)  # further calls after one that failed
  budget: int = optional(0, free=True)  # calls in all of the run, retries too; 0 = any number

  def __post_init__(self):
    if self.concurrency < 1 or not 0 < self.timeout < float("inf"):
      raise ValueError(f"concurrency = {self.concurrency} must be >= 1, timeout = {self.timeout} s "
                       "> 0 and finite")
    if min(self.retries, self.budget) < 0:
      raise ValueError(f"retries = {self.retries} and budget = {self.budget} must be >= 0")


class Judge(contextlib.AbstractContextManager):
  """Calls the judges of one process; a context manager."""

  def __init__(self, config, path=None, others=()):
    """Reads the results that earlier processes of the run left.

    Args:
      config: JudgeConfig.
      path: file of this process's results, one JSON object a line; None keeps them in memory.
      others: files of other processes' results.
    """
    self._config, self._path = config, path
    self._results, self.calls = {}, 0
    for file in filter(os.path.exists, dict.fromkeys((*others, *([path] if path else [])))):
      for line in _lines(file):
        self.calls += line["calls"]
        if not any(isinstance(result, str) for result in line["results"]):  # it did not fail
          self._results[line["key"]] = line["results"]
    self._lock = threading.Lock()
    self._loop = self._places = None

  def __exit__(self, *exc):
    if self._loop is not None:
      asyncio.run_coroutine_threadsafe(self._end(), self._loop)

  def submit(self, function, answers):
    """A future of the results of a functions.RewardFunction, as those of call_function.

    It raises GraderError where the budget is used up.
    """
    key = _key(function, answers)
    with self._lock:
      if self._loop is None:
        self._start()
      known = self._results.get(key)
    if known is not None:
      future = concurrent.futures.Future()
      future.set_result(known)
      return future
    return asyncio.run_coroutine_threadsafe(self._ask(key, function, answers), self._loop)

  def _start(self):
    self._loop = asyncio.new_event_loop()
    self._places = asyncio.Semaphore(self._config.concurrency)
    threading.Thread(target=self._loop.run_forever, name="judges", daemon=True).start()

  async def _end(self):
    """Cancels the calls that nobody waits for any more, and ends the loop."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
      task.cancel()
    self._loop.call_soon(self._loop.stop)

  async def _ask(self, key, function, answers):
    """Calls until a result comes or the retries are used up; keeps a result that came."""
    config, began, calls = self._config, time.monotonic(), 0
    async with self._places:
      while True:
        with self._lock:
          if config.budget and self.calls >= config.budget:
            raise GraderError(f"the judges' budget of {config.budget} calls is used up; raise "
                              "reward.judge.budget to go on")
          self.calls += 1
        calls += 1
        results = await self._call(function, answers)
        failure = next((result for result in results if isinstance(result, str)), None)
        if failure is None or calls > config.retries:
          break
        # Those that failed together shall not try again together.
        await asyncio.sleep(_PAUSE * 2 ** (calls - 1) * (0.5 + random.random()))
    self._keep({"key": key, "function": function.target, "ids": [
      answer["row"].get("id") for answer in answers], "calls": calls,
      "seconds": round(time.monotonic() - began, 3), "results": results}, failure)
    return results

  async def _call(self, function, answers):
    """The results of one call; of one that fails, how it failed for each answer."""
    limit = asyncio.timeout(self._config.timeout)
    try:
      call = functions.prepare_call(function, answers)
      async with limit:
        returned = await _in_thread(call)  # a function that is not async blocks
        if inspect.isawaitable(returned):
          returned = await returned
      return functions.results(function, answers, returned)
    except asyncio.CancelledError:
      raise
    except BaseException as error:  # sys.exit() too: it must not end the run unseen
      if limit.expired():
        return [f"takes longer than reward.judge.timeout = {self._config.timeout} s"] * len(answers)
      return [functions.how_it_failed(function, error)] * len(answers)

  def _keep(self, line, failure):
    with self._lock:
      if failure is None:
        self._results[line["key"]] = line["results"]
      if self._path:
        with open(self._path, "a", encoding="utf-8") as file:
          file.write(json.dumps(line) + "\n")


def _in_thread(call):
  """An awaitable of the call's result in a thread, which does not keep this process from ending."""
  future = concurrent.futures.Future()
  future.set_running_or_notify_cancel()  # a call that is no longer awaited may still end

  def run():
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, name="judge", daemon=True).start()
  return asyncio.wrap_future(future)


def _lines(path):
  """The complete lines of a file; a kill leaves at most one partial line, the last."""
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      if line.endswith("\n"):
        try:
          yield json.loads(line)
        except ValueError as error:
          raise ValueError(f"{path} line {number} is not JSON ({error}); remove it") from error


def _key(function, answers):
  """16 hex digits of all that a judge is asked."""
  asked = [[answer["response"], answer["truth"], answer["row"].get("question"),
            answer["row"].get("id")] for answer in answers]
  text = json.dumps([function.target, function.form, repr(function.arguments), asked])
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
