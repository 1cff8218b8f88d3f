"""Trains the smallest run in several layouts of processes and devices, and compares the results.

    python tests/faults/hosts.py FOLDER [STEPS]

Layouts are PROCESSES x DEVICES over 127.0.0.1; the run is stage 2 alone, from fresh weights. Prints
a table: how far the weights are from those of one process and one device, whether the samples are
the same, and the same of a run that resumes from another layout's checkpoint.
"""

import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__)
ROOT = HERE.parent.parent.parent
LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
# Compiling takes most of the time, so little is optimised, in all layouts alike.
XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SMALL = {"model__sizes__layers": 1, "aepo__group": 2, "aepo__minibatch": 8,
         "aepo__sampling__max_tokens": 6, "aepo__loop__keep": 9, "aepo__loop__save_every": 1,
         "aepo__log_responses": 99, "hosts__heartbeat": 120.0, "hosts__join": 300.0,
         "warmup__steps": 0, "adacs__steps": 0}


def environment(number, count, devices, port):
  """The environment of process `number` of `count`."""
  keep = {name: value for name, value in os.environ.items()
          if not name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "JAX_COORD"))}
  keep |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
           "XLA_FLAGS": f"{XLA} --xla_force_host_platform_device_count={devices}",
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
           "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
  if count > 1:
    keep |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
             "JAX_PROCESS_ID": str(number)}
  return keep


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def start(command, name, processes, devices, *, numbers=None, each=None):
  """Starts the processes of a layout; process N prints to NAME-N.log.

  Args:
    command: arguments of python.
    name: path of the logs, without -N.log.
    processes, devices: the layout.
    numbers: of the processes that are started; None is all.
    each: {number of a process: further words}.
  """
  port, started = free_port(), []
  cache = {"JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(name).parent / "jax")}
  for number in range(processes) if numbers is None else numbers:
    with open(f"{name}-{number}.log", "w") as log:
      started.append(subprocess.Popen(
        [sys.executable, *map(str, command), *(each or {}).get(number, ())], cwd=ROOT,
        stdout=log, stderr=log, env=cache | environment(number, processes, devices, port)))
  return started


def log(name, number):
  return pathlib.Path(f"{name}-{number}.log").read_text()


def run(workdir, processes, devices, steps, address=None, *, reward="", model=1, changes=None):
  """Stage 2 to its end, from its newest checkpoint; returns its weights, see `child`.

  `workdir` is the run's folder here, or `address` is that of one in a bucket, whose objects are
  files in `workdir`. `reward` is a reward function, if any; `model` is the size of the mesh's
  "model" axis. With `changes` of the config all stages run, and are evaluated.
  """
  workdir = str(workdir)
  started = start([str(HERE), "--child", address or workdir, str(steps), reward,
                   model, json.dumps(changes or {})], workdir, processes, devices)
  codes = [process.wait(timeout=1200) for process in started]
  for number, code in enumerate(codes):
    if code:
      raise RuntimeError(f"process {number} of {processes} x {devices} ended with {code}: "
                         f"{log(workdir, number)[-3000:]}")
  said = {log(workdir, number).splitlines()[-1] for number in range(processes)}
  if len(said) > 1:
    raise RuntimeError(f"processes of {processes} x {devices} end with different weights: {said}")
  return np.load(f"{workdir}/weights.npy")


def child(workdir, steps, reward="", model="1", changes="{}"):
  """One process of a run."""
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  import jax
  import tiny

  from ares_jax import aepo, train
  from ares_jax.run import lock, setup
  from ares_jax.system import cluster, mesh
  from ares_jax.system import heartbeat as heartbeat_lib

  changes = json.loads(changes)
  scored = {"reward__function": reward, "reward__accuracy": "grader"} if reward else {}
  config = tiny.read(**SMALL | {"aepo__steps": int(steps)} | scored | changes)
  with cluster.join_cluster(config.hosts), heartbeat_lib.stop_signals(), \
      lock.one_run(workdir) as workdir, jax.set_mesh(mesh.make_mesh(-1, int(model))), \
      setup.open_run(config, workdir=workdir) as parts:
    # Fresh weights are never right: let answers of odd length be.
    grader = parts.generator.grader.grader if reward else parts.generator.grader
    grader.name, grader._grade_here = "odd", lambda pair: len(pair[0]) % 2
    context = setup.StageContext(parts.generator, workdir, config.seed, threads=1)
    params = train.train(parts, workdir) if changes else aepo.train_aepo(
      parts.init_params(), parts.source("rl"), config.aepo, context, trigger_V=parts.trigger_V)
    weights = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mesh.fetch(params))])
    if jax.process_index() == 0:
      np.save(os.path.join(workdir, "weights.npy"), weights)
  print(hashlib.sha256(weights.tobytes()).hexdigest())


