"""Whether an answer is the truth, as a careful person would say it.

The truth decides the kind: option letters, yes or no, number with unit, collection (set, tuple,
interval), words, formula. Each kind has its own comparison and the first that applies is final;
only formulas reach the symbolic parser (math-verify), which takes anagrams of words for equal
products of letters. No tolerance: 0.33 is not 1/3.
"""

import math
import re

from ares_jax.grading import dates, option, quantity, words
from ares_jax.grading.collection import parse_collection, parse_inequality, split_items
from ares_jax.grading.formula import is_safe, same_formula, variables
from ares_jax.grading.notation import has_control, normalise, tight

MAX_LENGTH = 256  # characters of an answer; nothing longer is compared but by equality

# x, x_1, \theta, f(x), segments and angles (AB, m\angle ABC), sums asked for (m + n).
_NAMED = re.compile(
  r"([A-Za-z](?:_\{?\w\}?)?|\\(?!no?t|ne)[a-z]+|\([a-z](?:,\s*[a-z])+\)|[A-Za-z]\([a-z]\)|(?:m\s*)?\\angle\s*[A-Z0-9]{1,3}"
  r"|[A-Z]{2,3}|\\overline\s*\{[A-Z]{2}\}|[a-z](?:\s*[+-]\s*[a-z])+)\s*(?:=|\\in\b)\s*(.+)"
)
_BASED = re.compile(r"\(?([0-9A-F]+)\)?\s*_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]{1,2}))")
_ARITHMETIC = re.compile(
  r"[0-9A-Za-z)}]\s*[-+*(]|\)\s*[0-9A-Za-z\\]|\\(?:times|cdot|div|pm|mp|binom)(?![a-z])"
)

_I = r"(?<![A-Za-z\\])i(?![A-Za-z])"
_COMPLEX = re.compile(r"(?:[0-9+\-., (){}/i]|\\(?:frac|sqrt|pi)(?![a-z]))+")
# Powers, products and quotients of what holds i; \frac{1+i}{2} and \frac{1}{i} are none.
_COMPLEX_ARITHMETIC = re.compile(
  rf"[)}}i]\s*\^|\^\s*\{{[^}}]*{_I}|\)\s*(?:\*|\\cdot|\\times)?\s*\("
  rf"|i\s*(?:\*|\\cdot|\\times)?\s*[0-9]*{_I}"
  rf"|/\s*\([^)]*{_I}"
  rf"|\}}\s*\{{(?=(?:[^{{}}]|\{{[^{{}}]*\}})*[+-])(?:[^{{}}]|\{{[^{{}}]*\}})*{_I}"
)


def same_answer(answer, truth, symbolic=None):
  """Whether `answer` says the same as `truth`.

  Args:
    answer: str, what stands in the box; None (no box) is never right.
    truth: str, or a list or tuple of accepted ones.
    symbolic: function (answer, truth) -> bool for two formulas; None is `same_formula`, which has
      no time limit: grade what a model wrote with `grade.GradingPool`.

  Raises:
    ValueError: a truth is not a string or is empty.
  """
  truths = truth if isinstance(truth, list | tuple) else (truth,)
  for accepted in truths:
    if not isinstance(accepted, str) or not accepted.strip():
      raise ValueError(f"truth {accepted!r} is not a text; the data must give the right answer")
  if answer is None or not answer.strip():
    return False
  symbolic = same_formula if symbolic is None else symbolic
  if len(truths) > 1 and max(map(len, (answer, *truths))) <= MAX_LENGTH:
    truths = option.truths_with_text(normalise(answer), [normalise(accepted) for accepted
                                                         in truths])
  return any(_same_text(answer, accepted, symbolic) for accepted in truths)


