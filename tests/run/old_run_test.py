"""A run made at commit a7a1f17, before the modules moved, goes on as if nothing had happened.

run.tar.xz is its folder after 2 of 4 iterations of AEPO, on one CPU device; expected.json is what
export, evaluate, report and two more iterations gave at that commit.
"""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent / "old_run"
EXPECTED = json.loads((HERE / "expected.json").read_text())
CONFIG = f"--config={HERE / 'config.py'}"
ROOT = HERE.parents[2]


def cpu():
  """Name, family, model and AVX-512 of the first processor, as Linux tells them."""
  first = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
  told = {key.strip(): value.strip() for key, _, value in
          (line.partition(":") for line in first.splitlines())}
  return [told.get("model name"), told.get("cpu family"), told.get("model"),
          "avx512f" in told.get("flags", "").split()]


# Sums round otherwise on another CPU type or under another jax; there numbers agree closely.
SAME_MACHINE = EXPECTED["made"] == {"commit": "a7a1f17", "jax": jax.__version__, "cpu": cpu()}


def command(name, *words):
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  process = subprocess.run([sys.executable, "-m", f"ares_jax.{name}", *words], cwd=ROOT, text=True,
                           capture_output=True, timeout=600, env=environment)
  assert process.returncode == 0, process.stderr
  return process.stdout


def digest(folder):
  tensors = load_file(folder / "model.safetensors")
  found = {name: hashlib.sha256(tensors[name].tobytes()).hexdigest()[:16]
           for name in sorted(tensors)}
  return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def untimed(line):
  return {name: value for name, value in line.items()
          if not name.startswith(("seconds", "device", "speed", "memory"))}


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def check(found, expected):
  """Equal numbers under every key of `expected`; new keys may have come."""
  if isinstance(expected, dict):
    for key, value in expected.items():
      check(found[key], value)
  elif isinstance(expected, list):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
      check(one, other)
  elif isinstance(expected, float) and not SAME_MACHINE:
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
  else:
    assert found == expected


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("old")
  with tarfile.open(HERE / "run.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder / "run"


def test_an_old_run_is_exported(workdir, tmp_path):
  for stage in ("aepo", "adacs"):
    command("export", f"--workdir={workdir}", f"--out={tmp_path / stage}", f"--stage={stage}")
    assert digest(tmp_path / stage) == EXPECTED["export"][stage]


def test_an_old_run_is_evaluated(workdir, tmp_path):
  found = json.loads(command("evaluate", CONFIG, f"--workdir={workdir}", f"--out={tmp_path / 'e'}",
                             "--json"))
  check(found, EXPECTED["evaluate"])


def test_an_old_run_is_reported(workdir, tmp_path):
  command("report", f"--workdir={workdir}", f"--out={tmp_path / 'report.html'}")
  page = (tmp_path / "report.html").read_text()
  data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
  [run] = data["runs"]
  check(data | {"stages": run["stages"], "results": run["results"],
                "responses": len(data["responses"])}, EXPECTED["report"])


def test_an_old_run_is_resumed(workdir, tmp_path):
  command("train", CONFIG, f"--workdir={workdir}")
  check([untimed(line) for line in lines(workdir / "metrics.jsonl")][-2:], EXPECTED["metrics"])
  check(lines(workdir / "rollouts.jsonl")[-4:], EXPECTED["rollouts"])
  check(json.loads((workdir / "results.json").read_text()), EXPECTED["results"])
  command("export", f"--workdir={workdir}", f"--out={tmp_path / 'resumed'}")
  if SAME_MACHINE:
    assert digest(tmp_path / "resumed") == EXPECTED["export"]["resumed"]
