"""Decides whether an answer says the same as the truth, as a careful person would.

The truth decides what is compared: option letters, yes or no, a number with its unit, a collection
(set, tuple, interval), words, or a formula. Each kind has a rule, and the first rule that applies
is final. Only formulas reach the symbolic parser (math-verify), which would take anagrams of words
for equal products of letters. There is no tolerance: 0.33 is not 1/3.
"""

import dataclasses
import functools
import re

from ares_jax.grading import dates, option, quantity, rewrite, words
from ares_jax.grading.collection import parse_collection
from ares_jax.grading.formula import is_safe, same_formula, variables
from ares_jax.grading.notation import has_control, normalise, tight

MAX_LENGTH = 256  # characters of an answer; a longer one is right only if it equals the truth
_MAX_DEPTH = 2  # collections inside collections
_MAX_ITEMS = 24  # items of a collection without order, which are compared in pairs
_VERDICTS = ("yes", "no", "true", "false", "unknown")

_BASED = re.compile(r"\(?([0-9A-F]+)\)? ?_ ?(?:\{ ?([0-9]{1,2}) ?\}|([0-9]{1,2}))")
_ARITHMETIC = re.compile(
  r"[0-9A-Za-z)}] ?[-+*(]|\) ?[0-9A-Za-z\\]|\\(?:times|cdot|div|pm|mp|binom)(?![a-z])"
)
# 1/2x is x/2 to some and 1/(2x) to others; "2 10^3" is not a number.
_AMBIGUOUS = re.compile(r"/ ?[0-9]+ ?[A-Za-z\\]|(?<![_^0-9])[0-9]+ +[0-9]")

_I = r"(?<![A-Za-z\\])i(?![A-Za-z])"
_COMPLEX = re.compile(r"(?:[0-9+\-., (){}/i]|\\(?:frac|sqrt|pi)(?![a-z]))+")
# Powers, products and quotients of terms with i, but not \frac{1+i}{2} and \frac{1}{i}.
_COMPLEX_ARITHMETIC = re.compile(
  rf"[)}}i] ?\^|\^ ?\{{[^}}]*{_I}|\) ?(?:\*|\\cdot|\\times)? ?\("
  rf"|i ?(?:\*|\\cdot|\\times)? ?[0-9]*{_I}"
  rf"|/ ?\([^)]*{_I}"
  rf"|\}} ?\{{(?=(?:[^{{}}]|\{{[^{{}}]*\}})*[+-])(?:[^{{}}]|\{{[^{{}}]*\}})*{_I}"
)


def same_answer(answer, truth, symbolic=None):
  """Whether `answer` says the same as `truth`.

  Args:
    answer: str, the content of the box; None (no box) is never right.
    truth: str, or a list or tuple of accepted ones; ValueError where one is no text or is empty.
    symbolic: function (answer, truth) -> bool that compares two formulas; None is `same_formula`,
      which has no time limit: use `pool.GradingPool` for answers that a model wrote.
  """
  truths = truth if isinstance(truth, list | tuple) else (truth,)
  for accepted in truths:
    if not isinstance(accepted, str) or not accepted.strip():
      raise ValueError(f"truth {accepted!r} is not a text; the data must give the right answer")
  if answer is None or not answer.strip():
    return False
  symbolic = same_formula if symbolic is None else symbolic
  if len(truths) > 1 and max(map(len, (answer, *truths))) <= MAX_LENGTH:
    truths = option.truths_with_text(normalise(answer),
                                     [normalise(accepted) for accepted in truths])
  return any(_same_text(answer, accepted, symbolic) for accepted in truths)


def _same_text(answer, truth, symbolic):
  if answer.strip() == truth.strip():
    return True
  if len(answer) > MAX_LENGTH or len(truth) > MAX_LENGTH or has_control(answer):
    return False
  answer, truth = normalise(answer), normalise(truth)
  # "½" becomes 11 characters of LaTeX, and some patterns take the cube of a length.
  is_long = max(len(answer), len(truth)) > 2 * MAX_LENGTH
  return answer == truth if is_long else _same(_Pair(answer, truth, symbolic, depth=0))


