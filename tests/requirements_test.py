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


def test_the_tested_set_lies_within_the_bounds_and_has_hashes():
  text = LOCK.read_text()
  pins = dict(re.findall(r"^([\w.\[\]-]+)==(\S+)", text, re.M))
  for requirement in requirements("requirements.txt"):
    version = pins[requirement.name.lower().replace("_", "-")]
    assert requirement.specifier.contains(version), (requirement, version)
  for block in re.split(r"^(?=[\w.-]+(?:\[\w+\])?==)", text, flags=re.M)[1:]:
    assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
  assert "://" not in text and "--index-url" not in text