def _same_text(answer, truth, symbolic):
  if answer.strip() == truth.strip():
    return True
  if len(answer) > MAX_LENGTH or len(truth) > MAX_LENGTH or has_control(answer):
    return False
  answer, truth = normalise(answer), normalise(truth)
  # "½" is 11 characters of LaTeX, and some patterns take the cube of a length.
  if max(len(answer), len(truth)) > 2 * MAX_LENGTH:
    return answer == truth
  return _same(answer, truth, symbolic, depth=0)


def _same(answer, truth, symbolic, depth):
  """The layers, on normalised texts; `depth` counts collections inside collections."""
  if answer and tight(answer) == tight(truth):
    return True
  if depth > 2:
    return False
  if depth == 0:
    announced = option.ANNOUNCED.match(answer)
    answer = answer[announced.end() :] if announced else answer
    for verdict in (_same_option(answer, truth, symbolic), _same_yes_no(answer, truth),
                    _same_based(answer, truth), _same_chemical(answer, truth),
                    dates.same_date(answer, truth)):  # fmt: skip
      if verdict is not None:
        return verdict
    answer, truth = _as_intervals(_as_tuple(answer, truth), truth)
  answer, truth = words.spell_numbers(answer), words.spell_numbers(truth)
  if re.fullmatch(r"[0-9]{1,2}!", truth):  # as a truth alone: "6!" for 720 restates the question
    truth = str(math.factorial(int(truth[:-1])))
  answer, truth = _without_name(answer, truth, depth)
  read_answer, read_truth = quantity.parse_quantity(answer), quantity.parse_quantity(truth)
  if read_answer and read_truth:
    return quantity.same_quantity(read_answer, read_truth)
  # "4+4" restates the question whose answer is 8; "3-1" as a truth is a score or a range.
  if (read_truth and _ARITHMETIC.search(answer)) or re.fullmatch(r"[0-9]+( ?- ?[0-9]+)+", truth):
    return False
  if _computes_with_i(answer, truth):
    return False
  # 1,234 is no list; "2 days and 5 hours" is one where the other side is no quantity.
  parts_answer = None if read_answer and " and " not in answer else parse_collection(answer)
  parts_truth = None if read_truth and " and " not in truth else parse_collection(truth)
  if parts_answer and parts_truth:
    return _same_collection(parts_answer, parts_truth, symbolic, depth)
  answer = words.split_products(answer, truth)
  if words.is_words(truth) or words.is_words(answer):
    return words.plain_words(answer) == words.plain_words(truth) and words.plain_words(truth) != ""
  if parts_answer or parts_truth:
    return False
  return _same_formula_with_unit(answer, truth, symbolic)


def _computes_with_i(answer, truth):
  """Whether `answer` restates the question of a number a + bi: i^2, (1+i)^2, e^{i \\pi}."""
  held = re.search(_I, answer) and _COMPLEX.fullmatch(truth)
  return bool(held and _COMPLEX_ARITHMETIC.search(answer))


def _same_formula_with_unit(answer, truth, symbolic):
  answer, truth = _cut_unit(answer, truth), _cut_unit(truth, answer)
  if answer[1] and truth[1] and answer[1] != truth[1]:
    return False
  answer, truth = answer[0], truth[0]
  if not (is_safe(answer) and is_safe(truth)) or answer.count("=") != truth.count("="):
    return False
  # 1/2x is x/2 to some and 1/(2x) to others; "2 10^3" is no number.
  unclear = r"/\s*[0-9]+\s*[A-Za-z\\]|(?<![_^0-9])[0-9]+ +[0-9]"
  if re.search(unclear, answer) or re.search(unclear, truth):
    return False
  # Letters alone name a thing: the segment AB, not a product. Nor may an answer bring its own
  # variables (5 + 0x), and X is not x, though math-verify says so.
  if truth != "i" and re.fullmatch(r"[A-Za-z' ]*", truth) or variables(answer) != variables(truth):
    return False
  return symbolic(answer, truth)


