"""The bounds of requirements.txt, and the tested set that is locked with hashes."""

import pathlib
import re

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
LOCK = ROOT / "launch" / "requirements-lock.txt"


def requirements(name):
  lines = (ROOT / name).read_text().splitlines()
  return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_every_requirement_has_a_lowest_and_a_highest_version(name):
  for requirement in requirements(name):
    operators = {part.operator for part in requirement.specifier}
    assert operators in ({">=", "<"}, {"=="}), requirement


@pytest.mark.parametrize("python, jax", [("3.11", "0.10.2"), ("3.12", "0.12.0.1"),
                                         ("3.13", "0.12.0.1")])
def test_the_tested_set_of_each_python_lies_within_the_bounds(python, jax):
  here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
  pins = {}
  for line in LOCK.read_text().splitlines():
    locked = Requirement(line.removesuffix("\\")) if re.match(r"[\w.-]+==", line) else None
    if locked and (locked.marker is None or locked.marker.evaluate(here)):
      (pin,) = locked.specifier
      assert pins.setdefault(locked.name, pin.version) == pin.version
  assert pins["jax"] == pins["jaxlib"] == jax
  for requirement in requirements("requirements.txt"):
    version = pins[requirement.name.lower().replace("_", "-")]
    assert requirement.specifier.contains(version), (requirement, version)


def test_every_locked_file_has_a_hash_and_no_address():
  text = LOCK.read_text()
  for block in re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]:
    assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
  assert "://" not in text and "--index-url" not in text
