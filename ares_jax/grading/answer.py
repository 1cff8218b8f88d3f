"""Decides whether an answer says the same as the truth, as a careful person would.

The truth decides what is compared: option letters, yes or no, a number with its unit, a collection
(set, tuple, interval), words, or a formula. Each kind has a rule, and the first rule that applies
is final. Only formulas reach the symbolic parser (math-verify), which would take anagrams of words
for equal products of letters. There is no tolerance: 0.33 is not 1/3.
"""

import dataclasses
import functools
import re

from ares_jax.grading import option, quantity, rewrite, words
from ares_jax.grading.collection import pair_up, parse_collection
from ares_jax.grading.formula import is_safe, is_solved, same_formula, variables
from ares_jax.grading.notation import normalise, tight, without_hidden
from ares_jax.grading.question import restates

MAX_LENGTH = 256  # characters of an answer; a longer one is right only as the truth is written
_MAX_DEPTH = 2  # collections inside collections
_MAX_ITEMS = 24  # items of a collection without order, which are compared in pairs
_VERDICTS = ("yes", "no", "true", "false", "unknown")

# Words that take back a "yes" and a "no" before them.
_AGREES = {"yes", "true", "correct", "right", "indeed"}
_DENIES = {"no", "not", "false", "incorrect", "wrong", "untrue", "never", "none", "cannot", "t",
           "impossible", "neither", "nor"}
_BASED = re.compile(r"\(?([0-9A-F]+)\)?_([0-9]|\{[0-9]{2}\})")
_ARITHMETIC = re.compile(
  r"[0-9A-Za-z)}] ?[-+*(]|\) ?[0-9A-Za-z\\]|\\(?:times|cdot|div|pm|mp|binom)(?![a-z])"
)
# 1/2x is x/2 to some and 1/(2x) to others; "2 10^3" is not a number.
_AMBIGUOUS = re.compile(r"/ ?[0-9]+ ?[A-Za-z\\]|(?<![_^0-9])[0-9]+ +[0-9]")


@dataclasses.dataclass(frozen=True)
class Truth:
  """What a row of data says of its answer."""

  accepted: str | tuple  # a text or several, for example an option's letter and text
  options: tuple = ()  # texts of the options, in the order of their letters
  question: str = ""  # with its options; "" where it is not known

  @classmethod
  def of(cls, row):
    """The Truth of a row of data/sources.py."""
    answer = row["answer"]
    return cls(accepted=answer if isinstance(answer, str) else tuple(answer),
               options=tuple(row.get("options") or ()), question=row.get("question") or "")

  @property
  def texts(self):
    """The accepted texts; ValueError where one is no text or is empty."""
    texts = self.accepted if isinstance(self.accepted, tuple) else (self.accepted,)
    for text in texts:
      if not isinstance(text, str) or not text.strip():
        raise ValueError(f"truth {text!r} is not a text; the data must give the right answer")
    return texts


def same_answer(answer, truth, symbolic=None):
  """Whether `answer` says the same as `truth`.

  Another option of the truth's row is never right, whatever its letter or its value.

  Args:
    answer: str, the content of the box; None (no box) is never right.
    truth: a Truth, or its `accepted`; ValueError where one is no text or is empty.
    symbolic: function (answer, truth) -> bool that compares two formulas; None is `same_formula`,
      which has no time limit: use `pool.GradingPool` for answers that a model wrote.
  """
  truth = as_truth(truth)
  texts = truth.texts
  if answer is None or not answer.strip():
    return False
  if answer.strip() in map(str.strip, texts):
    return True
  # An option may be copied with its hidden characters, and is compared with the others.
  if without_hidden(answer) != answer and not truth.options:
    return False
  answer = without_hidden(answer)
  if _plain(answer) in [_plain(text) for text in texts if len(text) > MAX_LENGTH]:
    return True
  if len(answer) > MAX_LENGTH:
    return False
  answer = normalise(answer)
  if announced := option.ANNOUNCED.match(answer):
    answer = answer[announced.end() :]
  truths = [normalise(without_hidden(text)) for text in texts if len(text) <= MAX_LENGTH]
  # "½" becomes 11 characters of LaTeX, and some patterns take the cube of a length.
  truths = [text for text in truths if len(text) <= 2 * MAX_LENGTH]
  if len(answer) > 2 * MAX_LENGTH:
    return False

  def same(said, wanted):
    return _same(_Pair(said, wanted, same_formula if symbolic is None else symbolic, depth=0))

  options = [without_hidden(text)[:MAX_LENGTH] for text in truth.options]
  choices = option.choices(texts, truths, options)
  if not _names_right_option(answer, truths, choices, same):
    return False
  # The question shows its options, so to name one is not to restate it.
  is_named = choices.texts and (option.parse_option(answer) or choices.written_as(answer))
  return bool(is_named) or not restates(answer, truths, truth.question)


