import json
import os
import subprocess
import sys

import pytest

from ares_jax.system import profiler


@pytest.mark.parametrize("text, message", [
  ("3", "--profile=3 is not START:STOP"), ("a:b", "is not START:STOP"), ("-1:2", "is not START"),
  ("2:2", "0 <= START < STOP <= 9, the steps of aepo"), ("3:10", "STOP <= 9")])
def test_text_that_is_no_range_of_the_stage_is_refused(text, message):
  with pytest.raises(ValueError, match=message) as error:
    profiler.parse_steps(text, "aepo", 9)
  assert "\n" not in str(error.value)


def test_a_range_is_two_numbers():
  assert profiler.parse_steps("0:9", "aepo", 9) == (0, 9)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
  """(folder, what tests/system/tracing.py found)."""
  folder = tmp_path_factory.mktemp("traced")
  script = os.path.join(os.path.dirname(__file__), "tracing.py")
  done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_requested_steps_are_traced_with_their_phases(traced):
  folder, found = traced
  assert found["another stage"] == [False] * 5
  assert found["complete"] == [False, True, True, False, False]
  [trace] = (folder / "complete").rglob("*.xplane.pb")
  names = trace.read_bytes()
  assert b"rollout" in names and b"step" in names and b"save" in names


def test_work_after_the_stage_is_not_traced(traced):
  assert traced[1]["last step"] == [False, True, False]


def test_a_run_that_ends_inside_the_range_leaves_no_trace_running(traced):
  assert traced[1]["before the end"] and not traced[1]["ended inside"]


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_phases_add_up_until_they_are_taken():
  clock = Clock()
  timer = profiler.PhaseTimer(clock)
  for seconds in (1.0, 2.0):
    with timer("rollout"):
      clock.now += seconds
  with timer("grading"):
    clock.now += 0.5
  assert timer.take() == {"seconds/rollout": 3.0, "seconds/grading": 0.5}
  with timer("rollout"):
    clock.now += 4.0
  assert timer.take() == {"seconds/rollout": 4.0}


def test_devices_are_idle_outside_the_device_phase():
  clock = Clock()
  timer = profiler.PhaseTimer(clock)
  with timer("step"):
    clock.now += 1.0
    for seconds in (2.0, 1.0):
      with timer("rollout"), timer("device"):
        clock.now += seconds
  assert timer.take()["device/idle"] == 0.25
  with timer("step"):
    clock.now += 1.0
  assert "device/idle" not in timer.take()  # nothing was measured
