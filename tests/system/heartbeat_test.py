import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from ares_jax.system import heartbeat

# Loads the module without jax, so that the process starts quickly.
LOAD = f'''
import ctypes, importlib.util, os, sys, time
path = {str(pathlib.Path(heartbeat.__file__))!r}
spec = importlib.util.spec_from_file_location("heartbeat", path)
heartbeat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heartbeat)
'''
CHILD = LOAD + '''
with heartbeat.stop_signals():
  print("ready", flush=True)
  try:
    for _ in range(600):
      time.sleep(0.1)
      if sys.argv[1] == "heartbeats":
        heartbeat.heartbeat()
  except heartbeat.StopRequested:
    print("stopped safely", flush=True)
'''


def child(kind):
  process = subprocess.Popen([sys.executable, "-c", CHILD, kind], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", heartbeat.SIGNALS)
def test_a_signal_stops_at_the_next_heartbeat(number):
  process = child("heartbeats")
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (0, "stopped safely\n")
  assert "stopping at the next safe point" in err


def test_a_second_signal_of_either_kind_ends_at_once():
  process = child("no heartbeats")
  process.send_signal(signal.SIGTERM)
  assert "stopping" in process.stderr.readline() + process.stderr.readline()
  time.sleep(1)  # within half a second it would be the same request, sent twice
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130 and "ended at once" in err


def test_a_signal_that_comes_twice_at_once_is_one_request():
  process = child("heartbeats")
  process.send_signal(signal.SIGINT)  # from the terminal
  process.send_signal(signal.SIGTERM)  # from the supervisor
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (0, "stopped safely\n") and err.count("stopping") == 1


def test_without_a_stop_request_heartbeats_pass_and_handlers_are_restored():
  before = [signal.getsignal(number) for number in heartbeat.SIGNALS]
  with heartbeat.stop_signals():
    with heartbeat.stop_signals():
      heartbeat.heartbeat()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(heartbeat.StopRequested):
      for _ in range(100):
        heartbeat.heartbeat()
        time.sleep(0.01)
  heartbeat.heartbeat()
  assert not heartbeat.stop_requested()
  assert [signal.getsignal(number) for number in heartbeat.SIGNALS] == before


def test_a_run_without_heartbeats_writes_its_stacks_and_ends(tmp_path, monkeypatch):
  ended, kept = [], []
  monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
  # The timer of faulthandler would end this very process.
  monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later", lambda *_, **__: None)
  path = tmp_path / "stacks.txt"
  with heartbeat.watchdog(str(path), 0.5 / 60, lambda: kept.append(path.read_text())):
    for _ in range(8):  # heartbeats keep it alive, however long it runs
      time.sleep(0.1)
      heartbeat.heartbeat()
    assert not ended
    hang_here(ended)
  stacks = path.read_text()
  assert ended[0] == os.EX_TEMPFAIL and "no heartbeat for" in stacks and "in hang_here" in stacks
  assert kept and stacks.startswith(kept[0]) and "in hang_here" in kept[0]


def test_a_watchdog_waits_for_what_is_kept_but_not_for_ever(tmp_path, monkeypatch):
  ended = []
  monkeypatch.setattr(heartbeat, "_KEEP", 0.1)
  monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
  monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later", lambda *_, **__: None)
  with heartbeat.watchdog(str(tmp_path / "stacks.txt"), 0.2 / 60, threading.Event().wait):
    hang_here(ended)
  assert ended


def hang_here(ended):
  limit = time.monotonic() + 30
  while not ended and time.monotonic() < limit:
    time.sleep(0.05)


HOLDS_THE_LOCK = LOAD + '''
def hang_in_c():
  ctypes.PyDLL(None).sleep(int(sys.argv[1]))  # PyDLL keeps Python's global lock

with heartbeat.watchdog(os.devnull, minutes=0.4 / 60):
  time.sleep(0.2)
  if sys.argv[2] == "paused":
    with heartbeat.without_watchdog():
      hang_in_c()
  else:
    hang_in_c()
'''


def test_a_hang_that_holds_the_global_lock_ends_too():
  done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK, "60", "watched"], text=True,
                        capture_output=True, timeout=60)
  assert done.returncode == -signal.SIGALRM
  assert "Timeout" in done.stderr and "in hang_in_c" in done.stderr


def test_a_paused_watchdog_ends_nothing():
  done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK, "2", "paused"], text=True,
                        capture_output=True, timeout=60)
  assert (done.returncode, done.stderr) == (0, "")


def test_a_limit_beyond_the_systems_clock_is_watched_too(tmp_path, monkeypatch):
  armed = []
  monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later",
                      lambda seconds, **_: armed.append(seconds))
  monkeypatch.setattr(heartbeat.threading.Event, "wait", lambda self, seconds: bool(armed))
  heartbeat._watch(heartbeat.threading.Event(), str(tmp_path / "stacks.txt"), float("inf"))
  assert armed == [3e7]