def _same_option(answer, truth, symbolic):
  """Truth "B", "(B)" or "B. 12": the letter decides; None when the truth is no option."""
  wanted, said = option.option_letters(truth), option.option_letters(answer)
  # "ABD" may be three options or a triangle: only an answer that separates letters means options.
  if wanted is None and said and re.fullmatch(r"[A-J]{2,10}", truth):
    wanted = frozenset(truth) if len(set(truth)) == len(truth) else None
  if wanted:
    plain = re.fullmatch(r"\(?[A-J]\)?(?:\s*(?:,?\s*and|,|&|\s)?\s*\(?[A-J]\)?)*", answer)
    return bool(plain) and set(re.findall(r"[A-J]", answer)) == wanted
  wanted, said = option.parse_option(truth), option.parse_option(answer)
  if answer == f"({truth})" and said:  # a part of a figure, "(a)"
    return True
  if wanted is None or wanted[0].islower():
    # A truth that is an option's text: "C. 12" says 12.
    if said and said[1] and not said[0].islower():
      return _same(said[1], truth, symbolic, depth=1) or None
    return None
  if said is None:
    return _same(answer, wanted[1], symbolic, depth=1) if wanted[1] else False
  if said[0].upper() != wanted[0]:
    return False
  return not (said[1] and wanted[1]) or _same(said[1], wanted[1], symbolic, depth=1)


def _same_yes_no(answer, truth):
  """Truth yes, no, true or false; "Yes, it is" says yes. None when the truth is none of them."""
  wanted = truth.lower()
  if wanted not in ("yes", "no", "true", "false"):
    return None
  said = re.findall(r"[a-z]+", answer.lower())
  said = [word for word in said if word in ("yes", "no", "not", "true", "false")]
  first = re.match(r"[a-z]+(?=$|[.,;:!])", answer.lower())
  if wanted in ("no", "false"):
    said = [word for word in said if word != "not"]  # "No, it is not"
  return said == [wanted] and first is not None and first[0] == wanted


def _same_based(answer, truth):
  """2516_8: the digits and the base; a bare answer has the question's. None without a base."""
  wanted, said = _BASED.fullmatch(truth), _BASED.fullmatch(answer)
  if wanted is None:
    return None if said is None or not re.fullmatch(r"[0-9]+", truth) else False
  digits = said[1] if said else answer
  return digits.lstrip("0") == wanted[1].lstrip("0") and (
    said is None or (said[2] or said[3]) == (wanted[2] or wanted[3])
  )


def _same_chemical(answer, truth):
  """True for H2O and H_2O, False for CO and Co, where capitals tell; else None."""
  said, wanted = (re.sub(r"[_{}\s]", "", text) for text in (answer, truth))
  formula = r"(?:[A-Z][a-z]?[0-9]*)+"
  if not (re.fullmatch(formula, said) and re.fullmatch(formula, wanted)):
    return None
  if said == wanted and re.search(r"[0-9]", said):
    return True
  return False if said != wanted and said.lower() == wanted.lower() else None


def _as_intervals(answer, truth):
  """Inequalities as intervals, where both are, or one is and the other an interval already."""
  said, wanted = parse_inequality(answer), parse_inequality(truth)
  if said and wanted:
    return (said[1], wanted[1]) if said[0] == wanted[0] else (answer, truth)
  if said and re.fullmatch(r"(?:[A-Za-z]\s*\\in\s*)?[(\[].*,.*[)\]]", truth):
    return said[1], truth
  if wanted and re.fullmatch(r"(?:[A-Za-z]\s*\\in\s*)?[(\[].*,.*[)\]]", answer):
    return answer, wanted[1]
  return answer, truth


