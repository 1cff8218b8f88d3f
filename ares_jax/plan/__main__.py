"""Shows what a run needs on TPU chips before you rent any: memory, work and the shortest time.

    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=v5e:8x8 --config.mesh.model=4 \\
      --config.aepo.microbatch=16
    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=v5p:4x4x4 --only=decode --json \\
      --config.mesh.model=4 --config.aepo.microbatch=16
    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=2xv5e:8x8 \\
      --config.mesh.slice=2 --config.mesh.model=4 --config.aepo.microbatch=32

Compiles the programs of one AEPO iteration for the slice (with libtpu, without a TPU). For each it
prints the memory needed on a chip and what the chip has, FLOPs, bytes over links and memory, and a
floor for its time. The model's path may be a folder with a config.json or the name of a published
model; weights are not read. Compiling aepo_step of 7B takes 3 minutes of CPU time; --only=NAME,...
compiles less.
"""

import dataclasses
import json
import sys

import jax
from absl import flags
from ml_collections import config_flags

from ares_jax.plan.plan import NAMES, make_plan, plan_table
from ares_jax.run.config import build_config
from ares_jax.run.model import model_config
from ares_jax.system.command import UsageError, require_config, run


def main():
  words = flags.FLAGS
  config = build_config(require_config(words.config))
  if not words.topology:
    raise UsageError("pass --topology=KIND:SIZES, such as v5e:8x8, or 2xv5e:8x8 for two slices")
  if not words.only or set(words.only) - set(NAMES):
    raise UsageError(f"--only={','.join(words.only)}: choose from {', '.join(NAMES)}")
  # The chips are described, not there; nothing may look for them, and what was compiled for them
  # cannot be read back from a cache.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  model = model_config(config.model)
  result = make_plan(config, model, words.topology, only=words.only,
                     note=lambda line: print(line, file=sys.stderr, flush=True))
  print(json.dumps(dataclasses.asdict(result)) if words.json else plan_table(result))


def define_flags():
  """Not at import: two commands in one process would define --config twice."""
  config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
  flags.DEFINE_string("topology", None, "Slice of chips, such as v5e:8x8 or v5p:2x2x4.")
  flags.DEFINE_list("only", list(NAMES), f"Programs to compile: {', '.join(NAMES)}.")
  flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


if __name__ == "__main__":
  define_flags()
  run(main)
