"""Injects faults into small runs in a bucket, and prints how many the runs survived.

    python tests/faults/bucket_soak.py --minutes=10 [--seed=0]
    python tests/faults/bucket_soak.py --once       every fault once

A round is a run as in crashes.py, with its folder at gs://. Faults of the run, of its network and
of the server are injected one after the other until it ends. A round survives its faults if the
bucket then holds the bytes of an uninterrupted run on a disk. A fault that must have an effect (a
refusal, a stop) has to show it too.
"""

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time

FOLDER = tempfile.mkdtemp(prefix="bucket-soak-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(FOLDER, "jax"))
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]

import crashes  # noqa: E402
import gcs  # noqa: E402

from ares_jax.run import bucket, lease, lock, loop  # noqa: E402
from ares_jax.system import heartbeat  # noqa: E402

STEPS = 24
PATIENCE = 300  # seconds for any process to end
GONE = 3.0  # seconds after which a silent run's lock may be taken


def start(address, log, steps=STEPS):
  """Forks a run, as the command would run it; its process id."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    sys.stderr = open(log, "a")
    os.dup2(sys.stderr.fileno(), 2)
    bucket._EVERY, lease._RENEW, lease._GONE, lease._LOOK = 0.5, 0.5, GONE, 0.1
    loop._RETRY_PAUSES = (0.5, 1.0)
    with heartbeat.stop_signals(), lock.one_run(address) as workdir:
      crashes.run(workdir, None, keep=2, steps=steps)
    code = 0
  except KeyboardInterrupt as stop:
    code = 130
    print(f"stopped: {stop}", file=sys.stderr, flush=True)
  except (OSError, ValueError) as error:
    code = 3
    print(f"error: {error}", file=sys.stderr, flush=True)  # one line, as command.run writes it
  except BaseException as error:
    print(f"bug: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
  finally:
    os._exit(code)


def ended(pid):
  """The exit code of a run; -N if signal N ended it, None if it had to be killed."""
  limit = time.monotonic() + PATIENCE
  while time.monotonic() < limit:
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  return None


class Round:
  """A run and the faults that are injected into it; each returns whether it was answered well."""

  def __init__(self, number, rng, server, proxy):
    self.rng, self.server, self.proxy = rng, server, proxy
    self.address = f"gs://{gcs.BUCKET}/round-{number}"
    self.folder = server.folder / gcs.BUCKET / f"round-{number}"
    self.log = os.path.join(FOLDER, f"round-{number}.log")

  def start(self):
    return start(self.address, self.log)

  def soon(self, least=0.5, most=4.0):
    """Waits until the run works, and a random time longer."""
    time.sleep(self.rng.uniform(least, most))

  def killed(self):
    pid = self.start()
    self.soon()
    os.kill(pid, signal.SIGKILL)
    return ended(pid) in (-signal.SIGKILL, 0)

  def stopped(self):
    pid = self.start()
    self.soon()
    os.kill(pid, signal.SIGTERM)
    return ended(pid) in (130, 0)

  def server_restarted(self):
    pid = self.start()
    self.soon()
    self.server.stop()
    time.sleep(self.rng.uniform(0.2, 5))
    self.server.start()
    self.soon()
    return self.killed_after(pid)

  def refusing(self):
    return self.misbehaving(refuse=0.3)

  def losing_answers(self):
    return self.misbehaving(lose=0.2)

  def slow(self):
    return self.misbehaving(seconds=0.2)

  def misbehaving(self, **how):
    pid = self.start()
    self.proxy.misbehave(**how)
    self.soon(1, 8)
    self.proxy.misbehave()
    return self.killed_after(pid)

  def killed_after(self, pid):
    """Kills a run that must not have ended by itself, but for its end."""
    os.kill(pid, signal.SIGKILL)
    return ended(pid) in (-signal.SIGKILL, 0)

  def second_run(self):
    first = self.start()
    self.soon(2, 4)
    second = self.start()
    code = ended(second)
    os.kill(first, signal.SIGKILL)
    done = ended(first) == 0
    with open(self.log) as file:
      return done or (code == 3 and "in use by process" in file.read())

  def frozen_and_taken_over(self):
    """A run is frozen until another one has taken over, then goes on, and must notice."""
    first = self.start()
    self.soon(2, 4)
    os.kill(first, signal.SIGSTOP)
    # The other run is on another machine: it cannot see that the process still exists.
    time.sleep(GONE)
    second = self.start()
    self.soon(GONE + 1, GONE + 5)
    os.kill(first, signal.SIGCONT)
    code, other = ended(first), ended(second)
    with open(self.log) as file:
      text = file.read()
    return other == 0 and (code == 0 or code in (3, 130) and "was taken over by" in text)

  def steps(self):
    """The steps of the checkpoints that are complete, oldest first."""
    return sorted(int(path.parent.name) for path in self.folder.glob("toy/*/commit_success.txt")
                  if path.parent.name.isdigit())

  def damaged(self):
    """Changes an object of the newest of two checkpoints, while no run is there."""
    pid = self.start()
    while len(self.steps()) < 2:
      time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    files = [path for path in (self.folder / "toy" / str(self.steps()[-1])).rglob("*")
             if path.is_file() and path.stat().st_size]
    path = self.rng.choice(sorted(files))
    data = bytearray(path.read_bytes())
    if self.rng.random() < 0.5:
      data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
    else:
      del data[self.rng.randrange(len(data)):]
    with open(path, "r+b") as file:  # in place: the server keeps an object's record beside it
      file.write(data)
      file.truncate()
    return True


FAULTS = {
  "SIGKILL at a random moment": (Round.killed, 6), "SIGTERM": (Round.stopped, 2),
  "server stopped and started": (Round.server_restarted, 3),
  "3 of 10 requests answered 503": (Round.refusing, 3),
  "2 of 10 answers lost": (Round.losing_answers, 3), "0.2 s an answer": (Round.slow, 2),
  "second run in the folder": (Round.second_run, 2),
  "frozen, taken over by another run": (Round.frozen_and_taken_over, 2),
  "object of the newest checkpoint damaged": (Round.damaged, 4)}


def at_random(minutes, rng):
  """Yields names of faults until the time is over."""
  until = time.monotonic() + 60 * minutes
  while time.monotonic() < until:
    yield from rng.choices(list(FAULTS), [weight for _, weight in FAULTS.values()])


def soak(names, rng):
  """Runs rounds with up to 6 of the named faults until there are none left; {fault: Counter}."""
  alone = os.path.join(FOLDER, "alone")
  os.makedirs(alone)
  if ended(start(alone, os.path.join(FOLDER, "alone.log"))) != 0:
    raise RuntimeError(f"the run that is left alone fails: see {FOLDER}/alone.log")
  wanted = crashes.end(alone)
  server_port = gcs.free_port()
  proxy = gcs.Proxy(os.path.join(FOLDER, "faults"), server_port)
  server = gcs.Server(os.path.join(FOLDER, "objects"), server_port, proxy.port)
  os.environ.update(gcs.environment(proxy.port))
  server.start()
  counts, names = {name: collections.Counter() for name in FAULTS}, iter(names)
  try:
    for number in itertools.count():
      one, own = Round(number, rng, server, proxy), []
      while len(own) < 6 and not (one.folder / "toy" / str(STEPS)).exists():
        name = next(names, None)
        if name is None:
          break
        answered = FAULTS[name][0](one)
        if answered is None:  # there was nothing to damage yet
          names = itertools.chain([name], names) if not own else names
          FAULTS["SIGKILL at a random moment"][0](one)
        else:
          own.append((name, answered))
      if not own:
        return counts
      last = ended(one.start())
      try:
        equal = last == 0 and crashes.end(str(one.folder)) == wanted
      except (OSError, ValueError, KeyError):
        equal = False
      for name, answered in own:
        counts[name]["survived" if equal and answered else "lost"] += 1
      if not equal or not all(answered for _, answered in own):
        print(f"round {number}: exit {last}, equal {equal}, {own}; see {one.folder}, {one.log}",
              file=sys.stderr)
  finally:
    server.stop()
    proxy.stop()


def table(counts):
  lines = ["| fault | injected | survived | lost |", "| --- | --- | --- | --- |"]
  total = collections.Counter()
  for name, count in counts.items():
    total += count
    lines.append(f"| {name} | {sum(count.values())} | {count['survived']} | {count['lost']} |")
  return "\n".join([*lines, f"| together | {sum(total.values())} | {total['survived']} | "
                    f"{total['lost']} |"])


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--once", action="store_true")
  parser.add_argument("--json", action="store_true")
  words = parser.parse_args()
  rng = random.Random(words.seed)
  names = FAULTS if words.once else at_random(words.minutes, rng)
  found = soak(names, rng)
  print(json.dumps(found) if words.json else table(found))
  if not any(count["lost"] for count in found.values()):
    shutil.rmtree(FOLDER)
  sys.exit(any(count["lost"] for count in found.values()))
