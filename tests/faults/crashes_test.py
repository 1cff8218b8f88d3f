"""A run that is killed anywhere and resumed ends like an uninterrupted one."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parent / "crashes.py"


def test_a_run_killed_in_every_phase_and_at_random_ends_as_if_left_alone(tmp_path):
  # In a process without a device, because it forks.
  done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, tmp_path, "0", "10"],
                        capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-2000:]
  report = json.loads(done.stdout.splitlines()[-1])
  assert all(report["phases"].values()), f"a phase was not reached: {report['phases']}"
  assert report["random"] == 10
  assert report["equal"] and report["lines"] == 80
  # The interval that is being written, and the one before it: save_every is 2.
  assert max(report["redone"]) <= 4, report["redone"]
