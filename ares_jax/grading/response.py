"""Reads a response: its boxed answer, its format, whether it shows work."""

import re

from ares_jax.grading import sandbox

_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)


def extract_boxed(text):
  """The content of the last balanced `\\boxed{...}` of the answer, or None.

  The answer is the text after the last `</think>`. A text with neither `<think>` nor `</think>` is
  all answer; one whose `<think>` never ends has no answer.
  """
  _, closed, answer = text.rpartition("</think>")
  if not closed and "<think>" in text:
    return None
  answer = answer[-sandbox.SEARCHED:]
  found = None
  opened = []  # where the content of each open brace starts; -1: it is not a box's
  for match in _BRACE.finditer(answer):
    if match[1]:
      opened.append(match.end())
    elif match[2] == "{":
      opened.append(-1)
    elif match[2] == "}" and opened:
      start = opened.pop()
      if start >= 0:
        found = answer[start : match.start()].strip()
  return found


def well_formed(text):
  """Whether the response is `<think> ... </think>` and then a `\\boxed{...}` (release's format)."""
  has_thinking = text.lstrip().startswith("<think>") and "</think>" in text
  return has_thinking and extract_boxed(text) is not None


def shows_work(text):
  """Whether there is any text between `<think>` and `</think>`."""
  _, opened, rest = text.partition("<think>")
  return bool(opened) and bool(rest.partition("</think>")[0].strip())
