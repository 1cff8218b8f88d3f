"""A trace of some steps of a run, for xprof, TensorBoard or Perfetto, with its phases by name.

Which steps is asked for once, around the run; the loop of a stage says where it is. What ran in a
phase (rollout, grading, update, save ...) stands under its name, `metrics.PhaseTimer` marks it.
"""

import contextlib
import os
import re

import jax
from absl import logging

# Of the process, as jax's profiler is.
_wanted, _began, _running = [], [], []


def steps(text, stage, limit):
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
def requested(folder, stage, start, stop):
  """Steps `start` to `stop` of the stage called `stage` are traced into `folder` while inside."""
  _wanted.append((folder, stage, start, stop))
  _began.clear()
  try:
    yield
  finally:
    _wanted.pop()
    end()
    if not _began:
      logging.warning("steps %d to %d of %s were not run here: no trace in %s", start, stop - 1,
                      stage, folder)


def at(stage, done):
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
      end()


def end():
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
