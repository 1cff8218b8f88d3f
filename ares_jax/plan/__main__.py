"""Plans a run on TPU chips before you rent any: memory, work and the shortest time.

    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=v5e:8x8 --config.mesh.model=4 \\
      --config.aepo.microbatch=16
    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=v5p:4x4x4 --only=decode --json \\
      --config.mesh.model=4 --config.aepo.microbatch=16
    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=v5e:8x8 --config.mesh.model=4 \\
      --config.aepo.microbatch=16 --lengths=lognormal:0.15
    python -m ares_jax.plan --config=configs/aepo_7b.py --topology=2xv5e:8x8 \\
      --config.mesh.slice=2 --config.mesh.model=4 --config.aepo.microbatch=32

Compiles the programs of one AEPO iteration for the slice (with libtpu, without a TPU). For each
program it prints the memory that it needs on a chip and whether that fits, its FLOPs, the bytes it
moves over links and memory, and a lower bound of its time. The model's path may be a folder with a
config.json or the name of a published model; weights are not read. Compiling aepo_step of 7B takes
3 minutes of CPU time; --only=NAME,... compiles less. --lengths compiles nothing: it simulates a
rollout whose answers have such lengths ("lognormal:MEDIAN", a share of max_tokens, which is the
99th percentile; "equal"; or a file with a length a line), and prints its steps, bytes and floor.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("plan", needs_config=True)

import dataclasses
import json
import sys

import jax
from absl import flags
from ml_collections import config_flags

from ares_jax.plan import rollouts
from ares_jax.plan.iteration import NAMES, plan_iteration, plan_table
from ares_jax.run.config import build_config
from ares_jax.run.files import RENAMED_SETTINGS
from ares_jax.run.model import model_config
from ares_jax.system.command import UsageError, require_config, run


def main():
  options = flags.FLAGS
  config = build_config(require_config(options.config))
  if not options.topology:
    raise UsageError("pass --topology=KIND:SIZES, such as v5e:8x8, or 2xv5e:8x8 for two slices")
  if not options.only or set(options.only) - set(NAMES):
    raise UsageError(f"--only={','.join(options.only)}: choose from {', '.join(NAMES)}")
  if options.json and options.lengths:
    raise UsageError("--lengths prints a table alone; leave out --json")
  # The chips are only described: jax must not look for them, and it cannot read programs compiled
  # for them back from a cache.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  model = model_config(config.model)
  if options.lengths:
    print(rollouts.rollout_table(config, model, options.topology, options.lengths))
    return
  plan = plan_iteration(config, model, options.topology, only=options.only,
                        note=lambda line: print(line, file=sys.stderr, flush=True))
  print(json.dumps(dataclasses.asdict(plan)) if options.json else plan_table(plan))


def define_flags():
  """Defines the flags; not at import, because tests import two commands that define --config."""
  config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
  flags.DEFINE_string("topology", None, "Slice of chips, such as v5e:8x8 or v5p:2x2x4.")
  flags.DEFINE_list("only", list(NAMES), f"Programs to compile: {', '.join(NAMES)}.")
  flags.DEFINE_string("lengths", None, "Simulates a rollout: lognormal:MEDIAN, equal or a file.")
  flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


if __name__ == "__main__":
  define_flags()
  run(main, renamed=RENAMED_SETTINGS)
