"""A run of four supervised processes loses some of them, and ends as if it had not."""

import json
import os
import pathlib
import random
import signal
import time

import jax
import pytest
from faults import hosts

from ares_jax.system import mesh

pytestmark = pytest.mark.slow

STEPS = 24
LOST = (2, 0)  # processes that are killed, one after the other; process 0 is the coordinator


@pytest.fixture
def started(tmp_path):
  """The supervisors of a run of four processes, in tmp_path / "run"."""
  words = ["--supervised", "4", "--toy", tmp_path / "run", STEPS]
  processes = hosts.start([hosts.HERE, *words], tmp_path / "log", 4, 1)
  yield processes
  for process in processes:
    process.kill()
    process.wait()


def wait_for(condition, started):
  limit = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < limit and all(process.poll() is None for process in started)
    time.sleep(0.05)


def child(process):
  """Process id of a supervisor's child; 0 between two starts."""
  text = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
  return int((text.split() or [0])[0])


def saved(folder):
  """The newest step that is saved."""
  steps = [int(name) for name in os.listdir(folder) if name.isdigit()] if folder.exists() else []
  return max(steps, default=0)


def test_a_run_that_loses_processes_ends_with_the_bytes_of_one_that_did_not(tmp_path, started):
  rng, before = random.Random(), 0
  for number in LOST:
    wait_for(lambda before=before: saved(tmp_path / "run/toy") > before, started)
    time.sleep(rng.uniform(0, 1))
    before = saved(tmp_path / "run/toy")
    os.kill(child(started[number]), signal.SIGKILL)
  codes = [process.wait(timeout=120) for process in started]
  logs = [hosts.log(tmp_path / "log", number) for number in range(4)]
  assert codes == [0] * 4, "\n".join(logs)
  for number, log in enumerate(logs):
    assert "restart 1 of 4 in 1 s: " in log
    assert number not in LOST or "the process was ended by SIGKILL" in log
  steps = [json.loads(line)["step"] for line in open(tmp_path / "run/metrics.jsonl")]
  assert steps == list(range(1, STEPS + 1))
  with jax.set_mesh(mesh.make_mesh(-1, 1)):  # 4 devices of this process
    ended = hosts.toy_stage(str(tmp_path / "run"), STEPS)
    assert hosts.toy_stage(str(tmp_path / "alone"), STEPS) == ended
