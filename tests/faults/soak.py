"""Injects faults into small runs for a given time, and prints how many the runs survived.

    python tests/faults/soak.py --minutes=30 [--seed=0] [--folder=DIR]

Every round is a run as in crashes.py, into which faults are injected one after the other until it
ends. A round survives its faults if it ends with the bytes of an uninterrupted run. A fault that
must have an effect (a stop, a refusal) has to show it too.
"""

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

FOLDER = tempfile.mkdtemp(prefix="soak-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(FOLDER, "jax"))
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path[:0] = [os.path.dirname(__file__), ROOT]

import crashes  # noqa: E402
import numpy as np  # noqa: E402

from ares_jax.run import lock, loop  # noqa: E402
from ares_jax.system import heartbeat  # noqa: E402

PATIENCE = 600  # seconds for any process to end, on a busy machine
MEASURED = 400  # steps of the run whose memory is measured
FROZEN = '''
import os, sys
sys.path.insert(0, sys.argv[1])
from ares_jax.grading.pool import GradingPool  # noqa: E402
with GradingPool(1, 2.0, grader="frozen_grader:frozen") as pool:
  pool.grade(["a"], ["b"])
'''
GRADER = '''
import os, signal
def frozen(response, truth):
  with open("worker", "w") as file:
    file.write(str(os.getpid()))
  os.kill(os.getpid(), signal.SIGSTOP)
'''


def start(workdir, *, before=lambda: None, each=lambda number: None):
  """Forks a run, as the command would run it; its process id."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    sys.stderr = open(os.path.join(workdir, "stderr"), "a")
    os.dup2(sys.stderr.fileno(), 2)
    loop._RETRY_PAUSES = (0.05, 0.1)
    before()
    with heartbeat.stop_signals(), lock.lock(workdir), heartbeat.watchdog(
        os.path.join(workdir, "stacks.txt"), 5.0):
      crashes.run(workdir, None, keep=2, each=each)
    code = 0
  except KeyboardInterrupt:
    code = 130
  except (OSError, ValueError) as error:
    code = 3
    print(f"error: {error}", file=sys.stderr, flush=True)  # one line, as command.run writes it
  finally:
    os._exit(code)


def ended(pid, patience=PATIENCE):
  """Exit code, or minus the signal; None where the process had to be ended."""
  limit = time.monotonic() + patience
  while time.monotonic() < limit:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  return None


def alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


class Round:
  """One run. Each method injects a fault and returns whether the expected effect came."""

  def __init__(self, workdir, rng):
    self.workdir, self.rng = workdir, rng

  def soon(self):
    """Waits until the run that was started is somewhere in its next steps."""
    steps = len(crashes.begun(self.workdir)) + self.rng.randrange(1, 6)
    crashes.wait_for(self.workdir, steps, self.rng.random() * 0.05)

  def steps(self):
    folder = os.path.join(self.workdir, "toy")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if name.isdigit()), key=int)

  def signalled(self, *numbers, accepts):
    pid = start(self.workdir)
    self.soon()
    for number in numbers:
      os.kill(pid, number)
      time.sleep(0.02)
    return ended(pid) in (*accepts, 0)  # 0: it was over before

  def killed(self):
    return self.signalled(signal.SIGKILL, accepts=(-signal.SIGKILL,))

  def stopped(self):
    return self.signalled(signal.SIGTERM, accepts=(130,))

  def stopped_twice(self):
    return self.signalled(signal.SIGTERM, signal.SIGTERM, accepts=(130,))

  def second_run(self):
    pid = start(self.workdir)
    self.soon()
    other = ended(start(self.workdir))
    os.kill(pid, signal.SIGKILL)
    first = ended(pid)
    return other == 3 or first == 0

  def disk_full(self):
    size = self.rng.choice((300, 1500, 4000))

    def limit():
      sys.stderr = open(os.devnull, "w")  # a file of the disk that is full would refuse it
      resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return ended(start(self.workdir, before=limit)) in (3, 0)

  def hung(self):
    stacks = os.path.join(self.workdir, "stacks.txt")

    def before():
      watch = heartbeat.watchdog
      heartbeat.watchdog = lambda path, minutes: watch(path, 0.01)

    at = len(crashes.begun(self.workdir)) % 50 + 2
    code = ended(start(self.workdir, before=before,
                       each=lambda number: time.sleep(600) if number > at else None))
    return code in (0, 1) and (code == 0 or os.path.exists(stacks))

  def damaged(self, change):
    if len(self.steps()) < 2:
      return None
    newest = os.path.join(self.workdir, "toy", self.steps()[-1])
    names = [os.path.join(root, name) for root, _, found in os.walk(newest) for name in found]
    path = self.rng.choice([name for name in names if os.path.getsize(name)])
    with open(path, "rb") as file:
      data = bytearray(file.read())
    change(data)
    with open(path, "wb") as file:
      file.write(data)
    return True

  def bit_flipped(self):
    def flip(data):
      data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)

    return self.damaged(flip)

  def file_cut(self):
    def cut(data):
      del data[self.rng.randrange(len(data)):]

    return self.damaged(cut)

  def file_deleted(self):
    return self.damaged(lambda data: data.clear())

  def line_torn(self):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
      path = os.path.join(self.workdir, name)
      if os.path.exists(path):
        with open(path, "a") as file:
          file.write('{"stage": "toy", "step": 9999, "x"')
    return True

  def vanished(self):
    aside = self.workdir + "-aside"
    pid = start(self.workdir)
    self.soon()
    os.rename(self.workdir, aside)
    code = ended(pid)
    shutil.rmtree(self.workdir, ignore_errors=True)
    os.rename(aside, self.workdir)
    return code in (3, 0)

  def frozen_grader(self):
    folder = tempfile.mkdtemp(dir=FOLDER)
    with open(os.path.join(folder, "frozen_grader.py"), "w") as file:
      file.write(GRADER)
    done = subprocess.run([sys.executable, "-c", FROZEN, ROOT], cwd=folder, text=True,
                          capture_output=True, timeout=PATIENCE,
                          env=os.environ | {"PYTHONPATH": folder})
    with open(os.path.join(folder, "worker")) as file:
      return "hangs or dies" in done.stderr and not alive(int(file.read()))


FAULTS = {
  "SIGKILL at a random moment": (Round.killed, 8), "SIGTERM": (Round.stopped, 4),
  "SIGTERM twice": (Round.stopped_twice, 2), "bit flipped in the newest checkpoint":
  (Round.bit_flipped, 4), "file of it cut": (Round.file_cut, 2),
  "file of it emptied": (Round.file_deleted, 2), "disk full": (Round.disk_full, 3),
  "log line torn": (Round.line_torn, 2), "workdir vanished": (Round.vanished, 2),
  "second run in the workdir": (Round.second_run, 2), "hung step": (Round.hung, 1),
  "frozen grader": (Round.frozen_grader, 1)}


def measure(workdir):
  """(step, RSS in KiB, file descriptors) at every tenth step of an uninterrupted run."""
  path = os.path.join(workdir, "memory")

  def each(number):
    if number % 10 == 0:
      with open("/proc/self/status") as file:
        rss = next(line.split()[1] for line in file if line.startswith("VmRSS"))
      with open(path, "a") as file:
        file.write(f"{number} {rss} {len(os.listdir('/proc/self/fd'))}\n")

  os.makedirs(workdir)
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      sys.stderr = open(os.path.join(workdir, "stderr"), "a")
      crashes.run(workdir, None, steps=MEASURED, keep=2, each=each)
      code = 0
    finally:
      os._exit(code)
  if ended(pid, 10 * PATIENCE) != 0:
    raise RuntimeError(f"the run that is measured fails: see {workdir}/stderr")
  return np.loadtxt(path)


def soak(folder, minutes, seed):
  """Runs rounds until the time is over; returns the numbers of the table."""
  rng, until = random.Random(seed), time.monotonic() + 60 * minutes
  alone = os.path.join(folder, "alone")
  os.makedirs(alone)
  if ended(start(alone)) != 0:
    raise RuntimeError(f"the run that is left alone fails: see {alone}/stderr")
  wanted, counts = crashes.end(alone), {name: collections.Counter() for name in FAULTS}
  needed = begun = rounds = 0
  while time.monotonic() < until:
    rounds += 1
    workdir = os.path.join(folder, f"round-{rounds}")
    os.makedirs(workdir)
    one, injected, own = Round(workdir, rng), [], {}
    for _ in range(12):
      name = rng.choices(list(FAULTS), [weight for _, weight in FAULTS.values()])[0]
      answered = FAULTS[name][0](one)
      if answered is not None:
        injected.append(name)
        own[name] = own.get(name, True) and answered
      if time.monotonic() > until or crashes.STEPS in map(int, one.steps()):
        break
    last = ended(start(workdir))
    try:
      equal = last == 0 and crashes.end(workdir) == wanted
    except (OSError, ValueError, KeyError):
      equal = False
    for name in injected:
      counts[name]["survived" if equal and own[name] else "lost"] += 1
    needed, begun = needed + crashes.STEPS, begun + len(crashes.begun(workdir))
    if equal and all(own.values()):
      shutil.rmtree(workdir)
    else:
      print(f"round {rounds}: exit {last}, equal {equal}, own answers {own}; kept in {workdir}",
            file=sys.stderr, flush=True)
  number, rss, files = measure(os.path.join(folder, "memory")).T
  settled = number >= MEASURED / 4
  return {"counts": counts, "rounds": rounds, "goodput": needed / max(begun, 1),
          "slope": np.polyfit(number[settled], rss[settled], 1)[0], "rss": rss[-1] / 1024,
          "files": (int(files[settled][0]), int(files[-1]))}


def table(found):
  lines = ["| fault | injected | survived | lost |", "| --- | --- | --- | --- |"]
  total = collections.Counter()
  for name, count in found["counts"].items():
    total += count
    lines.append(f"| {name} | {sum(count.values())} | {count['survived']} | {count['lost']} |")
  lines += [f"| together | {sum(total.values())} | {total['survived']} | {total['lost']} |", "",
            f"{found['rounds']} runs of {crashes.STEPS} steps; {100 * found['goodput']:.0f}% of "
            "the steps begun were needed. Left alone for "
            f"{MEASURED} steps with {MEASURED // 2} saves: "
            f"{found['rss']:.0f} MiB at the end, {found['slope']:+.2f} KiB a step over the last "
            f"three quarters; {found['files'][0]} open files then, {found['files'][1]} at the end."]
  return "\n".join(lines)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", default=FOLDER)
  words = parser.parse_args()
  print(table(soak(words.folder, words.minutes, words.seed)))
