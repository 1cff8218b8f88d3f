"""tests/bench/gpu.py where parts of it fail."""

import argparse
import json

import numpy as np
import pytest

from tests.bench import gpu

# Stands for the script: a part that works, one that crashes, one that hangs.
FAKE = """
import os, sys, time
part = next(word for word in sys.argv if word.startswith("--part=")).partition("=")[2]
if part == "ops":
  print("compiling ...")
  print('{"token_entropy, relative difference": 1e-7}')
elif part == "kernels":
  print("no Triton here", file=sys.stderr)
  os.abort()
else:
  time.sleep(60)
"""


@pytest.fixture
def run_part(tmp_path, monkeypatch):
  (tmp_path / "fake.py").write_text(FAKE)
  monkeypatch.setattr(gpu, "__file__", str(tmp_path / "fake.py"))
  return lambda name, seconds: gpu.run_part(name, argparse.Namespace(size="tiny"), seconds)[0]


def test_a_part_that_crashes_or_hangs_loses_only_itself(run_part):
  assert run_part("ops", 30) == {"token_entropy, relative difference": 1e-7}
  assert run_part("kernels", 30) == {"failed": "exit code -6: no Triton here\n"}
  assert run_part("rollout", 0.5) == {"failed": "not finished after 0 s"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pages", "model", "rollout", "update"])
def test_a_part_runs_in_small(name):
  numbers = gpu.PARTS[name].call(gpu.SIZES["tiny"])
  assert numbers and all(np.isfinite(number) for number in numbers.values())


def test_results_are_written_with_rates_as_shares_of_what_the_device_reached(tmp_path):
  results = {"device": {"device": "NVIDIA H200", "TFLOP/s, bfloat16 products": 800.0},
             "ops": {"token_entropy, relative difference": float("nan"),
                     "attention, bfloat16, relative difference": 0.01},
             "rollout": {"TFLOP/s of decoding": 40.0, "s of a rollout": 2.5},
             "update": {"failed": "exit code 1: a traceback\nout of memory"}}
  gpu.write(results, tmp_path / "out")
  assert json.loads((tmp_path / "out/gpu.json").read_text())["rollout"] == results["rollout"]
  assert (tmp_path / "out/gpu.md").read_text().splitlines()[2:] == [
    "| device | device | NVIDIA H200 |  |", "| device | TFLOP/s, bfloat16 products | 800 |  |",
    "| ops | token_entropy, relative difference | nan | LARGE, above 0.005 |",
    "| ops | attention, bfloat16, relative difference | 0.01 |  |",
    "| rollout | TFLOP/s of decoding | 40 | 5.0% |", "| rollout | s of a rollout | 2.5 |  |",
    "| update | failed | out of memory |  |"]
