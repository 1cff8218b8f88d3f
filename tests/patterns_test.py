"""No text of a model or of a row makes a regular expression of ours take long."""

import pathlib
import re

import pytest

from ares_jax.data import chat
from ares_jax.grading.answer import same_answer
from ares_jax.grading.response import extract_boxed, well_formed
from tests import patterns

LIMIT = 0.05  # CPU seconds, for an answer of 256 characters
PACKAGE = pathlib.Path(chat.__file__).parents[1]
ROOMS = ("grading", "data", "evaluation", "sampling", "training")
# Values of the names inside functions that patterns are made of.
LOCAL = {"least": 3, "match": ("", "x"), "split": "train", "special": ["<|im_end|>", "<|x|>"],
         "word": "user"}


def modules():
  paths = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))
           if "\nimport re\n" in path.read_text(encoding="utf-8")]
  return [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]


def every_pattern():
  found = {}
  for name in modules():
    found |= patterns.of_module(name, **LOCAL)
  return found


def test_every_pattern_is_fast_on_what_its_loops_repeat():
  found = every_pattern()
  assert len(found) > 80
  slow = {name: took for name, pattern in found.items()
          if (took := patterns.longest(pattern, LIMIT))[0] > LIMIT}
  assert slow == {}


@pytest.mark.parametrize("pattern", [
  r"[A-J](?:\s*(?:,?\s*and|,|&)\s*[A-J])+",
  r"\(?[A-J]\)?(?:\s*(?:,?\s*and|,|&|\s)?\s*\(?[A-J]\)?)*",
  r"(?:[a-z]+,?)+;", r"(\w+\s?)+$", r"(x|xx)*y", r"(?:\{[^{}]*\}|[^z])*z",
])  # fmt: skip
def test_a_pattern_that_takes_exponential_time_is_found(pattern):
  took, text = patterns.longest(re.compile(pattern), LIMIT)
  assert took > LIMIT, text


def test_no_answer_of_repeated_pieces_takes_long():
  pieces = set().union(*(patterns.pieces(pattern) for pattern in every_pattern().values()))
  truths = ("7919", "B, C", "x^2+1", "5 cm", "(1, 2)", "Paris is big", ["B", "12 cm"], "3+2i")
  assert len(pieces) > 100
  for number, piece in enumerate(sorted(pieces)):
    for end in ("", "!"):
      text = piece * (255 // len(piece)) + end
      truth = truths[number % len(truths)]
      took = patterns.cpu_seconds(
        lambda text=text, truth=truth: same_answer(text, truth, symbolic=lambda *_: False), LIMIT)
      assert took <= LIMIT, (text, truth)


def test_a_response_of_repeated_pieces_is_read_in_linear_time():
  for piece in ("\\boxed{", "{", "\\", "<think>", "</think>", "<image", "<image 1", "<|im_end|>"):
    text = piece * (10**6 // len(piece))
    assert patterns.cpu_seconds(lambda text=text: (extract_boxed(text), well_formed(text)), 1) <= 1
    assert patterns.cpu_seconds(lambda text=text: chat.IMAGE_MARK.sub("", text), 1) <= 1
