"""Speed of a step and memory of the devices; unknown numbers are left out, never guessed.

MFU (model FLOPs utilisation) is the FLOPs that the mathematics of a step needs (models/flops.py)
over the FLOPs that all chips could do in the time of the step; it is known for the chips in
system/chips.py.
"""

import jax

from ares_jax.system import chips

_GIB = 2**30


def speed_metrics(metrics, seconds):
  """Speed and memory as metrics of a step.

  Args:
    metrics: of the step, "work/tokens" and "work/flops" among them if they are known.
    seconds: duration of the step.

  Returns:
    dict with some of "speed/tokens" (per second), "speed/mfu" (fraction of the peak), "memory/peak"
    and "memory/limit" (GiB of the fullest device; the peak since the process started).
  """
  devices = jax.devices()
  found = {}
  if "work/tokens" in metrics:
    found["speed/tokens"] = float(metrics["work/tokens"]) / seconds
  chip = chips.chip_of(devices[0])
  if chip and "work/flops" in metrics:
    found["speed/mfu"] = float(metrics["work/flops"]) / seconds / len(devices) / chip.flops
  # memory_stats() is None on devices without counters, such as CPUs.
  stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  stats = [one for one in stats if {"peak_bytes_in_use", "bytes_limit"} <= one.keys()]
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
