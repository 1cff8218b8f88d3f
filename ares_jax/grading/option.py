"""Finds which option of a multiple-choice question a text names: "B", "(B)", "B. 12", "A, C"."""

import re

# Spaces stand in one place of each separator, so a text that is no list fails in linear time.
_LETTERS = re.compile(r"[A-J](?:(?: ?(?:, ?)?and| ?[,&]) ?[A-J])+")
_OPTION = re.compile(
  r"(?=\(.\)|\[.\]|\{.\}).([A-Ja-j]).[.:]? ?(.*)|([A-Ja-j])(?:[.:)] ?(.*))?"
  r"|([A-J]) ?(\([A-Za-z]{3}.*\)|\s-\s[A-Za-z]{3}.*)"
)
# A second option in the same answer: "A. or B.", "(A) or (B)", "[A] B", "A: yes, B: yes".
_ANOTHER = re.compile(
  r"[(\[{][A-J][)\]}]|(?<![A-Za-z])[A-J][.:)](?!\w)|^[A-J]$|^(?:or|and|nor)\b|^\(?or\b|^[&/]"
)
ANNOUNCED = re.compile(
  r"(?:the\s+|my\s+)?(?:final\s+|correct\s+|right\s+)?(?:answer|option|choice) ?(?:is|:|=) ?:? ?",
  re.IGNORECASE,
)


def option_letters(text):
  """The set of letters of "A, C" or "A and C"; None where `text` is not such a list."""
  return frozenset(re.findall(r"[A-J]", text)) if _LETTERS.fullmatch(text) else None


def parse_option(text):
  """(letter, text of the option or "") of a normalised text, or None where it names no option.

  The letter is "?" where a second option follows: an answer that names two options is wrong. A
  small letter without brackets stays small, because it may be a variable.
  """
  match = _OPTION.fullmatch(re.sub(r"^(?:option|choice|figure)\s+", "", text, flags=re.IGNORECASE))
  if match is None:
    return None
  letter = (match[1] or match[5] or "").upper() or match[3]
  rest = next((part for part in (match[2], match[4], match[6]) if part), "").strip()
  return ("?" if _ANOTHER.search(rest) else letter), rest


def truths_with_text(text, truths):
  """The truths to compare an answer `text` with, where it may name an option and its text: "B. 12".

  Where the truths are an option's letter and its text, both parts must be right: with "B" and "12"
  neither "C. 12" nor "B. 13" is right. All texts are normalised.
  """
  names = [truth for truth in truths if re.fullmatch(r"[A-J]", truth)]
  texts = [truth for truth in truths if truth not in names]
  said = parse_option(ANNOUNCED.sub("", text, count=1))
  if not names or not texts or text in truths or said is None or said[0].islower() or not said[1]:
    return truths
  return [f"{letter}. {words}" for letter in names for words in texts]
