import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ares_jax.system import heartbeat

# The module alone, without jax: its process starts in a moment.
CHILD = f'''
import importlib.util, sys, time
path = {str(pathlib.Path(heartbeat.__file__))!r}
spec = importlib.util.spec_from_file_location("heartbeat", path)
heartbeat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heartbeat)
with heartbeat.stop_signals():
  print("ready", flush=True)
  try:
    for _ in range(600):
      time.sleep(0.1)
      if sys.argv[1] == "beating":
        heartbeat.heartbeat()
  except heartbeat.StopRequested:
    print("stopped whole", flush=True)
'''


def child(kind):
  process = subprocess.Popen([sys.executable, "-c", CHILD, kind], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", heartbeat.SIGNALS)
def test_a_signal_stops_at_the_next_beat(number):
  process = child("beating")
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (0, "stopped whole\n")
  assert "stopping at the next safe point" in err


def test_a_second_signal_of_either_kind_ends_at_once():
  process = child("deaf")
  process.send_signal(signal.SIGTERM)
  assert "stopping" in process.stderr.readline() + process.stderr.readline()
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130 and "ended at once" in err


def test_without_a_request_beats_pass_and_handlers_come_back():
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


def test_a_run_without_a_pulse_leaves_its_stacks_and_ends(tmp_path, monkeypatch):
  ended = []
  monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
  with heartbeat.watchdog(str(tmp_path / "stacks.txt"), minutes=0.5 / 60):
    for _ in range(8):  # beats keep it alive, however long it runs
      time.sleep(0.1)
      heartbeat.heartbeat()
    assert not ended
    hang_here(ended)
  stacks = (tmp_path / "stacks.txt").read_text()
  assert ended[0] == 1 and "no pulse for" in stacks and "in hang_here" in stacks


def hang_here(ended):
  limit = time.monotonic() + 30
  while not ended and time.monotonic() < limit:
    time.sleep(0.05)
