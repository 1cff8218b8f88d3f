"""TPU chips: what is published of them, and slices of them described without having one.

Peaks are of one chip, from Google's pages https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e:
bfloat16 compute, memory bandwidth, and half of the bidirectional interconnect bandwidth, which is
what a chip can send on all its links together; so is the size of the largest slice. Memory is what
libtpu 0.0.52 lets a program have, by its own message; the pages say 16, 95 and 32 GB.
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
  flops: float  # a second, bfloat16
  memory: float  # bytes
  memory_rate: float  # bytes a second
  link_rate: float  # bytes a second sent, all links together
  axes: int  # of the torus
  most: int  # chips of a slice


CHIPS = {chip.name: chip for chip in (
  Chip("v5e", "TPU v5 lite", flops=197e12, memory=15.75 * 2**30,
       memory_rate=819e9, link_rate=200e9, axes=2, most=256),
  Chip("v5p", "TPU v5", flops=459e12, memory=95.73 * 2**30,
       memory_rate=2765e9, link_rate=600e9, axes=3, most=6144),
  Chip("v6e", "TPU v6 lite", flops=918e12, memory=31.24 * 2**30,
       memory_rate=1600e9, link_rate=400e9, axes=2, most=256),
)}


def chip_of(device):
  """The Chip that a device is, None where its numbers are not here."""
  return next((chip for chip in CHIPS.values() if chip.kind == device.device_kind), None)


def describe_slice(topology):
  """(Chip, devices) of a slice such as "v5e:8x8" or "v5p:2x2x4", or of several, "2xv5e:8x8";
  programs can be compiled for them.

  Raises:
    ValueError: not the form of a topology, a kind of chip without numbers here, another number of
      axes than the chip's torus has, more chips than a slice, a slice that libtpu does not know, or
      no libtpu.
  """
  # A size of 0 would end the process inside libtpu.
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
  # libtpu describes larger ones too, which nobody rents out.
  if math.prod(map(int, sizes)) > chip.most:
    raise ValueError(f"topology {topology!r} has {math.prod(map(int, sizes))} chips; the largest "
                     f"slice of {name} has {chip.most}")
  # Compiling asks for no TPU; without this libtpu looks for one in the cloud's metadata.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside another process that compiles
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{name}:{found[3]}", num_slices=slices).devices
  except RuntimeError as error:
    remedy = "pip install libtpu" if "libtpu" in str(error) else "see the chip's documentation"
    raise ValueError(f"topology {topology!r}: {error}; {remedy}") from error
  return chip, devices
