"""The documentation's examples run, and its picture is what its script draws."""

import doctest
import importlib.util
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from ares_jax import ops

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def picture():
  spec = importlib.util.spec_from_file_location("ops_picture", DOCS / "ops_picture.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_examples_run():
  with np.printoptions():  # The page sets its own, for itself.
    results = doctest.testfile(str(DOCS / "ops.md"), module_relative=False)
  assert results.attempted > 40 and results.failed == 0


def test_every_op_is_mentioned():
  text = (DOCS / "ops.md").read_text(encoding="utf-8")
  assert [name for name in ops.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_links_lead_somewhere():
  for page in DOCS.glob("*.md"):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
      assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_picture_flags_four_windows_and_the_seven_tokens_they_cover(picture):
  words, entropy_T = zip(*picture.SENTENCE, strict=True)
  mean_T, _, flag_T, cover_T, threshold = picture.analyse(entropy_T)
  assert [words[t] for t in np.flatnonzero(flag_T)] == [".", "Wait", ",", "maybe"]
  assert [words[t] for t in np.flatnonzero(cover_T)] == [
    ".", "Wait", ",", "maybe", "the", "blue", "one"]
  np.testing.assert_allclose(mean_T[words.index("Wait")], (2.2 + 0.7 + 1.9 + 0.8) / 4)
  assert mean_T[~flag_T].max() < threshold <= mean_T[flag_T].min()


def test_picture_is_what_the_script_draws(picture):
  drawn, kept = picture.draw(), Image.open(DOCS / "ops.png").convert("RGB")
  assert drawn.size == kept.size
  # Another version of the font renderer may smooth letters differently.
  difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(kept, np.int16)).max(-1)
  assert (difference > 32).mean() < 0.01
