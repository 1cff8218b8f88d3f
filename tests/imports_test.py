"""Imports point down the floors (the map: ares_jax/README.md), and never in a circle.

    python tests/imports_test.py        prints modules at the top, arrows and the longest chain
"""

import ast
import collections
import functools
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "ares_jax"

# A module imports from the floors below its room's, and from its own floor without circles.
FLOORS = (
  ("train", "evaluate", "generate", "export"),
  ("plan", "report", "diagnose", "inspect_data"),
  ("adacs", "aepo", "evaluation"),
  ("run",),
  ("sampling",),
  ("training",),
  ("data",),
  ("models", "grading"),
  ("ops", "system"),
)
FLOOR_OF = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALONE = ("ops", "system")  # they import nothing of ours but themselves
# Grading and loader workers import these rooms; jax there would start a second client of the TPU.
WITHOUT_JAX = ("data", "grading")
HEAVY = ("jax", "flax", "optax", "orbax", "clu", "torch", "tensorflow")
WITH_JAX = ("data/sharded.py",)  # runs in the trainer's own process


def files():
  return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def import_errors(room, source, *, jax_allowed=False):
  """Messages about forbidden imports in `source`, a module of `room`."""
  found = []
  for name in imported(source):
    parts = name.split(".")
    if parts[0] == "ares_jax":
      other = parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else None
      if other is None:
        found.append(f"{name}: import from the module that defines it")
      elif other != room and (room in ALONE or FLOOR_OF[other] > FLOOR_OF[room]):
        found.append(f"{room} imports {other}, which is not below it")
      elif other == "ops" and room in WITHOUT_JAX and not jax_allowed:
        found.append(f"{room} imports ops, and with it jax")
    elif parts[0] in HEAVY and room in WITHOUT_JAX and not jax_allowed:
      found.append(f"{room} imports {parts[0]}")
    elif parts[0] in ("tests", "configs"):
      found.append(f"{room} imports {parts[0]}")
  return found


def modules():
  """{dotted name of a module: set of the modules of ours that it imports}."""
  names = {".".join(("ares_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
                    ).removesuffix(".__init__"): path for path in files()}
  arrows = {}
  for name, path in names.items():
    found = set()
    for other in imported(path.read_text(encoding="utf-8")):
      if other in names:
        found.add(other)
      elif other.rpartition(".")[0] in names:
        found.add(other.rpartition(".")[0])
    arrows[name] = found - {name}
  return arrows


def longest_chain(arrows):
  """Modules on the longest way down; ValueError where imports circle."""
  on_the_way = []

  @functools.cache
  def chain(name):
    if name in on_the_way:
      raise ValueError(" > ".join([*on_the_way[on_the_way.index(name):], name]))
    on_the_way.append(name)
    below = max((chain(other) for other in sorted(arrows[name])), key=len, default=())
    on_the_way.pop()
    return (name, *below)

  return max((chain(name) for name in sorted(arrows)), key=len)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
  room = room_of(path)
  assert room in FLOOR_OF, f"{room} has no floor: give it one here and on the map"
  inside = path.relative_to(PACKAGE).as_posix()
  assert import_errors(room, path.read_text(encoding="utf-8"), jax_allowed=inside in WITH_JAX) == []


def test_imports_do_not_circle():
  assert len(longest_chain(modules())) > 3


def test_a_circle_is_seen():
  with pytest.raises(ValueError, match="a > b > a"):
    longest_chain({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize(
  "room, source, count",
  [
    ("sampling", "from ares_jax.training.batch import pack", 0),
    ("training", "from ares_jax.sampling import rollout", 1),
    ("adacs", "from ares_jax import aepo, mesh", 1),
    ("models", "from ares_jax.models import layers", 0),
    ("models", "from ares_jax.data import chat", 1),
    ("ops", "from ares_jax.ops.grpo import policy_loss", 0),
    ("ops", "def f():\n  from ares_jax.system import mesh", 1),
    ("system", "from ares_jax import ops", 1),
    ("system", "import ares_jax.ops", 1),
    ("data", "import jax.numpy as jnp", 1),
    ("grading", "from ares_jax import ops", 1),
    ("data", "from ares_jax.system import config", 0),
    ("train", "from ares_jax import window_entropy", 1),
    ("train", "from tests import tiny", 1),
  ],
)
def test_the_check_sees_a_wrong_arrow(room, source, count):
  assert len(import_errors(room, source)) == count


if __name__ == "__main__":
  ARROWS = modules()
  ROOMS = {(a.split(".")[1], b.split(".")[1]) for a, found in ARROWS.items() for b in found
           if a.split(".")[1] != b.split(".")[1]}
  TOP = collections.Counter(path.parent == PACKAGE for path in files())
  CHAIN = longest_chain(ARROWS)
  print(f"{TOP[True]} modules at the top, {TOP[False]} in rooms; "
        f"{sum(map(len, ARROWS.values()))} import arrows between modules, {len(ROOMS)} between "
        f"rooms; the longest chain has {len(CHAIN)} modules: {' > '.join(CHAIN)}")
