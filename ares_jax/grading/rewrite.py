"""Brings an answer and its truth to one form: intervals, numbers, ratios, values without names."""

import re

from ares_jax.grading import words
from ares_jax.grading.collection import parse_inequality, split_items

# A label in words: "Surface area = 9 cm^2", "domain: [0, 1]".
_WORDS = r"(?:[A-Za-z.]{3,}|[A-Z]\.(?:[A-Z]\.)+)(?: [A-Za-z.]+)*"
_NO_LABEL = re.compile(
  r"\b(?:not|no|nor|never|except|unless|if|when|or|and|half|twice|minus)\b", re.IGNORECASE)
# x, x_1, I_{\max}, \theta', AB, \overline{AB}, m\angle ABC, \Delta p
_SYMBOL = (r"(?:(?:m ?)?\\angle ?|\\(?:Delta|triangle) ?)?"
           r"(?:\\overline ?\{[A-Z]{2}\}|[A-Z]{2,4}|[A-Za-z]|(?<=angle )[0-9]"
           r"|\\(?!no?t|ne|frac|sqrt|pm|mp|log|ln|sin|cos|tan)[A-Za-z]+)"
           r"(?: ?_ ?(?:\{[^{}]*\}|\\?\w+))?'*")
# The same, f(x, y), f(2), P(A), |AB|, V_1:V_2, \frac{AB}{CD}, (x, y), labels.
_NAMED = re.compile(
  rf"({_SYMBOL}(?: ?\((?:[A-Za-z]|-?[0-9]+)(?:, ?[a-z])*\))?|\| ?{_SYMBOL} ?\|"
  rf"|{_SYMBOL} ?: ?{_SYMBOL}|\\frac ?\{{{_SYMBOL}\}} ?\{{{_SYMBOL}\}}|\([a-z](?:, ?[a-z])+\)"
  rf"|{_WORDS}) ?(?:=|\\in\b|\\approx(?![a-z])) ?(.+)"
)
# x_1 = 1, x_2 = 2: the roots of an equation.
_ROOTS = re.compile(r"([A-Za-z])_\{?1\}? ?= ?([^=]+?) ?(?:,|;| or| and) ?\1_\{?2\}? ?= ?([^=]+)")
_SUM = re.compile(r"([a-z](?: ?[+-] ?[a-z])+) ?= ?(.+)")  # m + n, asked for as one number
_RATIO = re.compile(r"([0-9.]+|[0-9]*\\sqrt\{[0-9]+\}) ?(?::|to) ?([0-9.]+|[0-9]*\\sqrt\{[0-9]+\})")
_TITLED = re.compile(rf"({_WORDS}): (.+)")
_INTERVAL = re.compile(r"(?:[A-Za-z] ?\\in ?)?[(\[].*,.*[)\]]")


def to_common_form(answer, truth, *, is_complete):
  """Two normalised texts, rewritten as far as they differ in form alone.

  Less is changed of items of collections, which are not `is_complete`.
  """
  if is_complete:
    answer, truth = _as_intervals(answer, truth)
  answer, truth = words.spell_numbers(answer), words.spell_numbers(truth)
  answer, truth = _without_name(answer, truth, is_complete)
  said, wanted = _RATIO.fullmatch(answer), _RATIO.fullmatch(truth)
  if said and re.fullmatch("[0-9]+", truth):  # 3:1 for 3; 1:2 may be odds, which are not 1/2
    return f"\\frac{{{said[1]}}}{{{said[2]}}}", truth
  if wanted and re.search(r"/|\\frac", answer):
    return answer, f"\\frac{{{wanted[1]}}}{{{wanted[2]}}}"
  return (answer.replace(" to ", ":"), truth.replace(" to ", ":")) if wanted else (answer, truth)


def _as_intervals(answer, truth):
  """Inequalities as intervals, where both are, or one is and the other an interval already."""
  said, wanted = parse_inequality(answer), parse_inequality(truth)
  if said and wanted and said[0] != wanted[0]:
    return answer, truth
  return (said[1] if said and (wanted or _INTERVAL.fullmatch(truth)) else answer,
          wanted[1] if wanted and (said or _INTERVAL.fullmatch(answer)) else truth)


def _without_name(answer, truth, is_complete):
  """Drops "x =" where both sides have the same name, or only one has one and neither is a list."""
  said, wanted = _named(answer), _named(truth)
  if not said and not wanted:
    if is_complete and (values := _without_names(answer, truth)):
      return values
    titles = _TITLED.fullmatch(answer), _TITLED.fullmatch(truth)
    # "Answer: answer: 5" is not 5, so both must have a title. x + y = 5 may be a line as a truth.
    said, wanted = titles if all(titles) else (_SUM.fullmatch(answer), None)
  if said and wanted:
    same = _same_name(said[1], wanted[1])
    return (_product(_values(said)), _product(_values(wanted))) if same else (answer, truth)
  if not is_complete or not (said or wanted):
    return answer, truth
  if re.search(r"=|<|>|\\le\b|\\ge\b", truth if said else answer):
    return answer, truth
  return (_values(said), truth) if said else (answer, _values(wanted))


def _without_names(answer, truth):
  """The values of roots, "x_1 = 1, x_2 = 2", or of "AB = 4, CD = 5"; None where none are named."""
  if "=" not in truth and (roots := _ROOTS.fullmatch(answer)):
    return f"{roots[2]}, {roots[3]}", truth
  named = [_NAMED.fullmatch(item) for item in split_items(truth, (",", ";", " and "))]
  if len(named) > 1 and all(named) and not re.search("[=(]", answer):
    return f"({answer})", f"({', '.join(match[2] for match in named)})"
  return None


def _same_name(said, wanted):
  """Whether two names are one: "area" and "Surface area", "A" and "Area", but not "x" and "y"."""
  if said == wanted or _NO_LABEL.search(said):
    return said == wanted
  in_words = [bool(re.fullmatch(_WORDS, name)) for name in (said, wanted)]
  if all(in_words):
    short, long = sorted((said.casefold(), wanted.casefold()), key=len)
    return short in long
  return any(in_words)


def _named(text):
  """Match of "x = ..." where x is the only name in `text`; else None."""
  names = set(re.findall(r"([^\s,;=]+) ?=", text))
  match = _NAMED.fullmatch(text) if len(names) <= 1 else None
  is_label = match and re.fullmatch(_WORDS, match[1])
  return None if is_label and _NO_LABEL.search(match[1]) else match


def _values(match):
  """ "x = 1 or x = 2" -> "1 or 2"."""
  return re.sub(rf"(?<![A-Za-z\\]){re.escape(match[1])} ?(?:=|\\approx) ?", "", match[2])


def _product(text):
  """ "ma" -> "m \\cdot a": two letters that a name is equal to are no word."""
  return re.sub("^([A-Za-z]) ?([A-Za-z])$", r"\1 \\cdot \2", text)
