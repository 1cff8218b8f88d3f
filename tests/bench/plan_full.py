"""`ares_jax.plan` of configs/aepo_7b.py for 3B and 7B on slices of 16 to 256 chips, row by row.

    JAX_PLATFORMS=cpu python -m tests.bench.plan_full --only=reshard,decode
    JAX_PLATFORMS=cpu python -m tests.bench.plan_full --models=7B --topologies=v5e:8x8

Prints a Markdown row as soon as a program is compiled, with the CPU time that took: compiling uses
all cores, and its wall time is the machine's load. "model" has 4 chips where that leaves 16 for
"data", else 1: 7B has 4 heads of keys, and those of 3B, 2, are whole on every chip. A microbatch
has a row a chip of "data". A GPU has no row: its programs can be compiled on that GPU only.
"""

import argparse
import time

import jax

from ares_jax import config as config_lib
from ares_jax import plan, programs, setup

MODELS = {"7B": "Qwen2.5-VL-7B-Instruct", "3B": "Qwen2.5-VL-3B-Instruct"}
TOPOLOGIES = "v5e:8x8", "v5p:4x4x4", "v6e:8x8", "v5p:2x2x4", "v5e:16x16"
DATA, MODEL = 16, 4  # at least; where there are enough


def rows(model, topology, only):
  """Lines of the table, one a program."""
  values = config_lib.load("configs/aepo_7b.py")
  chips = 1
  for size in topology.split(":")[1].split("x"):
    chips *= int(size)
  parts = MODEL if chips >= DATA * MODEL else 1
  values.update_from_flattened_dict({
    "model.path": MODELS[model], "mesh.model": parts, "aepo.microbatch": chips // parts})
  config = setup.build(setup.TrainConfig, values, "config")
  for name in only:
    start = time.process_time()
    found = plan.plan(config, programs.sizes(config.model), topology, only=(name,))
    (part,) = found.programs
    memory = part.memory
    sent = "-" if part.sent is None else f"{sum(part.sent.values()) / 1e9:.2f}"
    moved = "-" if part.memory_bytes is None else f"{part.memory_bytes / 1e9:.1f}"
    yield (f"| {model} | {topology} | {' x '.join(map(str, found.mesh))} | {name} | "
           f"{memory.total / plan.GIB:.2f} of {found.chip.memory / plan.GIB:.2f} | {part.calls} | "
           f"{part.model_flops / 1e15:.3g} | {part.flops / 1e15:.3g} | {sent} | {moved} | "
           f"{part.floor:.4g} ({part.limit}) | {time.process_time() - start:.0f} |")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", default=",".join(MODELS))
  parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
  parser.add_argument("--only", default=",".join(plan.NAMES))
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  print("| model | slice | data x model | program | GiB a chip | calls | model PFLOP | computed "
        "PFLOP | sent, GB a chip | memory, GB a chip | floor, s | CPU s to compile |\n"
        + "| --- " * 12 + "|", flush=True)
  for model in options.models.split(","):
    for topology in options.topologies.split(","):
      for row in rows(model, topology, options.only.split(",")):
        print(row, flush=True)


if __name__ == "__main__":
  main()
