"""TPU chips: their published numbers, and descriptions of slices for compiling without a TPU.

The numbers are of one chip, from https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e: bfloat16
compute, memory bandwidth, chips of the largest slice, and half of the bidirectional interconnect
bandwidth, the rate at which a chip can send on all its links together. Memory is the limit that
libtpu 0.0.52 states in its error message; the pages say 16, 95 and 32 GB.
"""

import dataclasses
import difflib
import math
import os
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU chip."""

  name: str
  kind: str  # jax's device_kind
  flops: float  # per second, bfloat16
  memory: float  # bytes
  memory_rate: float  # bytes per second
  link_rate: float  # bytes sent per second, all links together
  axes: int  # of the torus
  max_chips: int  # of a slice


CHIPS = {chip.name: chip for chip in (
  Chip("v5e", "TPU v5 lite", flops=197e12, memory=15.75 * 2**30,
       memory_rate=819e9, link_rate=200e9, axes=2, max_chips=256),
  Chip("v5p", "TPU v5", flops=459e12, memory=95.73 * 2**30,
       memory_rate=2765e9, link_rate=600e9, axes=3, max_chips=6144),
  Chip("v6e", "TPU v6 lite", flops=918e12, memory=31.24 * 2**30,
       memory_rate=1600e9, link_rate=400e9, axes=2, max_chips=256),
)}


def chip_of(device):
  """The Chip of a device; None if its numbers are not in CHIPS."""
  return next((chip for chip in CHIPS.values() if chip.kind == device.device_kind), None)


def describe_slice(topology):
  """(Chip, devices) of a slice, or several, for which programs can be compiled.

  `topology` is "v5e:8x8", "v5p:2x2x4", or "2xv5e:8x8" for two slices. Raises ValueError if it is
  malformed, no such slice exists, or libtpu is not installed.
  """
  # A size of 0 would crash libtpu.
  found = re.fullmatch(r"(?:([1-9]\d*)x)?([^:]*):([1-9]\d*(?:x[1-9]\d*)*)", topology)
  if not found:
    raise ValueError(f"topology {topology!r} is not KIND:SIZES with sizes >= 1, such as v5e:8x8 or "
                     "v5p:2x2x4; several slices are 2xv5e:8x8")
  slices, name, sizes = int(found[1] or 1), found[2], found[3].split("x")
  if name not in CHIPS:
    near = difflib.get_close_matches(name.lower(), CHIPS, n=1)
    raise ValueError(
      f"topology {topology!r}: no chip {name!r} here" + (f"; did you mean {near[0]!r}?" if near else
      f"; known: {', '.join(CHIPS)} (a GPU's programs can be compiled on that GPU only)"))
  chip = CHIPS[name]
  if len(sizes) != chip.axes:
    example = ":".join((name, "x".join("4" * chip.axes)))
    raise ValueError(f"topology {topology!r} has {len(sizes)} sizes, but the torus of {name} has "
                     f"{chip.axes} axes; write for example {example}")
  # libtpu also describes larger slices, which do not exist.
  count = math.prod(map(int, sizes))
  if count > chip.max_chips:
    raise ValueError(f"topology {topology!r} has {count} chips; the largest slice of {name} has "
                     f"{chip.max_chips}")
  # Compiling needs no TPU; without this libtpu looks for one in the cloud's metadata.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # other processes may compile too
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{name}:{found[3]}", num_slices=slices).devices
  except RuntimeError as error:
    advice = "pip install libtpu" if "libtpu" in str(error) else "see the chip's documentation"
    raise ValueError(f"topology {topology!r}: {error}; {advice}") from error
  return chip, devices
