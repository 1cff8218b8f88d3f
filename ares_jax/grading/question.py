"""Finds out whether an answer restates its question: "2^{10}" where 2^{10} is asked for."""

import collections
import re

from ares_jax.grading.notation import with_plain_characters

_TOKEN = re.compile(r"\\?[A-Za-z]+|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|[^\s${}()\[\]\\]")
_NO_MEANING = {"cdot", "times", "*", "left", "right", "displaystyle", "text", "mathrm", "quad"}
_NAMES = {"frac": "/", "dfrac": "/", "tfrac": "/", "div": "/", "÷": "/", "leq": "le", "geq": "ge",
          "ln": "log"}
_OPERATIONS = set(
  "/ ^ ! + - % : sqrt log sin cos tan cot sec csc exp binom arcsin arccos arctan sum prod int "
  "le ge < >".split())
_FUNCTIONS = set("log sin cos tan cot sec csc arcsin arccos arctan".split())
# Words by which a question asks for an operation.
_SPOKEN = {
  "root": "sqrt", "power": "^", "squared": "^", "cubed": "^", "divided": "/", "quotient": "/",
  "fraction": "/", "logarithm": "log", "sine": "sin", "cosine": "cos", "tangent": "tan",
  "factorial": "!",
}  # fmt: skip
_SCIENTIFIC = re.compile(r"[+-]?(?:[0-9.]+ ?(?:\\times|\\cdot|\*|x) ?)?10 ?\^.*")
_LONGEST = 20_000  # characters of a question that are read


def restates(answer, truths, question):
  """Whether a right answer restates the question and is no truth as written.

  It does where it stands in the question, in any order of its parts, or where it leaves to be
  computed what the question asks for: 32^2 for 2^{10}, sin(pi/3) for the sine of 60 degrees. Words
  alone never restate: a question may name its answer.

  Args:
    answer, truths: normalised texts; the answer says the same as one of the truths.
    question: as it was asked; "" where it is not known.
  """
  wanted = [_tokens(truth) for truth in truths]
  is_whole = any(len(each) == 1 and each[0].isdigit() for each in wanted)
  said = _tokens(answer.rpartition("=")[2] if is_whole else answer)  # 9 + 9 = 18 says 18
  if not question or any(_written_alike(said, each) for each in wanted):
    return False
  asked = _tokens(question[:_LONGEST])
  operations = _OPERATIONS & set(said)
  requested = set(asked) | {_SPOKEN.get(token) for token in asked}
  if operations and not _SCIENTIFIC.fullmatch(answer.rpartition("=")[2].strip()):
    if is_whole and operations <= requested:
      return True
    right = set().union(*wanted)
    if operations & _FUNCTIONS and requested & _FUNCTIONS and not right & _FUNCTIONS:
      return True
  if not any(token in _OPERATIONS or token[0].isdigit() for token in said):
    return False
  parts, count = sorted(said), len(said)
  return any(asked[start] in said and sorted(asked[start : start + count]) == parts
             for start in range(len(asked) - count + 1))


def _written_alike(said, wanted):
  """Whether tokens are the same, or the same numbers with or without a unit or a name."""
  if _OPERATIONS.isdisjoint(said) or said[:1] == wanted[:1] and said[:1] != ["-"]:
    said, wanted = _numbers(said), _numbers(wanted)
  return collections.Counter(said) == collections.Counter(wanted)


def _numbers(tokens):
  """The numbers among tokens, but for the powers of units: 60 of "60 cm^2"."""
  before = zip(["", "", *tokens], ["", *tokens], tokens, strict=False)
  return [token for word, sign, token in before
          if token[0].isdigit() and not (sign == "^" and len(word) > 1 and word.isalpha())]


def _tokens(text):
  """Numbers, words and signs of a text, without brackets and multiplication signs."""
  tokens = (token.removeprefix("\\") for token in _TOKEN.findall(with_plain_characters(text)))
  return [_number(_NAMES.get(token, token)) for token in tokens if token not in _NO_MEANING]


def _number(token):
  """ "1,000" and "8.0" as "1000" and "8"; other tokens as they are."""
  if not token[0].isdigit():
    return token
  token = token.replace(",", "")
  return token.rstrip("0").rstrip(".") if "." in token else token
