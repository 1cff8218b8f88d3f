"""What stage 2 holds between its programs: weights, moments and reference, by what is trained.

    JAX_PLATFORMS=cpu python -m tests.bench.train_memory

Counted on shapes, nothing is compiled: GiB a chip that the arguments of aepo_step take without its
batch, and FLOPs of its mathematics against training all weights.
"""

import jax

from ares_jax.plan import programs
from ares_jax.run import config as run_config
from ares_jax.run import model as model_lib
from ares_jax.system import chips, config, mesh
from ares_jax.training import aepo_step

KINDS = {
  "all weights": {}, "all, moments=bfloat16": {"aepo.optimizer.moments": "bfloat16"},
  "all, moments=factored": {"aepo.optimizer.moments": "factored"},
  "adapters of rank 16": {"model.lora.rank": 16}, "adapters of rank 64": {"model.lora.rank": 64}}
SLICES = {"v5e:1x1": (1, 1), "v5e:8x8": (16, 4)}


def row(size, topology, changes):
  """(GiB a chip, FLOPs of aepo_step)."""
  values = config.load(f"configs/aepo_{size}.py")
  values.update_from_flattened_dict(changes)
  settings = config.build(run_config.TrainConfig, values, "config")
  model = model_lib.model_config(settings.model)
  _, devices = chips.describe_slice(topology)
  with jax.set_mesh(mesh.make_mesh(*SLICES[topology], devices)):
    params, base, _ = programs.abstract_policy(settings.model.lora, model)
    state = aepo_step.abstract_state(settings.aepo, params, base)
    held = programs.device_bytes((state, params, base))
  return held / 2**30, programs.needed_flops(settings, model)["aepo_step"]


def main():
  jax.config.update("jax_platforms", "cpu")
  print(f"| model | trained | {' | '.join(f'{name}, GiB a chip' for name in SLICES)} | FLOPs of "
        "the update |\n" + "| --- " * (3 + len(SLICES)) + "|")
  for size in ("3b", "7b"):
    whole = row(size, "v5e:1x1", {})[1]
    for kind, changes in KINDS.items():
      found = [row(size, topology, changes) for topology in SLICES]
      print(f"| {size.upper()} | {kind} | {' | '.join(f'{held:.2f}' for held, _ in found)} | "
            f"{found[0][1] / whole:.2f} |", flush=True)


if __name__ == "__main__":
  main()
