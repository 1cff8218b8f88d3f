"""WORKDIR/starts.jsonl: when a run was started, by which command, from which code, on what machine.

Sums round differently on another CPU type or kind of device, so that runs are equal only on one.
"""

import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import jax

from ares_jax.data.curation.pass_rates import drop_torn_line
from ares_jax.run.records import Lines

_FILE = "starts.jsonl"
_TYPES = {"time": str, "command": list, "jax": str, "device": str, "devices": int, "cpu": str}
_ROOT = pathlib.Path(__file__).parents[2]


def note_start(workdir):
  """Appends a line about this process to starts.jsonl of the folder."""
  line = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": sys.argv,
          "version": sys.modules["ares_jax"].__version__, "commit": commit(),
          "jax": jax.__version__, "device": jax.devices()[0].device_kind,
          "devices": jax.device_count(), "processes": jax.process_count(), "cpu": cpu_type()}
  path = os.path.join(workdir, _FILE)
  drop_torn_line(path)  # of a start that was killed, or whose disk was full
  with open(path, "a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")


def read_starts(workdir):
  """The lines of starts.jsonl, oldest first; [] for a run of a version that wrote none.

  ValueError where a line is damaged.
  """
  return list(Lines(os.path.join(workdir, _FILE), _TYPES))


def commit(root=_ROOT):
  """The git commit of the code, "-dirty" behind it where files differ; "" where it is unknown.

  A copy without git has it in a file COMMIT.
  """
  if (root / ".git").exists() and shutil.which("git"):
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12",
               "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()
  file = root / "COMMIT"
  return file.read_text("utf-8").strip() if file.exists() else ""


def cpu_type(path="/proc/cpuinfo"):
  """The name of the CPU and whether it has AVX-512, which decides how sums round."""
  if not os.path.exists(path):
    return platform.processor() or platform.machine()
  first = pathlib.Path(path).read_text("utf-8", "replace").partition("\n\n")[0]
  told = {key.strip(): value.strip() for key, _, value in
          (line.partition(":") for line in first.splitlines())}
  wide = "with" if "avx512f" in told.get("flags", "").split() else "without"
  return f"{told.get('model name', platform.machine())} {wide} AVX-512"
