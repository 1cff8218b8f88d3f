"""Brings an answer and its truth to one form: tuples, intervals, numbers, values without names."""

import math
import re

from ares_jax.grading import quantity, words
from ares_jax.grading.collection import parse_inequality, split_items

# A label in words: "Surface area = 9 cm^2", "domain: [0, 1]".
_WORDS = r"(?:[A-Za-z.]{3,}|[A-Z]\.(?:[A-Z]\.)+)(?: [A-Za-z.]+)*"
_NO_LABEL = re.compile(r"\b(?:not|no|nor|never|except|unless|if|when|or|and)\b", re.IGNORECASE)
# x, x_1, \theta, f(x), segments and angles (AB, m\angle ABC), sums asked for (m + n), labels.
_NAMED = re.compile(
  r"([A-Za-z](?:_\{?\w\}?)?|\\(?!no?t|ne)[a-z]+|\([a-z](?:, ?[a-z])+\)|[A-Za-z]\([a-z]\)"
  r"|(?:m ?)?\\angle ?[A-Z0-9]{1,3}"
  r"|[A-Z]{2,3}|\\overline ?\{[A-Z]{2}\}|[a-z](?: ?[+-] ?[a-z])+"
  rf"|{_WORDS}) ?(?:=|\\in\b) ?(.+)"
)
_TITLED = re.compile(rf"({_WORDS}): (.+)")
_INTERVAL = re.compile(r"(?:[A-Za-z] ?\\in ?)?[(\[].*,.*[)\]]")


def to_common_form(answer, truth, *, is_complete):
  """Two normalised texts, rewritten as far as they differ in form alone.

  Less is changed of items of collections, which are not `is_complete`.
  """
  if is_complete:
    answer = _as_tuple(answer, truth)
    answer, truth = _as_intervals(answer, truth)
  answer, truth = words.spell_numbers(answer), words.spell_numbers(truth)
  if re.fullmatch(r"[0-9]{1,2}!", truth):  # in a truth alone: "6!" for 720 restates the question
    truth = str(math.factorial(int(truth[:-1])))
  said, wanted = _without_indices(answer), _without_indices(truth)
  if is_complete and (said is None) != (wanted is None):  # only one side has indices
    answer, truth = said or answer, wanted or truth
  return _without_name(answer, truth, is_complete)


def _as_tuple(answer, truth):
  """Answer "y = -1, x = 2" to a tuple, in the order of the truth's names or of x, y, z.

  A truth without names that may be an interval, (1, 2), is left alone.
  """
  wanted = re.fullmatch(r"(?:\(([a-z](?:, ?[a-z])+)\) ?= ?)?\((.+,.+)\)", truth)
  if wanted is None or answer.count("=") < 2:
    return answer
  ends = [quantity.parse_quantity(item) for item in split_items(wanted[2], (",",))]
  if not wanted[1] and len(ends) == 2 and (None in ends or ends[0].number < ends[1].number):
    return answer
  parts = [part.partition("=") for part in split_items(answer, (",", ";", " and "))]
  said = {name.strip(): value.strip() for name, _, value in parts}
  names = re.findall("[a-z]", wanted[1] or "xyz")[: len(parts)]
  if len(said) < len(parts) or said.keys() != set(names):
    return answer
  return f"({', '.join(said[name] for name in names)})"


def _as_intervals(answer, truth):
  """Inequalities as intervals, where both are, or one is and the other an interval already."""
  said, wanted = parse_inequality(answer), parse_inequality(truth)
  if said and wanted:
    return (said[1], wanted[1]) if said[0] == wanted[0] else (answer, truth)
  if said and _INTERVAL.fullmatch(truth):
    return said[1], truth
  if wanted and _INTERVAL.fullmatch(answer):
    return answer, wanted[1]
  return answer, truth


def _without_indices(text):
  """ "x_1 = 2, x_2 = 5" -> "x = 2, x = 5"; None where these are not the values of one unknown."""
  found = re.findall(r"([xyzt])_\{?([1-9])\}? ?=", text)
  if len(found) < 2 or found != [(found[0][0], str(i + 1)) for i in range(text.count("="))]:
    return None
  return re.sub(r"_\{?[1-9]\}?(?= ?=)", "", text)


def _without_name(answer, truth, is_complete):
  """Drops "x =" where both sides have the same name, or only one has one and neither is a list."""
  said, wanted = _named(answer), _named(truth)
  if not said and not wanted:  # "Answer: answer: 5" is not 5, so both must have a title
    said, wanted = _TITLED.fullmatch(answer), _TITLED.fullmatch(truth)
    is_complete = False
  if said and wanted:
    same = _same_name(said[1], wanted[1], is_complete)
    return (_values(said), _values(wanted)) if same else (answer, truth)
  if not is_complete or not (said or wanted):
    return answer, truth
  if re.search(r"=|<|>|\\le\b|\\ge\b", truth if said else answer):
    return answer, truth
  return (_values(said), truth) if said else (answer, _values(wanted))


def _same_name(said, wanted, is_complete):
  """Whether two names are one: "area" and "Surface area", "A" and "Area", but not "x" and "y"."""
  if said == wanted:
    return True
  in_words = [bool(re.fullmatch(_WORDS, name)) for name in (said, wanted)]
  if all(in_words):
    short, long = sorted((said.casefold(), wanted.casefold()), key=len)
    return short in long
  return is_complete and any(in_words)


def _named(text):
  """Match of "x = ..." where x is the only name in `text`; else None."""
  names = set(re.findall(r"([^\s,;=]+) ?=", text))
  match = _NAMED.fullmatch(text) if len(names) <= 1 else None
  return None if match is None or _NO_LABEL.search(match[1]) else match


def _values(match):
  """ "x = 1 or x = 2" -> "1 or 2"."""
  return re.sub(rf"(?<![A-Za-z\\]){re.escape(match[1])} ?= ?", "", match[2])
