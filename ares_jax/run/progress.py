"""Shows the progress of a stage on the terminal."""

import contextlib
import math
import sys
import time

import jax


class Progress:
  """A progress bar with the time left, on stderr; plain lines if stderr is not a terminal."""

  def __init__(self, total, stage, *, start=0, stream=None, clock=time.monotonic, every=10.0):
    """
    Args:
      total: steps of the stage.
      stage: name of the stage, printed first.
      start: steps that were finished before this process started (a resumed run).
      stream: None is stderr.
      clock: function that returns seconds.
      every: seconds between plain lines.
    """
    self._total, self._stage, self._start = total, stage, start
    self._stream = sys.stderr if stream is None else stream
    self._clock, self._every = clock, every
    self._began = clock()
    self._first = (total, 0.0)  # step and time of the first update
    self._written = -math.inf
    self._width = 0
    self._silent = jax.process_index() != 0

  def update(self, step, note=""):
    """Shows that `step` steps are finished, followed by `note`, e.g. "accuracy 0.61"."""
    if self._silent:
      return
    now = self._clock()
    line = f"{self._stage} {step}/{self._total}"
    if step > self._start:
      first, began = self._first
      # Compiling takes most of the first step, so the later averages leave it out.
      if step <= first:
        first, began = self._start, self._began
        self._first = (step, now)
      seconds = (now - began) / (step - first)
      line += f" {seconds:.2f} s/step, {_duration(seconds * (self._total - step))} left"
    line += f"  {note}" if note else ""
    if self._stream.isatty():
      filled = int(20 * step / max(self._total, 1))
      line = f"[{'#' * filled}{'.' * (20 - filled)}] {line}"
      self._write("\r" + line.ljust(self._width))
      self._width = len(line)
    elif now - self._written >= self._every or step >= self._total:
      self._write(line + "\n")
      self._written = now

  def close(self):
    """Ends the line of the bar."""
    if not self._silent and self._stream.isatty() and self._width:
      self._write("\n")

  def _write(self, text):
    # A closed terminal or a pipe without a reader must not end a run.
    with contextlib.suppress(OSError):
      self._stream.write(text)
      self._stream.flush()


def _duration(seconds):
  hours, seconds = divmod(round(seconds), 3600)
  minutes, seconds = divmod(seconds, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{seconds:02d}s"
