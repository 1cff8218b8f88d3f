"""A trace of some steps of a run, for xprof, TensorBoard or Perfetto, with its phases by name.

Which steps is asked for once, around the run; the loop of a stage says where it is. What ran in a
phase (rollout, grading, update, save ...) stands under its name, `metrics.PhaseTimer` marks it.
"""

import contextlib
import os
import re

import jax

# Of the process, as jax's profiler is.
_wanted, _running = [], []


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
  try:
    yield
  finally:
    _wanted.pop()
    end()


def at(stage, done):
  """Starts or ends the trace that was asked for; `done` steps of `stage` are finished.

  A run that goes on inside the range is traced from there.
  """
  for folder, name, start, stop in _wanted:
    if stage == name and start <= done < stop:
      if not _running:
        os.makedirs(folder, exist_ok=True)
        jax.profiler.start_trace(folder)
        _running.append(folder)
    else:
      end()


def end():
  """Ends the trace where one runs."""
  if _running:
    jax.profiler.stop_trace()
    _running.clear()