def _plain(text):
  """A long text without what is no part of its meaning: case, and spaces beside commas."""
  return re.sub(" ?, ?", ",", " ".join(text.casefold().split())).rstrip(".")


def as_truth(truth):
  """A Truth of one, of the row of data that has it, or of its `accepted`."""
  if isinstance(truth, Truth):
    return truth
  if isinstance(truth, dict):
    return Truth.of(truth)
  return Truth(tuple(truth) if isinstance(truth, list | tuple) else truth)


def _names_right_option(answer, truths, choices, same):
  """Whether an answer names the right one of Choices: its letter, its text, or both."""
  right = choices.right or {letter for letter, texts in choices.texts.items()
                            if any(same(text, truth) for text in texts for truth in truths)}
  if not right:  # there are no options, or the truth is none of them
    return any(same(answer, text) for text in truths)
  if answer in choices.texts:
    return answer in right
  if written := choices.written_as(answer):
    return not written.isdisjoint(right)
  letter, rest = option.parse_option(answer) or choices.with_letter(answer) or (None, answer)
  if letter is not None:
    if letter.upper() not in right:
      return False
    texts = choices.texts[letter.upper()]
    rest = normalise(rest)  # what stands behind a letter was not read as a value of its own
    if rest and (written := choices.written_as(rest)):  # of several orders of a list one is right
      return letter.upper() in written
    if not rest or any(same(rest, text) for text in texts):
      return True
    if option.names_another(rest):
      return False
    return choices.nearest(rest) == letter.upper() if choices.all_known else not texts
  texts = [*truths, *(text for letter in right for text in choices.texts[letter])]
  if not any(same(answer, text) for text in texts):
    return False
  # As 4x6x16 and 4x8x12 are 384 both, or two options the same items in another order.
  others = choices.texts.keys() - right
  is_another = any(same(answer, text) for letter in others for text in choices.texts[letter])
  return not is_another or choices.nearest(answer) in right


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

  @functools.cached_property
  def formulas(self):
    """((formula, unit) of the answer, the same of the truth); "2\\sqrt{3} meters" has a unit."""
    return (_cut_unit(self.answer_factors, self.truth),
            _cut_unit(self.truth, self.answer_factors))


def _same(pair):
  """Whether the two texts of a pair say the same."""
  if pair.answer and tight(pair.answer) == tight(pair.truth):
    return True
  if pair.depth > _MAX_DEPTH:
    return False
  if pair.depth == 0 and (verdict := _first_verdict(_RULES_FOR_COMPLETE_TEXTS, pair)) is not None:
    return verdict
  answer, truth = rewrite.to_common_form(pair.answer, pair.truth, is_complete=pair.depth == 0)
  if answer and tight(answer) == tight(truth):
    return True
  return _first_verdict(_RULES, pair.part(answer, truth, pair.depth))


def _first_verdict(rules, pair):
  """True or False from the first rule that applies; None where none does."""
  return next((verdict for rule in rules if (verdict := rule(pair)) is not None), None)


def _same_letters(pair):
  """Truth "A, C", or "ABD", which may be a triangle: only letters. None for another truth."""
  wanted = option.option_letters(pair.truth)
  # Only an answer that separates its letters means options.
  if wanted is None and re.fullmatch(r"[A-J]{2,10}", pair.truth):
    said = option.option_letters(pair.answer)
    wanted = frozenset(pair.truth) if said and len(set(pair.truth)) == len(pair.truth) else None
  if wanted is None:
    return None
  only_letters = re.fullmatch(
    r"\(?[A-J]\)?(?:(?: ?(?:, ?)?and| ?[,&])? ?\(?[A-J]\)?)*", pair.answer)
  return bool(only_letters) and set(re.findall(r"[A-J]", pair.answer)) == wanted


