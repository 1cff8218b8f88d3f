"""`ares_jax.plan` of configs/aepo_7b.py for 3B and 7B on slices of 16 to 256 chips, row by row.

    JAX_PLATFORMS=cpu python -m tests.bench.plan_full --only=reshard,decode
    JAX_PLATFORMS=cpu python -m tests.bench.plan_full --models=7B --topologies=v5e:8x8
    JAX_PLATFORMS=cpu python -m tests.bench.plan_full --topologies=v5e:2x2 --rank=16 --model-axis=4

Prints a Markdown row as soon as a program is compiled, with the CPU time that took: compiling uses
all cores, and its wall time is the machine's load. "model" has 4 chips where that leaves 16 for
"data", else 1: 7B has 4 heads of keys, and those of 3B, 2, are whole on every chip. A microbatch
has a row a chip of "data". With --rank adapters alone are trained. A GPU has no row: its programs
can be compiled on that GPU only.
"""

import argparse
import time

import jax

from ares_jax.plan import iteration
from ares_jax.plan.suggestions import GIB
from ares_jax.run import config as run_config
from ares_jax.run.model import model_config
from ares_jax.system import config as config_lib

MODELS = {"7B": "Qwen2.5-VL-7B-Instruct", "3B": "Qwen2.5-VL-3B-Instruct"}
TOPOLOGIES = "v5e:8x8", "v5p:4x4x4", "v6e:8x8", "v5p:2x2x4", "v5e:16x16"
DATA, MODEL = 16, 4  # at least; where there are enough


def rows(model, topology, only, *, rank, model_axis, cache_gib):
  """Lines of the table, one a program; 0 stands for no adapters, the rule above, the config's."""
  values = config_lib.load("configs/aepo_7b.py")
  chips = 1
  for size in topology.split(":")[1].split("x"):
    chips *= int(size)
  parts = model_axis or (MODEL if chips >= DATA * MODEL else 1)
  values.update_from_flattened_dict({
    "model.path": MODELS[model], "model.lora.rank": rank, "mesh.model": parts,
    "aepo.microbatch": chips // parts,
    "engine.cache_gib": cache_gib or values.engine.cache_gib})
  config = config_lib.build(run_config.TrainConfig, values, "config")
  for program in only:
    start = time.process_time()
    found = iteration.plan_iteration(config, model_config(config.model), topology, only=(program,))
    (part,) = found.programs
    memory = part.memory
    sent = "-" if part.sent is None else f"{sum(part.sent.values()) / 1e9:.2f}"
    moved = "-" if part.memory_bytes is None else f"{part.memory_bytes / 1e9:.1f}"
    name = [model, f"LoRA {rank}" * bool(rank), f"cache {cache_gib:g} GiB" * bool(cache_gib)]
    yield (f"| {', '.join(filter(None, name))} | {topology} | "
           f"{' x '.join(map(str, found.mesh[1:]))} | {program} | "
           f"{memory.total / GIB:.2f} of {found.chip.memory / GIB:.2f} | {part.calls} | "
           f"{part.model_flops / 1e15:.3g} | {part.flops / 1e15:.3g} | {sent} | {moved} | "
           f"{part.floor:.4g} ({part.limit}) | {time.process_time() - start:.0f} |")


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", default=",".join(MODELS))
  parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
  parser.add_argument("--only", default=",".join(iteration.NAMES))
  parser.add_argument("--rank", type=int, default=0)
  parser.add_argument("--model-axis", type=int, default=0)
  parser.add_argument("--cache-gib", type=float, default=0.0)
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  print("| model | slice | data x model | program | GiB a chip | calls | model PFLOP | computed "
        "PFLOP | sent, GB a chip | memory, GB a chip | floor, s | CPU s to compile |\n"
        + "| --- " * 12 + "|", flush=True)
  for model in options.models.split(","):
    for topology in options.topologies.split(","):
      for row in rows(model, topology, options.only.split(","), rank=options.rank,
                      model_axis=options.model_axis, cache_gib=options.cache_gib):
        print(row, flush=True)


if __name__ == "__main__":
  main()