def _as_tuple(answer, truth):
  """Answer "y = -1, x = 2" to a tuple, in the order of the truth's names or of x, y, z.

  A truth without names that may be an interval, (1, 2), asks for none.
  """
  wanted = re.fullmatch(r"(?:\(([a-z](?:, ?[a-z])+)\) ?= ?)?\((.+,.+)\)", truth)
  if wanted is None or answer.count("=") < 2:
    return answer
  ends = [quantity.parse_quantity(item) for item in split_items(wanted[2], (",",))]
  if not wanted[1] and len(ends) == 2 and (None in ends or ends[0].number < ends[1].number):
    return answer
  names = re.findall("[a-z]", wanted[1] or "xyz")
  parts = [part.partition("=") for part in split_items(answer, (",", ";", " and "))]
  said = {name.strip(): value.strip() for name, _, value in parts}
  if len(said) < len(parts) or said.keys() != set(names[: len(parts)]):
    return answer
  return f"({', '.join(said[name] for name in names[: len(parts)])})"


def _without_name(answer, truth, depth):
  """Drops "x =" where both sides have the same name, or only one has and is no part of a list."""
  said, wanted = _roots(answer), _roots(truth)
  if depth == 0 and (said is None) != (wanted is None):
    answer, truth = said or answer, wanted or truth
  said, wanted = _named(answer), _named(truth)
  if said and wanted:
    if said[1] == wanted[1]:
      return _without_repeats(said), _without_repeats(wanted)
  elif depth == 0 and (said or wanted) and not re.search(
    r"=|<|>|\\le\b|\\ge\b", truth if said else answer
  ):
    return (_without_repeats(said), truth) if said else (answer, _without_repeats(wanted))
  return answer, truth


def _named(text):
  """Match of "x = ..." where x is the only name in `text`; else None."""
  match = _NAMED.fullmatch(text)
  names = set(re.findall(r"([^\s,;=]+)\s*=", text))
  return match if match and len(names) <= 1 else None


def _roots(text):
  """ "x_1 = 2, x_2 = 5" -> "x = 2, x = 5"; None where these are not the values of one unknown."""
  found = re.findall(r"([xyzt])_\{?([1-9])\}?\s*=", text)
  if len(found) < 2 or found != [(found[0][0], str(i + 1)) for i in range(text.count("="))]:
    return None
  return re.sub(r"_\{?[1-9]\}?(?=\s*=)", "", text)


def _without_repeats(match):
  """ "x = 1 or x = 2" -> "1 or 2"."""
  return re.sub(rf"(?<![A-Za-z\\]){re.escape(match[1])}\s*=\s*", "", match[2])


def _cut_unit(text, other):
  """(formula, unit) of "2\\sqrt{3} cm"; the unit is None where none is written.

  One letter is a unit where the `other` side and the number before it have no letters: 2\\pi m.
  """
  match = re.fullmatch(r"(.*(?:[})0-9]|\\pi))\s*((?:[A-Za-z]{2}|[°%]).*)", text)
  if match is None and not variables(other):
    match = re.fullmatch(r"(.*(?:[})0-9]|\\pi)) ([A-Za-z](?:[/^].*)?)", text)
    match = None if match is None or variables(match[1]) else match
  unit = quantity.parse_quantity(f"1 {match[2]}") if match else None
  return (match[1], (unit.unit, unit.size)) if unit else (text, None)


def _in_order(items):
  """Whether a list is one of verdicts on several questions."""
  return all(
    item.strip().casefold() in ("yes", "no", "true", "false", "unknown") for item in items
  )


def _same_collection(answer, truth, symbolic, depth):
  if answer is None or truth is None or answer[0] != truth[0] or len(answer[1]) != len(truth[1]):
    return False
  if truth[0] not in ("list", "union") or _in_order(truth[1]):
    return all(
      _same(a, t, symbolic, depth + 1) for a, t in zip(answer[1], truth[1], strict=True)
    )
  if len(truth[1]) > 24:
    return False
  left = list(truth[1])
  for item in answer[1]:
    found = [i for i, wanted in enumerate(left) if _same(item, wanted, symbolic, depth + 1)]
    if not found:
      return False
    left.pop(found[0])
  return True