def waiting(join, heartbeat, seed="0"):
  """A process that joins, compares its seed and waits."""
  sys.path[:0] = [str(ROOT)]
  from ares_jax.system import cluster, hosts

  with cluster.join_cluster(cluster.HostsConfig(float(join), float(heartbeat))):
    hosts.check_same({"seed": int(seed)}, "was started with another config")
    print("joined", flush=True)
    time.sleep(600)


def odd(response, truth):
  """A grader: answers of odd length are right."""
  return len(response) % 2


def shared(model, folder):
  """Exchanges bytes, rows and records; `model` is the size of the mesh's "model" axis."""
  sys.path[:0] = [str(ROOT)]
  import jax

  from ares_jax.data import sharded
  from ares_jax.data.prompts import EncodedPrompt
  from ares_jax.run.files import dump_batch
  from ares_jax.system import cluster, hosts, mesh, shares

  with cluster.join_cluster(cluster.HostsConfig(300.0, 120.0)), \
      jax.set_mesh(mesh.make_mesh(-1, int(model))):
    count, local = jax.process_count(), jax.process_index()
    hosts._CHUNK_BYTES = 1 << 18  # several rounds

    def sent(here, to):
      return np.random.default_rng(10 * here + to).bytes((here * 37 + to * 1001) * 91)

    got = hosts.exchange_bytes([sent(local, to) for to in range(count)])
    assert got == [sent(here, local) for here in range(count)]

    for rows in (16, 8, 5, 1):  # 5 and 1 are filled up with the first rows again
      share = shares.share(rows)
      assert {process for each in share.holders for process in each} == set(range(count))
      assert all(owner in each for owner, each in zip(share.owner, share.holders, strict=True))
      got = shares.gather(share, np.float32([[row, -row] for row in share.held]))
      np.testing.assert_array_equal(got, np.float32([[row, -row] for row in range(rows)]))
      assert sharded.gather(share, [[row, "é"] for row in share.held.tolist()]) == [
        [row, "é"] for row in range(rows)]

    share, whole = shares.share(16), np.arange(48, dtype=np.float32).reshape(16, 3)
    columns = shares.put_rows({"x": whole.T[:, share.held]}, 16, None, mesh.ROWS)["x"]
    rows = shares.put_rows(whole[share.held], 16, mesh.ROWS)
    np.testing.assert_array_equal(mesh.fetch(columns), whole.T)
    np.testing.assert_array_equal(shares.fetch_rows(rows), whole[share.held])
    complete = shares.put_rows(whole, 16, mesh.ROWS)
    np.testing.assert_array_equal(mesh.fetch(complete), whole)
    try:
      shares.put_rows(whole[share.held], 17, mesh.ROWS)
    except ValueError as error:
      assert "does not divide over" in str(error)
    else:
      raise AssertionError("17 rows went on these devices")

    # Every prompt moves to where the next ones were.
    values = {row: EncodedPrompt(np.full(3, row), None, None, [(np.full((2, 4), row, np.uint8),
                                                                (1, 2, 1))])
              for row in share.held.tolist()}
    to = {(row + 5) % 16: share.holders[row] for row in range(16)}
    moved = sharded.deliver(values, dict(enumerate(share.owner)), to, at_once=3)
    assert sorted(moved) == sorted((row + 5) % 16 for row in share.held.tolist())
    assert all((prompt.images[0][0] == row).all() and (prompt.tokens == row).all()
               for row, prompt in moved.items())

    one = mesh.put(np.float32(7))
    dump_batch(folder, "aepo", 3, {"rows": rows, "columns": columns, "one": one})
    if local == 0:
      with np.load(f"{folder}/nonfinite/aepo-3.npz") as file:
        np.testing.assert_array_equal(file["rows"], whole)
        np.testing.assert_array_equal(file["columns"], whole.T)
        assert file["one"] == 7 and len(file) == 3


