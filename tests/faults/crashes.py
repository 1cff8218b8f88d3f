"""Kills a small run again and again, and compares its end with that of an uninterrupted run.

    python tests/faults/crashes.py FOLDER [SEED] [RANDOM_KILLS]

The run has everything that a stage has: a data stream, a log, AdamW moments, a controller, and a
position in the data that differs from the step. SIGKILL ends it in every phase of PHASES, and at
random moments. Prints one JSON object. Runs are forked from this process, which never uses a
device.
"""

import json
import os
import random
import shutil
import signal
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
if __name__ == "__main__":  # the runs share compiled programs
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(sys.argv[1], "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
sys.path[:0] = [os.path.join(os.path.dirname(__file__), *up) for up in (("..", ".."), ("..",))]

import flax.struct  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ares_jax.data.sources import stream  # noqa: E402
from ares_jax.run import config, loop, metrics  # noqa: E402
from ares_jax.run.checkpoint import manager, reader  # noqa: E402
from ares_jax.training import optimizer  # noqa: E402

STEPS, SAVE_EVERY = 80, 2
_TIMED = ("seconds/", "device/", "speed/", "memory/")
ADAM = optimizer.OptimizerConfig(
  learning_rate=0.1, schedule="constant", warmup_steps=0, final_fraction=1.0, b1=0.9, b2=0.99,
  eps=1e-8, weight_decay=0.0, clip=1.0, moments="float32")
# Where a run is killed: before a call of this function has begun, or after it has returned.
PHASES = {
  "rollout": None,  # in the middle of a line of the stage's own log
  "update": None,  # after the update, before the step has returned
  "metrics": (metrics.MetricWriter, "write_scalars", "after"),
  "torn metrics": (metrics.MetricWriter, "write_scalars", "torn"),
  "save": (manager.Checkpoints, "save", "after"),  # the commit is under way
  "commit": (manager.Checkpoints, "_finish_save", "before"),
  "read back": (reader, "verify_on_disk", "before"),
  "delete": (manager.ocp.CheckpointManager, "delete", "half"),
  "truncate": (metrics.os, "replace", "before"),  # when it goes on
}


@flax.struct.dataclass
class State:
  step: jax.Array
  batches: jax.Array
  params: dict
  opt_state: tuple
  controller: jax.Array


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def run(workdir, phase, *, steps=STEPS, keep=1, each=lambda number: None):
  """The run, until it is killed; `each` is called before every step."""
  arm(phase)
  tx = optimizer.make_optimizer(ADAM)
  path = os.path.join(workdir, "rollouts.jsonl")

  @jax.jit
  def update(state, target):
    grads = {"w": state.params["w"] - target + state.controller}
    params, opt_state, _ = optimizer.apply_update(tx, grads, state.opt_state, state.params, 0.1)
    state = State(state.step + 1, state.batches + 1 + state.step % 2, params, opt_state,
                  0.9 * state.controller + 0.1 * params["w"])
    return state, {"w": params["w"].sum(), "batches": state.batches}

  def begin(state):
    metrics.truncate_lines(path, "toy", int(state.step))
    batches = stream(list(range(50)), batch=4, seed=0, encode=lambda row: row,
                     start=int(state.batches), threads=1)

    def step(state):
      note("steps", int(state.step))
      each(int(state.step))
      # As with online filtering, every other step draws two batches.
      batch = np.float32([next(batches) for _ in range(1 + int(state.step) % 2)][-1])
      line = json.dumps({"stage": "toy", "step": int(state.step) + 1, "rows": batch.tolist()})
      with open(path, "a") as file:
        if phase == "rollout":
          file.write(line[:len(line) // 2])
          file.flush()
          die()
        file.write(line + "\n")
      state, scalars = update(state, batch)
      if phase == "update":
        jax.block_until_ready(state)
        die()
      time.sleep(0.002)
      return state, scalars, ""

    return step

  def note(name, value):
    with open(os.path.join(workdir, name), "a") as file:
      file.write(f"{value}\n")

  @jax.jit
  def first():
    params = {"w": jnp.zeros(4)}
    return State(jnp.int32(0), jnp.int32(0), params, tx.init(params), jnp.zeros(4))

  loop.run_stage("toy", first(), begin, steps=steps, workdir=workdir,
                 config=config.LoopConfig(SAVE_EVERY, keep, False, 2))


def arm(phase):
  """Replaces the phase's function by one that kills this process."""
  if PHASES.get(phase) is None:
    return
  owner, name, when = PHASES[phase]
  function, calls = getattr(owner, name), []

  def deadly(*args, **kwargs):
    calls.append(1)
    if phase not in ("truncate", "delete") and len(calls) < 2:
      return function(*args, **kwargs)
    if when == "after":
      function(*args, **kwargs)
    elif when == "torn":
      args[0]._file.write(b'{"stage": "toy", "st')
    elif when == "half":
      folder = os.path.join(str(args[0].directory), str(args[1]), "state")
      shutil.rmtree(folder)
    die()

  setattr(owner, name, deadly)


def live(workdir, phase=None, after=None):
  """Forks a run and returns whether it was killed; `after` returns when it is time to kill it."""
  pid = os.fork()
  if pid == 0:
    try:
      sys.stderr = open(os.path.join(workdir, "stderr"), "a")
      run(workdir, phase)
      os._exit(0)
    except BaseException as error:
      print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
      os._exit(1)
  if after is not None:
    after()
    os.kill(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  if os.WIFEXITED(status) and os.WEXITSTATUS(status):
    with open(os.path.join(workdir, "stderr")) as file:
      raise RuntimeError(f"a run failed in phase {phase}: {file.read()[-2000:]}")
  return os.WIFSIGNALED(status)


def begun(workdir):
  """Numbers of the steps that were started, repeated ones included."""
  path = os.path.join(workdir, "steps")
  if not os.path.exists(path):
    return []
  with open(path) as file:
    return [int(line) for line in file.read().split("\n")[:-1]]


def wait_for(workdir, steps, seconds):
  """Returns `seconds` after that many steps were begun, or a minute from now."""
  limit = time.monotonic() + 60
  while len(begun(workdir)) < steps and time.monotonic() < limit:
    time.sleep(0.001)
  time.sleep(seconds)


def end(workdir):
  """The results that must not depend on kills: digests of the state, both logs without times."""
  folder = os.path.join(workdir, "toy")
  step = max((name for name in os.listdir(folder) if name.isdigit()), key=int)
  with open(os.path.join(folder, step, "extra", "metadata")) as file:
    found = {"step": step, "leaves": json.load(file)["record"]["leaves"]}
  for name in ("metrics.jsonl", "rollouts.jsonl"):
    with open(os.path.join(workdir, name)) as file:
      found[name] = [{key: value for key, value in json.loads(line).items()
                      if not key.startswith(_TIMED)} for line in file]
  return found


def main(folder, seed=0, kills=10):
  rng, report = random.Random(int(seed)), {}
  names = {"alone": os.path.join(folder, "alone"), "killed": os.path.join(folder, "killed")}
  for path in names.values():
    os.makedirs(path)
  live(names["alone"])
  redone = []

  def attempt(**how):
    before = begun(names["killed"])
    killed = live(names["killed"], **how)
    after = begun(names["killed"])[len(before):]
    if before and after:
      redone.append(max(before) + 1 - after[0])
    return killed

  report["phases"] = {phase: attempt(phase=phase) for phase in PHASES}
  report["random"] = 0
  for _ in range(int(kills)):
    steps, seconds = len(begun(names["killed"])) + rng.randrange(5), rng.random() * 0.05
    report["random"] += attempt(after=lambda steps=steps, seconds=seconds: wait_for(
      names["killed"], steps, seconds))
  live(names["killed"])
  report["redone"] = redone
  report["steps"] = len(begun(names["killed"]))
  report["equal"] = end(names["alone"]) == end(names["killed"])
  report["lines"] = len(end(names["killed"])["metrics.jsonl"])
  return report


if __name__ == "__main__":
  print(json.dumps(main(*sys.argv[1:])))
