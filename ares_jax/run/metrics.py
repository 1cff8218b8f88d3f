"""Writes the metrics of a stage to metrics.jsonl and TensorBoard.

WORKDIR/metrics.jsonl has one object per step: "stage", "step", then the metrics by name; a value
that is not finite is null. `step` counts finished steps: a checkpoint at step s holds the work of
lines 1..s of its stage. A validation has an object of its own, at step 0 before the first step.
TensorBoard's files are in WORKDIR/tensorboard/STAGE.
"""

import contextlib
import errno
import json
import math
import os
import time

import jax
import numpy as np
from absl import logging

from ares_jax.run.files import atomic_write

_mirrors = []  # functions that receive every line written by this process


@contextlib.contextmanager
def mirror_lines(send):
  """Passes every line that is written inside to `send`, a function of the line's dict."""
  _mirrors.append(send)
  try:
    yield
  finally:
    _mirrors.remove(send)


class MetricWriter:
  """Writes the scalars of one stage on process 0; on other processes every call does nothing."""

  def __init__(self, workdir, stage, *, step):
    """Opens the logs of a stage with `step` finished steps; makes `workdir` if it is missing.

    Removes the stage's lines after `step`, which a killed run wrote and which will be written
    again. Raises ValueError if a line of metrics.jsonl, other than the last, is malformed.
    """
    self._stage = stage
    self._file = self._events = None
    if jax.process_index() != 0:
      return
    os.makedirs(workdir, exist_ok=True)
    self._path = os.path.join(workdir, "metrics.jsonl")
    truncate_lines(self._path, stage, step)
    self._file = open(self._path, "ab", buffering=0)
    self._events = _Events(os.path.join(workdir, "tensorboard", stage), step)

  def __enter__(self):
    return self

  def __exit__(self, kind, *exc):
    # An error of closing must not hide the exception that ended the stage.
    with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
      self.close()

  def write_scalars(self, step, scalars):
    """Writes a line of finished step `step`, with {name: number or array of one element}.

    After an OSError (the disk is full, or the file is gone) the call may be repeated.
    """
    numbers = {name: _number(name, value) for name, value in scalars.items()}
    if self._file is None:
      return
    line = {"stage": self._stage, "step": int(step)}
    for name in line.keys() & numbers.keys():
      raise ValueError(f"a metric cannot be called {name!r}; it is a key of every line")
    line |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    self._append((json.dumps(line, allow_nan=False) + "\n").encode())
    self._events.add(int(step), numbers)
    for send in _mirrors:
      send(line)

  def _append(self, line):
    """Appends a line with one write; a kill leaves at most one partial line, the last."""
    opened = os.fstat(self._file.fileno())
    if not os.path.samestat(os.stat(self._path), opened):  # stat raises if the folder is gone
      raise OSError(errno.ESTALE, "another file is in its place", self._path)
    try:
      written = self._file.write(line)
      if written < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
    except OSError:
      with contextlib.suppress(OSError):
        self._file.truncate(opened.st_size)
      raise

  def close(self):
    """Forces metrics.jsonl to disk and closes it; the last call to this writer."""
    if self._file is not None:
      with self._file:
        os.fsync(self._file.fileno())
      self._file = None


class _Events:
  """Writes the scalars to TensorBoard's file; stops writing, with a warning, after an OSError.

  Not tensorboardX.SummaryWriter, which writes in a thread: after a failed write the tenth step
  would wait forever. Not clu.metric_writers either: they need TensorFlow. tensorboardX is imported
  here, because it loads PyTorch and Google's cloud clients where they are installed: 2.5 s.
  """

  def __init__(self, folder, step):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    os.makedirs(folder, exist_ok=True)
    self._writer = EventsWriter(os.path.join(folder, "events"))
    # Makes TensorBoard drop what a killed run wrote after its last checkpoint.
    self._writer.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

  def add(self, step, numbers):
    """Writes {name: number}, without numbers that are not finite: TensorBoard has no null."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    event = Event(wall_time=time.time(), step=step)
    for name, number in numbers.items():
      if math.isfinite(number):
        event.summary.value.extend(scalar(name, number).value)
    try:
      if self._writer is not None:
        self._writer.write_event(event)
        self._writer.flush()
    except OSError as error:
      logging.warning("TensorBoard's file ends here: %s; metrics.jsonl goes on", error)
      self._writer = None


def _number(name, value):
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"metric {name!r} has shape {array.shape}; write one number per name")
  return array.item()


def truncate_lines(path, stage, step):
  """Removes the lines of `stage` after `step`, and a partial last line, from a JSON-lines file.

  Works line by line, because rollouts.jsonl may be larger than memory.
  """
  if not os.path.exists(path) or all(keep for _, keep in _lines_to_keep(path, stage, step)):
    return
  with atomic_write(path) as temporary, open(temporary, "wb") as file:
    file.writelines(line for line, keep in _lines_to_keep(path, stage, step) if keep)


def _lines_to_keep(path, stage, step):
  """Yields (line, whether to keep it)."""
  with open(path, "rb") as file:
    # In binary, because as text a line would also end at a carriage return.
    for number, line in enumerate(file, start=1):
      if not line.endswith(b"\n"):
        yield line, False
        return
      try:
        record = json.loads(line)
        keep = record["stage"] != stage or record["step"] <= step
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} line {number} is not an object with stage and step ({error}); "
                         "repair or move it") from error
      yield line, keep