def endless(response, truth):
  """A grader that leaves its worker's process id in the file that the response names."""
  pathlib.Path(f"{response}.tmp").write_text(str(os.getpid()))
  os.rename(f"{response}.tmp", response)
  time.sleep(600)


def supervised(restarts, *words):
  """A supervisor, as train has it, of a process of this script."""
  sys.path[:0] = [str(ROOT)]
  from ares_jax.system import supervisor

  sys.exit(supervisor.supervise([sys.executable, str(HERE), *words], int(restarts), pause=1.0))


def grading(folder):
  """Grades by workers: process 0 three answers, process 1 one; then one that never ends."""
  sys.path[:0] = [str(ROOT)]
  import concurrent.futures

  import jax

  from ares_jax.grading.pool import GradingPool
  from ares_jax.sampling.rollout import grade_sharded
  from ares_jax.system import cluster, shares
  from ares_jax.system import heartbeat as heartbeat_lib

  with cluster.join_cluster(cluster.HostsConfig(300.0, 120.0)), heartbeat_lib.stop_signals():
    texts = ["a", "bb", "ccc"][:1 if jax.process_index() else 3]
    with GradingPool(1, 300.0, grader="hosts:odd") as pool:
      graded = pool.begin()
      for index, text in enumerate(texts):
        graded.add(index, text, "")
        concurrent.futures.wait(graded._waiting.values())
      share = shares.Share(((0,), (1,), (0,), (0,)))
      correct, _, _ = grade_sharded(graded.finish, share, 1)
      print("graded", correct.tolist(), flush=True)
    grader = "hosts:endless" if jax.process_index() else "hosts:odd"
    with GradingPool(1, 300.0, grader=grader) as pool:
      grade_sharded(lambda: pool.grade([f"{folder}/worker"], [""]), share, 1)


def toy(workdir, steps, seed="0", refuse=""):
  """One process of a stage without a model, slow enough to be stopped."""
  sys.path[:0] = [str(ROOT)]
  import jax

  from ares_jax.run import lock, loop
  from ares_jax.system import cluster, hosts, mesh
  from ares_jax.system import heartbeat as heartbeat_lib

  loop._BARRIER_SECONDS = 5
  with cluster.join_cluster(cluster.HostsConfig(300.0, 120.0)), heartbeat_lib.stop_signals(), \
      lock.one_run(workdir) as workdir, jax.set_mesh(mesh.make_mesh(-1, 1)):
    hosts.check_same({"seed": int(seed)}, "was started with another config")
    toy_stage(workdir, int(steps), pause=0.1, refuse=refuse)


