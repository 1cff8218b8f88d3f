"""Imports point down only (the map: ares_jax/README.md)."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "ares_jax"

# A module may import from rows below its own; inside a folder sideways too.
ROWS = (
  ("train", "evaluate", "generate", "export", "report", "diagnose"),
  ("check",),
  ("plan",),
  ("saved",),
  ("setup", "ablation", "ablation_figure", "fingerprint", "run_records", "programs", "replay"),
  ("adacs", "aepo", "fine_tuning"),
  ("measure", "predictions", "rollout", "policy_gradient", "loop", "run_data", "responses",
   "tracking"),
  ("sampler", "rows", "run_folder", "shares"),
  ("slots", "shaping", "checkpoint", "optimizer", "metrics"),
  ("checkpoint_files",),
  ("manifest", "joining"),
  ("models", "data", "branching"),
  ("ops", "mesh", "command", "digest", "presets", "hosts", "speed", "drawing", "hlo_cost"),
  ("config", "pulse", "chips", "hlo_text", "jaxpr_cost", "profiler", "model_flops",
   "whole_file"),
)
ROW_OF = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}
# Commands that are found in a room stand where the other commands do.
COMMANDS = ("data/inspect.py",)
ROOMS = ("models", "data", "ops", "report", "diagnose")
# Loader and grading workers run data/; jax there would start a second client of the TPU.
NOT_IN_DATA = ("jax", "flax", "optax", "orbax", "clu", "torch", "tensorflow")


def files():
  return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path):
  inside = path.relative_to(PACKAGE)
  return "train" if inside.as_posix() in COMMANDS else inside.parts[0].removesuffix(".py")


def imported(source):
  """Dotted names of all imports, in functions too; `from a import b` gives a.b."""
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def faults(room, source):
  """What the imports of `source`, a module of `room`, do that they must not."""
  found = []
  for name in imported(source):
    parts = name.split(".")
    if parts[0] == "ares_jax":
      other = parts[1] if len(parts) > 1 and parts[1] in ROW_OF else None
      sideways = other == room and room in ROOMS
      if other is None:
        found.append(f"{name}: import from the module that defines it")
      elif room == "data" and other in ("ops", "mesh"):
        found.append(f"data imports {other}, and with it jax")
      elif not sideways and ROW_OF[other] >= ROW_OF[room]:
        found.append(f"{room} imports {other}, which is not below it")
    elif room == "data" and parts[0] in NOT_IN_DATA:
      found.append(f"data imports {parts[0]}")
    elif parts[0] in ("tests", "configs"):
      found.append(f"{room} imports {parts[0]}")
  return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
  room = room_of(path)
  assert room in ROW_OF, f"{room} has no row: give it one here and on the map"
  assert faults(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
  "room, source, count",
  [
    ("rollout", "from ares_jax.sampler import sample", 0),
    ("sampler", "from ares_jax.rollout import collect", 1),
    ("adacs", "from ares_jax import aepo, mesh", 1),
    ("models", "from ares_jax.models import layers", 0),
    ("models", "from ares_jax.data import chat", 1),
    ("ops", "from ares_jax.ops.grpo import policy_loss", 0),
    ("ops", "def f():\n  from ares_jax import mesh", 1),
    ("mesh", "from ares_jax import ops", 1),
    ("config", "import ares_jax.ops", 1),
    ("data", "import jax.numpy as jnp", 1),
    ("data", "from ares_jax import ops", 1),
    ("data", "from ares_jax import config", 0),
    ("train", "from ares_jax import window_entropy", 1),
    ("train", "from tests import tiny", 1),
  ],
)
def test_the_check_sees_a_wrong_arrow(room, source, count):
  assert len(faults(room, source)) == count