@dataclasses.dataclass
class _Pair:
  """A normalised answer and truth, with what several rules need of them."""

  answer: str
  truth: str
  symbolic: object  # function (answer, truth) -> bool
  depth: int  # 0 for complete texts; collections and options around these otherwise

  def part(self, answer, truth, depth=1):
    """The pair of an item or an option's text of each side."""
    return _Pair(answer, truth, self.symbolic, depth)

  @functools.cached_property
  def quantities(self):
    """(answer, truth), each a Quantity or None."""
    return quantity.parse_quantity(self.answer), quantity.parse_quantity(self.truth)

  @functools.cached_property
  def collections(self):
    """(answer, truth), each (kind, items) or None."""
    # 1,234 is not a list; "2 days and 5 hours" is one unless the other side is a quantity too.
    return tuple(None if number and " and " not in text else parse_collection(text)
                 for text, number in zip((self.answer, self.truth), self.quantities, strict=True))

  @functools.cached_property
  def answer_factors(self):
    """The answer with spaces between factors that are letters of the truth: "2mgh", "2m g h"."""
    return words.split_products(self.answer, self.truth)


def _same(pair):
  """Whether the two texts of a pair say the same."""
  if pair.answer and tight(pair.answer) == tight(pair.truth):
    return True
  if pair.depth > _MAX_DEPTH:
    return False
  if pair.depth == 0:
    announced = option.ANNOUNCED.match(pair.answer)
    if announced:
      pair = pair.part(pair.answer[announced.end() :], pair.truth, depth=0)
    verdict = _first_verdict(_RULES_FOR_COMPLETE_TEXTS, pair)
    if verdict is not None:
      return verdict
  answer, truth = rewrite.to_common_form(pair.answer, pair.truth, is_complete=pair.depth == 0)
  return _first_verdict(_RULES, pair.part(answer, truth, pair.depth))


def _first_verdict(rules, pair):
  """True or False from the first rule that applies; None where none does."""
  return next((verdict for rule in rules if (verdict := rule(pair)) is not None), None)


def _same_option(pair):
  """Truth "B", "(B)" or "B. 12": the letter decides. None where the truth is not an option."""
  answer, truth = pair.answer, pair.truth
  wanted, said = option.option_letters(truth), option.option_letters(answer)
  # "ABD" may be three options or a triangle: only an answer that separates letters means options.
  if wanted is None and said and re.fullmatch(r"[A-J]{2,10}", truth):
    wanted = frozenset(truth) if len(set(truth)) == len(truth) else None
  if wanted:
    only_letters = re.fullmatch(
      r"\(?[A-J]\)?(?:(?: ?(?:, ?)?and| ?[,&])? ?\(?[A-J]\)?)*", answer)
    return bool(only_letters) and set(re.findall(r"[A-J]", answer)) == wanted
  wanted, said = option.parse_option(truth), option.parse_option(answer)
  if answer == f"({truth})" and said:  # a part of a figure, "(a)"
    return True
  if wanted is None or wanted[0].islower():
    # The truth may be the text of an option: "C. 12" says 12.
    if said and said[1] and not said[0].islower():
      return _same(pair.part(said[1], truth)) or None
    return None
  if said is None:
    return _same(pair.part(answer, wanted[1])) if wanted[1] else False
  if said[0].upper() != wanted[0]:
    return False
  if said[1] and wanted[1]:
    return _same(pair.part(said[1], wanted[1]))
  return True


def _same_yes_no(pair):
  """Truth yes, no, true or false: "Yes, it is" says yes. None for another truth."""
  answer, wanted = pair.answer.lower(), pair.truth.lower()
  if wanted not in ("yes", "no", "true", "false"):
    return None
  said = [word for word in re.findall(r"[a-z]+", answer)
          if word in ("yes", "no", "not", "true", "false")]
  if wanted in ("no", "false"):
    said = [word for word in said if word != "not"]  # "No, it is not"
  first = re.match(r"[a-z]+(?=$|[.,;:!])", answer)
  return said == [wanted] and first is not None and first[0] == wanted


def _same_in_base(pair):
  """Truth 2516_8: the digits and the base; a bare answer has the base of the question."""
  wanted, said = _BASED.fullmatch(pair.truth), _BASED.fullmatch(pair.answer)
  if wanted is None:
    return False if said and re.fullmatch(r"[0-9]+", pair.truth) else None
  digits = said[1] if said else pair.answer
  same_base = said is None or (said[2] or said[3]) == (wanted[2] or wanted[3])
  return digits.lstrip("0") == wanted[1].lstrip("0") and same_base