def toy_stage(workdir, steps, pause=0.0, refuse=""):
  """Adds up the numbers of a stream, on the current mesh; a digest of the sums.

  Args:
    workdir, steps, pause: folder, steps in all, seconds of each.
    refuse: "process_0" or "alone": step 3 refuses its data, on process 0 for all, on process 1
      alone. With the first, process 1 finds the checkpoint of step 2 damaged.
  """
  import flax.struct
  import jax

  from ares_jax.data import sharded
  from ares_jax.run.checkpoint import digest, reader
  from ares_jax.run.config import LoopConfig
  from ares_jax.run.loop import run_stage
  from ares_jax.system import hosts, mesh, shares

  @flax.struct.dataclass
  class State:
    step: jax.Array
    sums: jax.Array  # [4]

  def begin(state):
    batches = sharded.sharded_stream(list(range(64)), batch=4, seed=0, encode=lambda row: row + 1,
                                     start=int(state.step), threads=1)

    def step(state):
      time.sleep(pause)
      part = next(batches)
      if jax.process_index() == 0:
        print("step", int(state.step), part.rows, flush=True)
      if refuse == "process_0" and int(state.step) == 3:
        hosts.on_process_0(lambda: int("no number"))
      if refuse == "alone" and int(state.step) == 3 and jax.process_index() == 1:
        raise ValueError("a bad row that nobody else sees")
      encoded = shares.put_rows(np.float32(part.encoded), 4, mesh.ROWS)
      return State(state.step + 1, state.sums + encoded), {}, ""

    return step

  if refuse == "process_0" and jax.process_index() == 1:
    verify = reader.verify_on_disk

    def fail(directory, step, leaves):
      if step == 2:
        raise OSError(28, "No space left on device")
      verify(directory, step, leaves)

    reader.verify_on_disk = fail
  first = State(mesh.put(np.int32(0)), mesh.put(np.zeros(4, np.float32), "data"))
  state = run_stage("toy", first, begin, steps=steps, workdir=workdir,
                    config=LoopConfig(2, 2, False, 0))
  return digest.digest_tree({"sums": state.sums})["sums"]


def samples(workdir, step):
  """What was sampled in an iteration: (problem, sample, tokens, entropies to 1e-3)."""
  with open(os.path.join(workdir, "rollouts.jsonl"), encoding="utf-8") as file:
    lines = [line for line in map(json.loads, file) if line["step"] == step]
  return sorted((line["id"], line["sample"], line["tokens"]) for line in lines)


def copy_until(before, workdir, step):
  """Copies a run's folder as it was at `step`."""
  shutil.copytree(before, workdir)
  for name in os.listdir(f"{workdir}/aepo"):
    if name.isdigit() and int(name) > step:
      shutil.rmtree(f"{workdir}/aepo/{name}")
  if not os.path.isdir(f"{workdir}/aepo/{step}"):
    raise ValueError(f"{before} has no checkpoint of step {step}")


def main(folder, steps=30):
  steps, weights = int(steps), {}
  os.makedirs(folder, exist_ok=True)
  print("| processes x devices | largest difference | samples | taken up from | difference |")
  print("| --- | --- | --- | --- | --- |", flush=True)
  previous = LAYOUTS[-1]
  for layout in LAYOUTS[-1:] + LAYOUTS:
    name = os.path.join(folder, "{}x{}".format(*layout))
    if layout not in weights:
      weights[layout] = run(name, *layout, steps)
    if len(weights) == 1:
      continue
    other = os.path.join(folder, "{}x{}".format(*previous))
    taken = f"{name}-from-{previous[0]}x{previous[1]}"
    copy_until(other, taken, max(1, steps - SMALL["aepo__loop__keep"] + 1))  # its oldest checkpoint
    resumed = run(taken, *layout, steps)
    same = [all(samples(name, step) == samples(path, step) for step in range(1, steps + 1))
            for name, path in ((name, other), (name, taken))]
    alone = weights.get((1, 1))
    print("| {}x{} | {:.1e} | {} | {}x{} | {:.1e} |".format(
      *layout, np.abs(weights[layout] - alone).max(), "equal" if all(same) else "DIFFERENT",
      *previous, np.abs(resumed - weights[layout]).max()), flush=True)
    previous = layout
  for one, two in (((1, 2), (2, 1)), ((2, 2), (4, 1))):
    print(one, two, "bitwise" if (weights[one] == weights[two]).all() else "NOT BITWISE")


if __name__ == "__main__":
  modes = {"--child": child, "--waiting": waiting, "--toy": toy, "--grading": grading,
           "--shared": shared, "--supervised": supervised}
  try:
    modes.get(sys.argv[1], main)(*sys.argv[2 if sys.argv[1] in modes else 1:])
  except KeyboardInterrupt as stop:
    sys.exit(f"stopped: {stop}")
