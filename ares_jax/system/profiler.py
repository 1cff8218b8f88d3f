"""A trace of some steps of a run, for xprof, TensorBoard or Perfetto, with its phases by name.

Which steps is asked for once, around the run; the loop of a stage says where it is. What ran in a
phase (rollout, grading, update, save ...) stands under its name, `metrics.PhaseTimer` marks it.
"""

import contextlib
import os
import re
import time

import jax
from absl import logging

# Of the process, as jax's profiler is.
_wanted, _began, _running = [], [], []


def parse_steps(text, stage, limit):
  """(START, STOP) of "START:STOP", steps counted from 0, STOP not among them.

  Args:
    text: of --profile.
    stage: name of the stage that is traced.
    limit: its steps.

  Raises:
    ValueError: not two whole numbers, an empty range, or one beyond the stage's steps.
  """
  found = re.fullmatch(r"(\d+):(\d+)", text)
  if not found:
    raise ValueError(f"--profile={text} is not START:STOP, two whole numbers such as 3:5")
  start, stop = map(int, found.groups())
  if not start < stop <= limit:
    raise ValueError(f"--profile={text}: 0 <= START < STOP <= {limit}, the steps of {stage}, is "
                     "needed")
  return start, stop


@contextlib.contextmanager
def profile_steps(folder, stage, start, stop):
  """Steps `start` to `stop` of the stage called `stage` are traced into `folder` while inside."""
  _wanted.append((folder, stage, start, stop))
  _began.clear()
  try:
    yield
  finally:
    _wanted.pop()
    end_profile()
    if not _began:
      logging.warning("steps %d to %d of %s were not run here: no trace in %s", start, stop - 1,
                      stage, folder)


def profile_step(stage, done):
  """Starts or ends the trace that was asked for; `done` steps of `stage` are finished.

  A run that goes on inside the range is traced from there.
  """
  for folder, name, start, stop in _wanted:
    if stage == name and start <= done < stop:
      if not _began:
        _began.append(folder)
        with _no_reason_to_end("begin"):
          os.makedirs(folder, exist_ok=True)
          jax.profiler.start_trace(folder)
          _running.append(folder)
    else:
      end_profile()


def end_profile():
  """Ends the trace where one runs."""
  if _running:
    _running.clear()
    with _no_reason_to_end("be written"):
      jax.profiler.stop_trace()


@contextlib.contextmanager
def _no_reason_to_end(what):
  try:
    yield
  except (OSError, RuntimeError) as error:
    logging.warning("the trace could not %s: %s", what, error)


class PhaseTimer:
  """Seconds spent in each phase: `with timer("rollout"): ...`; its name in a profiler's trace.

  jax returns before the device is done: block on the result inside the phase.
  """

  def __init__(self, clock=time.perf_counter):
    self._clock = clock
    self._seconds = {}

  @contextlib.contextmanager
  def __call__(self, phase):
    began = self._clock()
    try:
      with jax.profiler.TraceAnnotation(phase):
        yield
    finally:
      spent = self._clock() - began
      self._seconds[phase] = self._seconds.setdefault(phase, 0.0) + spent

  def take(self):
    """{"seconds/PHASE": seconds} since the last `take`, as metrics of a step; starts anew.

    Of phases "step" and "device" (work is on the devices) also "device/idle", the step's share
    without the other.
    """
    taken = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
    if {"step", "device"} <= self._seconds.keys():
      taken["device/idle"] = 1 - self._seconds["device"] / self._seconds["step"]
    self._seconds = {}
    return taken
