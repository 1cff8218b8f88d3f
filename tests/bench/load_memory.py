"""Host memory while the weights of a Hugging Face folder are read, beyond the weights themselves.

    python -m tests.bench.load_memory [--mesh=2x2]

Writes a folder of 489 MiB of random bfloat16 tensors and reads it as float32. Prints the peak of
the process's anonymous memory (what malloc and the CPU's "device" hold, not pages of mapped files,
which the kernel takes back) minus the parameters, and the peak of numpy's arrays alone.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import argparse
import pathlib
import tempfile
import threading
import time
import tracemalloc

import jax
import numpy as np

from ares_jax.models import hf
from ares_jax.system import mesh as mesh_lib
from tests.models import random_folder

CONFIG = random_folder.larger(
  random_folder.SMALL, vocab=65536, embed=1024, layers=8, heads=8, head_dim=128, mlp=4096,
  mrope_sections=(16, 24, 24))


def anonymous():
  """Bytes of this process's anonymous memory."""
  with open("/proc/self/status", encoding="ascii") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
  """The largest `anonymous()` seen, looked at every millisecond, above that at the start."""

  def __enter__(self):
    self._start, self.bytes, self._done = anonymous(), 0, threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.is_set():
      self.bytes = max(self.bytes, anonymous() - self._start)
      time.sleep(1e-3)

  def __exit__(self, *exc):
    self._done.set()
    self._thread.join()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--mesh", choices=["1x1", "2x2"], default="1x1")
  data, model = map(int, parser.parse_args().mesh.split("x"))
  mesh = mesh_lib.make_mesh(data, model, jax.devices()[: data * model])
  with tempfile.TemporaryDirectory() as folder:
    shapes = random_folder.write(pathlib.Path(folder), CONFIG)
    largest = 2 * max(map(np.prod, shapes.values()))
    size = 2 * sum(map(np.prod, shapes.values()))
    print(f"folder {_mib(size)}, its largest tensor {_mib(largest)}")
    began = time.monotonic()
    with Peak() as peak:
      params = hf.from_hf(folder, CONFIG, mesh)
    seconds = time.monotonic() - began
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"weights {_mib(weights)}, process beyond them {_mib(peak.bytes - weights)}, "
          f"{seconds:.1f} s")
    del params
    tracemalloc.start()
    hf.from_hf(folder, CONFIG, mesh)
    print(f"arrays of the host {_mib(tracemalloc.get_traced_memory()[1])}")


def _mib(count):
  return f"{count / 2**20:.0f} MiB"


if __name__ == "__main__":
  main()
