"""Handles answers in words: spelled numbers, and whether a text is language at all."""

import re

from ares_jax.grading.formula import FUNCTIONS

_SMALL = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: number for number, word in enumerate(_SMALL)}
_NUMBER_WORDS |= {word: 20 + 10 * number for number, word in enumerate(_TENS)}
_NUMBER_WORDS |= {
  f"{tens}{joint}{_SMALL[one]}": 20 + 10 * number + one
  for number, tens in enumerate(_TENS) for one in range(1, 10) for joint in "- "
}  # fmt: skip
_SPELLED = re.compile(
  rf"({'|'.join(sorted(_NUMBER_WORDS, key=len, reverse=True))})(?![\w-])", re.IGNORECASE
)
# Two letters that are a word, not a product, where they stand between two values: "3 by 4", "1 in
# 4". In "v + at", "by = 0" and "in^2" they are products and units.
_SHORT = re.compile(
  r"(?<=[\w)}] )(?:by|of|to|in|is|at|on|as|if|no)(?= [\w(\\$])|(?<=[0-9])(?:by|of|to)(?=[0-9])"
)


def spell_numbers(text):
  """ "seventy-two dollars" -> "72 dollars", "4 = n" -> "n = 4"; drops a leading "\\approx"."""
  if match := _SPELLED.match(text):
    text = f"{_NUMBER_WORDS[match[1].lower()]}{text[match.end() :]}"
  text = re.sub(r"^([^=A-Za-z\\]+?)\s*=\s*([A-Za-z])$", r"\2 = \1", text)
  return re.sub(r"^(?:\\approx|approximately|about)\s*(?=[-$\\(0-9])", "", text)


def is_words(text):
  """Whether `text` is language: it has letters in a row that are neither LaTeX nor a function."""
  bare = re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+", " ", text)
  # Two letters beside digits or signs are a product: 4ac.
  least = 3 if re.search(r"[0-9+*/^=<>]|\\[A-Za-z]", text) else 2
  runs = re.findall(rf"[^\W\d_]{{{least},}}", bare)
  return any(run.lower() not in FUNCTIONS for run in runs) or bool(_SHORT.search(bare))


def split_products(text, formula):
  """ "2mgh" -> "2m g h" where m, g and h stand alone in `formula`: it is a product, not a word."""
  alone = set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", formula))

  def spaced(run):
    return " ".join(run[0]) if set(run[0]) <= alone else run[0]

  return re.sub(r"(?<![A-Za-z\\])[A-Za-z]{3,}", spaced, text)


def plain_words(text):
  """`text` without case, articles and outer punctuation, to compare two texts in words."""
  # Capitals differ in units: 5 mSv, 5 MSv.
  text = text if re.fullmatch(r"[+-]?[0-9.,]+ ?[A-Za-z]{3}", text) else text.casefold()
  text = re.sub(r"(?<=[0-9]) ?(?:x|\\times) ?(?=[0-9])", " by ", text)  # 3x4 subplots
  text = re.sub(r"\\(?=[a-z]{2})", "", text)  # a Greek letter is written by its name too
  text = re.sub(r"[\s_]+", " ", text).strip(" .,;:!?\"'")
  return re.sub(r"^(?:the|an|a) ", "", text)
