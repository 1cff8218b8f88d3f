"""What a response says: its boxed answer, its format, whether it shows work."""

import re

from ares_jax.grading import sandbox

_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)


def extract_boxed(text):
  """What stands in the last balanced `\\boxed{...}` of the answer, or None.

  The answer is what follows the last `</think>`; a text with neither `<think>` nor `</think>` is
  all answer, one whose `<think>` never ends has none.
  """
  _, closed, answer = text.rpartition("</think>")
  if not closed and "<think>" in text:
    return None
  answer = answer[-sandbox.LOOKED_AT:]
  found, opened = None, []  # opened: where each open brace's content starts; -1 = no box
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
  return text.lstrip().startswith("<think>") and "</think>" in text and (
    extract_boxed(text) is not None
  )  # fmt: skip


def shows_work(text):
  """Whether there is any working between `<think>` and `</think>`."""
  _, opened, rest = text.partition("<think>")
  return bool(opened) and bool(rest.partition("</think>")[0].strip())
