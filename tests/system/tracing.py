"""Small runs under a trace, in a process of their own.

    python tests/system/tracing.py FOLDER

jax's profiler crashes in a process that has libtpu loaded without a TPU, as tests that compile for
TPUs have. Prints one JSON object: of each run, in which steps a trace was running, and at its end.
"""

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import flax.struct  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from ares_jax.run.config import LoopConfig  # noqa: E402
from ares_jax.run.loop import run_stage  # noqa: E402
from ares_jax.system import profiler  # noqa: E402
from ares_jax.system.profiler import PhaseTimer  # noqa: E402


@flax.struct.dataclass
class Counter:
  step: jax.Array


def run(workdir, name="stage", steps=4):
  """Whether a trace was running in each of a stage's steps, and after them."""
  timer, seen = PhaseTimer(), []

  def begin(state):
    def step(state):
      with timer("rollout"):
        seen.append(bool(profiler._running))
        time.sleep(0.001)
      return Counter(state.step + 1), {}, ""
    return step

  run_stage(name, Counter(jnp.int32(0)), begin, steps=steps, workdir=workdir,
            config=LoopConfig(1, 1, False, 2), phases=timer)
  return [*seen, bool(profiler._running)]


def main(folder):
  found = {}
  with profiler.profile_steps(f"{folder}/complete/profile", "stage", 1, 3):
    found["another stage"] = run(f"{folder}/complete", "other")
    found["complete"] = run(f"{folder}/complete")
  with profiler.profile_steps(f"{folder}/last/profile", "stage", 1, 2):
    found["last step"] = run(f"{folder}/last", steps=2)
  try:
    with profiler.profile_steps(f"{folder}/ended/profile", "stage", 0, 9):
      profiler.profile_step("stage", 0)
      found["before the end"] = bool(profiler._running)
      raise RuntimeError("power cut")
  except RuntimeError:
    found["ended inside"] = bool(profiler._running)
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
