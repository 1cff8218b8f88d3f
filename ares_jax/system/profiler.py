"""Traces of chosen steps for xprof, TensorBoard or Perfetto, and the time spent in each phase.

`profile_steps` chooses the steps, once around a run; the loop of a stage calls `profile_step`. The
phases of a `PhaseTimer` (rollout, grading, update, save, ...) appear in a trace by name.
"""

import contextlib
import os
import re
import time

import jax
from absl import logging

# State of the process, like jax's profiler.
_requests = []  # (folder, stage, start, stop)
_started = []  # folders of traces that were started for the current request
_running = []  # folder of the trace that is running


def parse_steps(text, stage, limit):
  """Reads "START:STOP", the value of --profile, as (START, STOP).

  Steps are counted from 0, without STOP itself. Raises ValueError if the range is malformed, empty
  or beyond `limit`, the number of steps of the stage.
  """
  found = re.fullmatch(r"(\d+):(\d+)", text)
  if not found:
    raise ValueError(f"--profile={text} is not START:STOP, two whole numbers such as 3:5")
  start, stop = map(int, found.groups())
  if not start < stop <= limit:
    raise ValueError(
      f"--profile={text}: 0 <= START < STOP <= {limit}, the steps of {stage}, is needed")
  return start, stop


@contextlib.contextmanager
def profile_steps(folder, stage, start, stop):
  """Traces steps `start` to `stop` - 1 of a stage into `folder`, in the code inside."""
  _requests.append((folder, stage, start, stop))
  _started.clear()
  try:
    yield
  finally:
    _requests.pop()
    end_profile()
    if not _started:
      logging.warning(
        "steps %d to %d of %s did not run: no trace in %s", start, stop - 1, stage, folder)


def profile_step(stage, done):
  """Starts or ends the requested trace, when `done` steps of `stage` are finished.

  A run that resumes inside the range is traced from there.
  """
  for folder, name, start, stop in _requests:
    if stage != name or not start <= done < stop:
      end_profile()
    elif not _started:
      _started.append(folder)
      with _only_warn("start"):
        os.makedirs(folder, exist_ok=True)
        jax.profiler.start_trace(folder)
        _running.append(folder)


def end_profile():
  """Ends the running trace, if there is one."""
  if _running:
    _running.clear()
    with _only_warn("be written"):
      jax.profiler.stop_trace()


@contextlib.contextmanager
def _only_warn(action):
  try:
    yield
  except (OSError, RuntimeError) as error:
    logging.warning("the trace could not %s: %s", action, error)


class PhaseTimer:
  """Measures the seconds spent in each phase: `with timer("rollout"): ...`.

  jax returns before the device has finished, so block on the result inside the phase.
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
      self._seconds[phase] = self._seconds.get(phase, 0.0) + (self._clock() - began)

  def take(self):
    """Returns {"seconds/PHASE": seconds} since the last `take`, as metrics of a step, and resets.

    "device/idle" is the fraction of phase "step" outside "device" (the devices have work).
    """
    seconds, self._seconds = self._seconds, {}
    taken = {f"seconds/{phase}": spent for phase, spent in seconds.items()}
    if {"step", "device"} <= seconds.keys():
      taken["device/idle"] = 1 - seconds["device"] / seconds["step"]
    return taken