def _same_chemical(pair):
  """True for H2O and H_2O, False for CO and Co, which differ in capitals alone; else None."""
  said, wanted = (re.sub(r"[_{}\s]", "", text) for text in (pair.answer, pair.truth))
  if not all(re.fullmatch(r"(?:[A-Z][a-z]?[0-9]*)+", text) for text in (said, wanted)):
    return None
  if said == wanted and re.search(r"[0-9]", said):
    return True
  return False if said != wanted and said.lower() == wanted.lower() else None


def _same_date(pair):
  return dates.same_date(pair.answer, pair.truth)


def _same_quantity(pair):
  answer, truth = pair.quantities
  return quantity.same_quantity(answer, truth) if answer and truth else None


def _restates_question(pair):
  """False for "4+4" where the truth is 8, and for i^2 or (1+i)^2 where it is a + bi; else None.

  A truth like "3-1" is a score or a range: only itself is right.
  """
  if pair.quantities[1] and _ARITHMETIC.search(pair.answer):
    return False
  if re.fullmatch(r"[0-9]+( ?- ?[0-9]+)+", pair.truth):
    return False
  has_i = re.search(_I, pair.answer) and _COMPLEX.fullmatch(pair.truth)
  return False if has_i and _COMPLEX_ARITHMETIC.search(pair.answer) else None


def _same_collection(pair):
  """Kind and items of two collections. None where one side is not a collection."""
  if not all(pair.collections):
    return None
  (said_kind, said), (wanted_kind, wanted) = pair.collections
  if said_kind != wanted_kind or len(said) != len(wanted):
    return False

  def same_item(answer, truth):
    return _same(pair.part(answer, truth, pair.depth + 1))

  # A list may hold verdicts on several questions, whose order matters.
  verdicts = all(item.strip().casefold() in _VERDICTS for item in wanted)
  if verdicts or wanted_kind not in ("list", "union"):
    return all(map(same_item, said, wanted))
  if len(wanted) > _MAX_ITEMS:
    return False
  left = list(wanted)
  for item in said:
    found = [index for index, truth in enumerate(left) if same_item(item, truth)]
    if not found:
      return False
    left.pop(found[0])
  return True


def _same_words(pair):
  """None where neither side is language."""
  answer, truth = pair.answer_factors, pair.truth
  if not (words.is_words(truth) or words.is_words(answer)):
    return None
  said, wanted = words.plain_words(answer), words.plain_words(truth)
  return said == wanted and wanted != ""


def _same_formula(pair):
  """Two formulas, each with a unit or without; a unit that one side omits is not compared."""
  if any(pair.collections):
    return False
  answer, answer_unit = _cut_unit(pair.answer_factors, pair.truth)
  truth, truth_unit = _cut_unit(pair.truth, pair.answer_factors)
  if answer_unit and truth_unit and answer_unit != truth_unit:
    return False
  if not (is_safe(answer) and is_safe(truth)) or answer.count("=") != truth.count("="):
    return False
  if _AMBIGUOUS.search(answer) or _AMBIGUOUS.search(truth):
    return False
  # Letters alone are a name: the segment AB, not a product.
  if truth != "i" and re.fullmatch(r"[A-Za-z' ]*", truth):
    return False
  # An answer must not bring variables of its own (5 + 0x). To math-verify X is x.
  return variables(answer) == variables(truth) and pair.symbolic(answer, truth)


def _cut_unit(text, other):
  """(formula, unit) of "2\\sqrt{3} cm"; the unit is None where none is written.

  One letter is a unit where the `other` side and the number before it have no letters: 2\\pi m.
  """
  match = re.fullmatch(r"(.*(?:[})0-9]|\\pi)) ?((?:[A-Za-z]{2}|[°%]).*)", text)
  if match is None and not variables(other):
    match = re.fullmatch(r"(.*(?:[})0-9]|\\pi)) ([A-Za-z](?:[/^].*)?)", text)
    match = None if match is None or variables(match[1]) else match
  unit = quantity.parse_quantity(f"1 {match[2]}") if match else None
  return (match[1], (unit.unit, unit.size)) if unit else (text, None)


# Each rule takes a _Pair and returns True, False, or None where it does not apply.
_RULES_FOR_COMPLETE_TEXTS = (_same_option, _same_yes_no, _same_in_base, _same_chemical, _same_date)
_RULES = (_same_quantity, _restates_question, _same_collection, _same_words, _same_formula)