def _same_behind_letter(pair):
  """True for the answer "C. 12" where the truth is the text of an option, 12; else None."""
  if pair.answer == f"({pair.truth})" and len(pair.truth) == 1:  # a part of a figure, "(a)"
    return True
  said = option.parse_option(pair.answer)
  if not said or not said[1] or said[0].islower() or option.names_another(said[1]):
    return None
  return _same(pair.part(said[1], pair.truth)) or None


def _same_yes_no(pair):
  """Truth yes, no, true or false: "Yes, it is" says yes. None for another truth."""
  answer, wanted = pair.answer.casefold(), pair.truth.casefold()
  if wanted not in ("yes", "no", "true", "false"):
    return None
  first, *others = re.findall(r"[a-z]+", answer) or [""]
  against = _AGREES if wanted in ("no", "false") else _DENIES
  stands_alone = re.match(r"[a-z]+(?=$|[.,;:!])", answer)
  return first == wanted and bool(stands_alone) and against.isdisjoint(others)


def _same_in_base(pair):
  """Truth 2516_8, as in MATH-500: the digits; an answer without a base has the question's."""
  wanted, said = _BASED.fullmatch(pair.truth), _BASED.fullmatch(pair.answer)
  if wanted is None:
    return False if said and re.fullmatch(r"[0-9]+", pair.truth) else None
  return pair.answer == wanted[1] if said is None else said.groups() == wanted.groups()


def _same_chain(pair):
  """True for "x = 9 + 9 = 18" where the truth is 18 and so is every step; else None."""
  *steps, last = (part.strip() for part in pair.answer.split("="))
  steps = [step for step in steps if not re.fullmatch("[A-Za-z]", step)]
  if not steps or last in steps or "=" in pair.truth or not _same(pair.part(last, pair.truth)):
    return None
  return all(_same_formula(pair.part(step, pair.truth)) for step in steps) or None


def _same_quantity(pair):
  answer, truth = pair.quantities
  return quantity.same_quantity(answer, truth) if answer and truth else None


def _leaves_arithmetic(pair):
  """False for "4+4" where the truth is 8; else None. A truth like "3-1" is a score or a range."""
  if pair.quantities[1] and _ARITHMETIC.search(pair.answer):
    return False
  return False if re.fullmatch(r"[0-9]+( ?- ?[0-9]+)+", pair.truth) else None


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
  return len(wanted) <= _MAX_ITEMS and pair_up(said, wanted, same_item)


def _same_words(pair):
  """None where neither side is language."""
  answer, truth = pair.answer_factors, pair.truth
  if not any(words.is_words(formula) for formula, _ in pair.formulas):
    return None
  if all(re.fullmatch(r"(?:[A-Z][a-z]?)+", text) for text in (answer, truth)):
    return False  # CO is not Co
  return words.plain_words(answer) == words.plain_words(truth)


def _same_formula(pair):
  """Two formulas, each with a unit or without; a unit that one side omits is not compared."""
  if any(pair.collections):
    return False
  (answer, answer_unit), (truth, truth_unit) = pair.formulas
  differ = answer_unit != truth_unit
  if differ and (answer_unit and truth_unit or quantity.PERCENT in (answer_unit or truth_unit)):
    return False
  if not (is_safe(answer) and is_safe(truth)):
    return False
  if (answer.count("=") != truth.count("=")
      or "!" in answer and "!" not in truth and "\\binom" not in truth  # 6! for 720
      or _AMBIGUOUS.search(answer) or _AMBIGUOUS.search(truth)):
    return False
  # Letters alone are a name: the segment AB, not a product.
  if truth != "i" and re.fullmatch(r"[A-Za-z' ]*", truth):
    return False
  # 2x = 4 is a step on the way to x = 2. x - 2 = 0 may be a line.
  if is_solved(truth) and not is_solved(re.sub(r" ?[+-] ?[0-9.]+ ?= ?0$", "=0", answer)):
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
  # "thousand" is no unit.
  return (match[1], (unit.unit, unit.size)) if unit and unit.number == 1 else (text, None)


# Each rule takes a _Pair and returns True, False, or None where it does not apply.
_RULES_FOR_COMPLETE_TEXTS = (_same_letters, _same_behind_letter, _same_yes_no, _same_in_base,
                            _same_chain)
_RULES = (_same_quantity, _leaves_arithmetic, _same_collection, _same_words, _same_formula)
