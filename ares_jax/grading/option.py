"""Finds which option of a multiple-choice question a text names: "B", "(B)", "B. 12", "A, C"."""

import collections
import dataclasses
import re

from ares_jax.grading.notation import normalise, tight

# Spaces stand in one place of each separator, so a text that is no list fails in linear time.
_LETTERS = re.compile(r"[A-J](?:(?: ?(?:, ?)?and| ?[,&]) ?[A-J])+")
_OPTION = re.compile(
  r"(?=\(.\)|\[.\]|\{.\}).([A-Ja-j]).[.:]? ?(.*)|([A-Ja-j])(?:[.:)] ?(.*))?"
  r"|([A-J]) ?(\([A-Za-z]{3}.*\)|\s-\s[A-Za-z]{3}.*)"
)
_BEFORE = re.compile(r"([A-J]) ?(?:[,-] ?(?=.)|(?=\(.*\)$)\()(.*?)\)?")
_BEHIND = re.compile(r"(.+?)[.,]? ?\(([A-J])\)")
# What follows an option's letter and names another option ("A. or B.", "(A) or (B)", "[A] B", "A:
# yes, B: yes", "A. no, C") or takes the first one back.
_ANOTHER = re.compile(
  r"[(\[{][A-J][)\]}]|(?<![A-Za-z])[A-J][.:)](?!\w)|^[A-J]$|^\(?(?:or|and|nor|not|but|no)\b|^[&/]"
  r"|(?:[,;:/&]|\b(?:or|but|not|is)\b) ?[A-J]$|\b[A-J] is (?:right|correct)\b"
  r"|\b(?:wrong|incorrect|instead|rather|actually|maybe|perhaps)\b"
)
ANNOUNCED = re.compile(
  r"(?:the\s+|my\s+)?(?:final\s+|correct\s+|right\s+)?(?:answer|option|choice) ?(?:is|:|=) ?:? ?"
  r"|故?选 ?:? ?|答案(?:是|为|选|:) ?:? ?",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Choices:
  """The options of a question and which of them are right; all texts are normalised."""

  texts: dict  # letter -> list of the texts that stand for it, as far as known; {} without options
  right: frozenset  # of letters; empty where the truths name no option
  all_known: bool  # whether the texts of all options are known

  def written_as(self, text):
    """The letters whose text is `text` but for spaces."""
    return {letter for letter, texts in self.texts.items()
            if tight(text) in [tight(each) for each in texts]}

  def with_letter(self, text):
    """(letter, text) of "B, 12", "B (12)" or "12 (B)", where the text is an option as written."""
    for pattern, letter in ((_BEFORE, 1), (_BEHIND, 2)) if self.all_known else ():
      match = pattern.fullmatch(text)
      rest = match and match[3 - letter]
      if match and match[letter] in self.texts and rest not in self.texts and self.written_as(rest):
        return match[letter], rest
    return None

  def nearest(self, text):
    """The letter of the option whose text is the nearest as written; None where two are."""
    near = {letter: max((_likeness(text, each) for each in texts), default=0)
            for letter, texts in self.texts.items()}
    best = [letter for letter, value in near.items() if value == max(near.values())]
    return best[0] if len(best) == 1 else None


def choices(written, truths, options):
  """The Choices of a row's truths and options.

  Without options the truths may tell the letter and its text: "B", "B. 12", or ["B", "12"].

  Args:
    written: the truths as the data have them: \text{B} is an option's text, not the letter B.
    truths: the same, normalised.
    options: texts of the options in the order of their letters; empty where they are not known.
  """
  if options:
    texts = {chr(ord("A") + index): [normalise(text)] for index, text in enumerate(options)}
    right = texts.keys() & set(written)
    if not right:
      right = {letter for letter, written in texts.items()
               if tight(written[0]) in [tight(truth) for truth in truths]}
    return Choices(texts, frozenset(right), all_known=True)
  named = {truth: parse_option(truth) for truth in truths}
  plain = [truth for truth, option in named.items() if option is None or option[0].islower()]
  texts = {option[0]: ([option[1]] if option[1] else []) + plain
           for truth, option in named.items() if truth not in plain}
  return Choices(texts, frozenset(texts), all_known=False)


def option_letters(text):
  """The set of letters of "A, C" or "A and C"; None where `text` is not such a list."""
  return frozenset(re.findall(r"[A-J]", text)) if _LETTERS.fullmatch(text) else None


def parse_option(text):
  """(letter, text of the option or "") of a normalised text, or None where it names no option.

  A small letter without brackets stays small, because it may be a variable.
  """
  match = _OPTION.fullmatch(re.sub(r"^(?:option|choice|figure)\s+", "", text, flags=re.IGNORECASE))
  if match is None:
    return None
  letter = (match[1] or match[5] or "").upper() or match[3]
  rest = next((part for part in (match[2], match[4], match[6]) if part), "").strip()
  return letter, rest


def names_another(rest):
  """Whether what follows an option's letter names another option or takes the first one back."""
  return _ANOTHER.search(rest) is not None


def _likeness(text, other):
  """Share of two neighbouring characters that two texts have in common."""
  pairs = [collections.Counter(map("".join, zip(each, each[1:] + " ", strict=True)))
           for each in (tight(text).casefold(), tight(other).casefold())]
  return 2 * (pairs[0] & pairs[1]).total() / max(1, pairs[0].total() + pairs[1].total())
