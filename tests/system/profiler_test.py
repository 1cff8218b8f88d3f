import json
import os
import subprocess
import sys

import pytest

from ares_jax.system import profiler


@pytest.mark.parametrize("text, message", [
  ("3", "--profile=3 is not START:STOP"), ("a:b", "is not START:STOP"), ("-1:2", "is not START"),
  ("2:2", "0 <= START < STOP <= 9, the steps of aepo"), ("3:10", "STOP <= 9")])
def test_what_is_no_range_of_the_stage_is_refused(text, message):
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


def test_the_steps_that_were_asked_for_are_traced_with_their_phases(traced):
  folder, found = traced
  assert found["another stage"] == [False] * 5
  assert found["whole"] == [False, True, True, False, False]
  [trace] = (folder / "whole").rglob("*.xplane.pb")
  names = trace.read_bytes()
  assert b"rollout" in names and b"step" in names and b"save" in names


def test_what_comes_after_the_stage_is_not_traced(traced):
  assert traced[1]["last step"] == [False, True, False]


def test_a_run_that_ends_inside_the_range_leaves_no_trace_running(traced):
  assert traced[1]["before the end"] and not traced[1]["ended inside"]
