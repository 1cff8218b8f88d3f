"""The lock of a run in a bucket, on a real server of the interface."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ares_jax.run import lease, lock
from ares_jax.system import heartbeat
from ares_jax.system.gcs import file_system


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(lease, "_RENEW", 0.2)
  monkeypatch.setattr(lease, "_GONE", 1.0)
  monkeypatch.setattr(lease, "_LOOK", 0.05)


def read(address):
  return file_system().cat_file(f"{address}/lock")


def put(address, **changes):
  """Writes the lock of another process."""
  record = {"host": "elsewhere", "pid": 7, "time": "2025-01-01 00:00:00 +0000"} | changes
  file_system().pipe_file(f"{address}/lock", json.dumps(record).encode())


def test_one_run_a_folder(gcs):
  with lease.lease(gcs) as confirm:
    assert json.loads(read(gcs))["pid"] == os.getpid()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .* since 20"):
      with lease.lease(gcs):
        pass
    confirm()  # still the first one's
  assert read(gcs) == b""
  with lease.lease(gcs):  # and again, when it is over
    assert read(gcs)


def test_of_many_runs_that_begin_at_once_one_gets_the_folder(gcs):
  got, refused, over = [], [], threading.Event()

  def begin():
    try:
      with lease.lease(gcs):
        got.append(1)
        over.wait(60)
    except ValueError as error:
      refused.append(str(error))

  runs = [threading.Thread(target=begin) for _ in range(8)]
  for run in runs:
    run.start()
  limit = time.monotonic() + 60
  while len(refused) < 7 and time.monotonic() < limit:
    time.sleep(0.01)
  over.set()
  for run in runs:
    run.join()
  assert len(got) == 1 and len(refused) == 7
  assert all("is in use by" in text or "taken over by" in text for text in refused)


def test_the_lock_of_a_killed_run_of_this_machine_is_stale_at_once(gcs, caplog, monkeypatch):
  monkeypatch.setattr(lease, "_GONE", 1e9)
  process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
  began = {"machine": lease._machine(), "pid": process.pid, "began": lease._began(process.pid)}
  assert None not in began.values()
  process.kill()
  while lease._began(process.pid):  # a killed process stays until its parent has waited for it
    time.sleep(0.01)
  put(gcs, **began)
  with caplog.at_level(logging.WARNING), lease.lease(gcs):
    assert json.loads(read(gcs))["pid"] == os.getpid()
  process.wait()
  assert f"the lock of process {process.pid} on elsewhere" in caplog.text
  assert "stale" in caplog.text


def test_a_process_number_that_is_used_again_is_another_process(gcs, monkeypatch):
  monkeypatch.setattr(lease, "_GONE", 1e9)
  put(gcs, machine=lease._machine(), pid=os.getpid(), began="1")
  with lease.lease(gcs):
    pass


def test_another_machine_is_believed_while_it_renews_its_lock(gcs):
  put(gcs)
  over = threading.Event()

  def renew():
    while not over.wait(0.1):
      put(gcs)

  other = threading.Thread(target=renew)
  other.start()
  try:
    with pytest.raises(ValueError, match="in use by process 7 on elsewhere since 2025"):
      with lease.lease(gcs):
        pass
  finally:
    over.set()
    other.join()
  began = time.monotonic()
  with lease.lease(gcs):  # silent now
    assert time.monotonic() - began > 1.0
    assert json.loads(read(gcs))["host"] != "elsewhere"


def test_a_run_that_lost_its_lock_is_told_and_stopped(gcs):
  with heartbeat.stop_signals():
    with lease.lease(gcs) as confirm:
      put(gcs)
      with pytest.raises(ValueError, match=f"{gcs} was taken over by process 7 on elsewhere"):
        confirm()
      limit = time.monotonic() + 30
      while not heartbeat.stop_requested() and time.monotonic() < limit:
        time.sleep(0.01)
      assert heartbeat.stop_requested()
    assert json.loads(read(gcs))["host"] == "elsewhere"  # its lock stays


def test_a_stop_ends_the_watching(gcs):
  put(gcs)
  with heartbeat.stop_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(heartbeat.StopRequested), lease.lease(gcs):
      pass


def test_a_write_whose_answer_was_lost_is_recognised(gcs):
  with lease.lease(gcs) as confirm:
    file_system().pipe_file(f"{gcs}/lock", read(gcs))  # as by the same write once more
    confirm()


def test_one_run_yields_the_copy(gcs):
  with lock.one_run(gcs) as folder:
    assert str(folder) == gcs and os.path.isdir(folder)
    with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
      file.write("1\n")
  assert file_system().cat_file(f"{gcs}/metrics.jsonl") == b"1\n"
