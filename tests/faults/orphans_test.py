"""No process of a run outlives it, however it ends."""

import os
import subprocess
import sys
import time

import pytest

GRADER = '''
import os, time
def endless(response, truth):
  with open("worker.tmp", "w") as file:
    file.write(str(os.getpid()))
  os.rename("worker.tmp", "worker")
  time.sleep(600)
'''
RUN = '''
from ares_jax.system import heartbeat
from ares_jax.grading.pool import GradingPool
with heartbeat.stop_signals(), GradingPool(1, 300.0, grader="user_grader:endless") as pool:
  pool.grade(["a"], ["b"])
'''


def alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.parametrize("end", ["killed", "asked twice"])
def test_a_grader_in_an_endless_formula_ends_with_the_run(tmp_path, end):
  (tmp_path / "user_grader.py").write_text(GRADER)
  path = os.pathsep.join([os.getcwd(), str(tmp_path)])
  run = subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path, stderr=subprocess.PIPE,
                         env=os.environ | {"PYTHONPATH": path})
  limit = time.monotonic() + 300
  while not (tmp_path / "worker").exists():
    assert run.poll() is None and time.monotonic() < limit
    time.sleep(0.02)
  worker = int((tmp_path / "worker").read_text())
  assert alive(worker)
  if end == "killed":
    run.kill()
  else:
    run.terminate()
    while b"stopping" not in run.stderr.readline():
      pass
    time.sleep(0.6)  # a signal that follows at once is taken for the same one
    run.terminate()
  run.wait(timeout=60)
  limit = time.monotonic() + 10
  while alive(worker) and time.monotonic() < limit:
    time.sleep(0.02)
  assert not alive(worker)
