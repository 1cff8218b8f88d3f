"""The progress bar of a stage, the speed of its steps and the memory of the devices."""

import collections
import contextlib
import math
import statistics
import sys
import time

import jax

from ares_jax.system import chips, compiling

_GIB = 2**30
_RECENT = 30  # updates whose median speed tells the time left


class Progress:
  """A progress bar with the time left, on stderr; plain lines if stderr is not a terminal.

  The time left is that of the remaining steps at the median speed of the last updates, without the
  seconds in which they compiled.
  """

  def __init__(self, total, stage, *, unit="step", start=0, stream=None, clock=time.monotonic,
               every=10.0):
    """A bar of `total` units; a resumed run had finished `start` of them when this process started.

    `stream` None is stderr; plain lines are printed `every` seconds of `clock`.
    """
    self._total, self._stage, self._unit = total, stage, unit
    self._stream = sys.stderr if stream is None else stream
    self._clock, self._every = clock, every
    self._last = start, clock() - compiling.seconds()  # at the last update
    self._recent = collections.deque(maxlen=_RECENT)  # seconds a unit
    self._written = -math.inf
    self._width = 0
    self._silent = jax.process_index() != 0

  def update(self, step, note=""):
    """Shows that `step` units are finished, followed by `note`, e.g. "accuracy 0.61"."""
    if self._silent:
      return
    now = self._clock()
    line = f"{self._stage} {step}/{self._total}"
    last, began = self._last
    self._last = step, now - compiling.seconds()
    if step > last:
      self._recent.append((self._last[1] - began) / (step - last))
    if self._recent:
      seconds = statistics.median_low(self._recent)
      left = _duration(seconds * (self._total - step))
      line += f" {seconds:.2f} s/{self._unit}, {left} left"
    line += f"  {note}" if note else ""
    if self._stream.isatty():
      filled = int(20 * step / max(self._total, 1))
      line = f"[{'#' * filled}{'.' * (20 - filled)}] {line}"
      self._write("\r" + line.ljust(self._width))
      self._width = len(line)
    elif now - self._written >= self._every or step >= self._total:
      self._write(line + "\n")
      self._written = now

  def say(self, text):
    """Writes a line that stays."""
    if not self._silent:
      self._write("\r" * bool(self._width) + text.ljust(self._width) + "\n")
      self._width = 0

  def close(self):
    """Ends the line of the bar."""
    if self._width:
      self._write("\n")

  def _write(self, text):
    # A closed terminal or a pipe without a reader must not end a run.
    with contextlib.suppress(OSError):
      self._stream.write(text)
      self._stream.flush()


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def speed_metrics(metrics, seconds):
  """Speed and memory as metrics of a step of some seconds; unknown numbers are left out.

  "speed/tokens" (per second) comes from "work/tokens" of the step's metrics. "speed/mfu" (model
  FLOPs utilisation) is "work/flops", which the mathematics of the step needs (models/flops.py),
  over what all chips could do in that time, if system/chips.py knows them. "memory/peak" (since the
  process started) and "memory/limit" are GiB of the fullest device.
  """
  devices = jax.devices()
  found = {}
  if "work/tokens" in metrics:
    found["speed/tokens"] = float(metrics["work/tokens"]) / seconds
  chip = chips.chip_of(devices[0])
  if chip and "work/flops" in metrics:
    found["speed/mfu"] = float(metrics["work/flops"]) / seconds / len(devices) / chip.flops
  # memory_stats() is None on devices without counters, such as CPUs.
  stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())
           and {"peak_bytes_in_use", "bytes_limit"} <= stats.keys()]
  if stats:
    fullest = max(stats, key=lambda one: one["peak_bytes_in_use"] / one["bytes_limit"])
    found |= {"memory/peak": fullest["peak_bytes_in_use"] / _GIB,
              "memory/limit": fullest["bytes_limit"] / _GIB}
  return found


def speed_note(found):
  """The result of `speed_metrics` as a note for the progress bar."""
  parts = []
  if "speed/tokens" in found:
    parts.append(f"{found['speed/tokens']:.3g} tokens/s")
  if "speed/mfu" in found:
    parts.append(f"MFU {found['speed/mfu']:.1%}")
  if "memory/peak" in found:
    parts.append(f"HBM {found['memory/peak']:.1f} of {found['memory/limit']:.1f} GiB")
  return ", ".join(parts)
