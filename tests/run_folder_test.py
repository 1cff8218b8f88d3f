import json
import logging
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ares_jax import run_folder

HOLD = '''
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(600)
'''


def record(**changes):
  return json.dumps({"host": socket.gethostname(), "pid": 7, "time": "2025-01-01 00:00:00 +0000"}
                    | changes)


def test_one_run_a_folder(tmp_path):
  with run_folder.lock(str(tmp_path)):
    held = json.loads((tmp_path / "lock").read_text())
    assert held["pid"] == os.getpid() and held["host"] == socket.gethostname()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .* since 20"):
      with run_folder.lock(str(tmp_path)):
        pass
  with run_folder.lock(str(tmp_path)):  # and again, when it is over
    pass
  assert (tmp_path / "lock").read_text() == ""


def test_the_lock_of_a_killed_run_is_stale(tmp_path, caplog):
  path = tmp_path / "lock"
  process = subprocess.Popen([sys.executable, "-c", HOLD, path, record()], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"held\n"
  with pytest.raises(ValueError, match="in use by process 7 on .*; stop that run or use another"):
    with run_folder.lock(str(tmp_path)):
      pass
  process.kill()
  process.wait()
  with caplog.at_level(logging.WARNING), run_folder.lock(str(tmp_path)):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert "the lock of process 7" in caplog.text and "stale" in caplog.text


def test_another_host_is_believed_while_it_renews_its_lock(tmp_path):
  path = tmp_path / "lock"
  path.write_text(record(host="elsewhere"))
  with pytest.raises(ValueError, match="in use by process 7 on elsewhere .*, seen 0 s ago"):
    with run_folder.lock(str(tmp_path)):
      pass
  long_ago = time.time() - run_folder._GONE - 1
  os.utime(path, (long_ago, long_ago))
  with run_folder.lock(str(tmp_path)):
    assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_a_lock_is_renewed(tmp_path, monkeypatch):
  monkeypatch.setattr(run_folder, "_RENEW", 0.05)
  with run_folder.lock(str(tmp_path)):
    os.utime(tmp_path / "lock", (0, 0))
    limit = time.monotonic() + 30
    while not os.stat(tmp_path / "lock").st_mtime and time.monotonic() < limit:
      time.sleep(0.01)
    assert os.stat(tmp_path / "lock").st_mtime > 0


def test_a_dumped_batch_reads_back_and_three_are_kept(tmp_path):
  batch = {"tokens": np.arange(6).reshape(2, 3), "vision": {"patches": np.float32([np.nan])}}
  for step in range(5):
    run_folder.dump_batch(str(tmp_path), "aepo", step, batch)
    os.utime(tmp_path / "nonfinite" / f"aepo-{step}.npz", (step, step))
  assert sorted(os.listdir(tmp_path / "nonfinite")) == ["aepo-2.npz", "aepo-3.npz", "aepo-4.npz"]
  with np.load(tmp_path / "nonfinite" / "aepo-4.npz") as file:
    np.testing.assert_array_equal(file["tokens"], batch["tokens"])
    np.testing.assert_array_equal(file["vision/patches"], batch["vision"]["patches"])
