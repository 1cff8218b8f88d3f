"""Other ways of writing a truth, by its kind: number, fraction, unit, words, formula, option."""

import re
from fractions import Fraction

LETTERS = "ABCDEFGHIJ"
_NUMBER = r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_NAMES = "mm|cm|dm|m|km|g|kg|inches|feet|units|litres|metres"
_UNIT = rf"(?:\\(?:mathrm|text) ?\{{ ?~?({_NAMES}) ?\}}|({_NAMES}))"
_QUANTITY = re.compile(rf"({_NUMBER}) ?{_UNIT}((?: ?\^ ?\{{?[23]\}}?)?)")
_FRACTION = re.compile(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_DELIMITER = re.compile(r"\$|\\[()\[\]]")
_DELIMITED = re.compile(r"^(?:\$\$?|\\\(|\\\[)([^$]*)(?:\$\$?|\\\)|\\\])\.?$")
_CHARACTERS = {r"\\pi(?![a-z])": "π", r"\^(?:\{2\}|2)(?![0-9])": "²",
               r"\^(?:\{3\}|3)(?![0-9])": "³", r" ?\^ ?\{?\\circ\}?": "°",
               r"\\leq?(?![a-z])": "≤", r"\\geq?(?![a-z])": "≥", r"\\infty": "∞",
               r"\\cup": "∪", r"\\times": "×"}
_MATHS = re.compile(r"[0-9^_=<>+*/\\]|\A[A-Za-z]\Z")


def right_writings(row):
  """At least two texts that say what the row's truth says, none of them a truth as it stands."""
  letters = _letters(row)
  if letters:
    return [writing for letter in letters
            for writing in option_writings(letter, row["options"][LETTERS.index(letter)], row)]
  # The last is the plainest, see evaluation/published.py. A fraction of the question restates it.
  return [text for text in other_writings(row["answer"][-1])
          if "frac" not in text or text.replace("dfrac", "frac") not in row["question"]]


def wrong_writings(row):
  """Texts that name the other options of the row."""
  letters = _letters(row)
  right = {row["options"][LETTERS.index(letter)] for letter in letters}
  return [text for letter, option in zip(LETTERS, row["options"], strict=False)
          if letters and letter not in letters and option not in right
          for text in (letter, option, *option_writings(letter, option, row)) if text]


def _letters(row):
  """The letters of the right options."""
  return [text for text in row["answer"] if text in LETTERS[:len(row["options"])] and text]


def option_writings(letter, text, row):
  """An option named by its letter, by both, or by its text where texts count in the row."""
  writings = [f"({letter})", f"{letter}.", f"\\text{{{letter}}}", f"\\text{{({letter})}}"]
  if text:
    writings += [f"{letter}. {text}", f"({letter}) {text}"]
  return writings + (other_writings(text) if len(row["answer"]) > len(_letters(row)) else [])


def other_writings(truth):
  """Texts that say what `truth` says."""
  bare = _DELIMITED.sub(r"\1", truth.strip())
  writings = [bare]
  if not _DELIMITER.search(bare):
    writings += [f"${bare}$", f"\\[{bare}\\]", f"\\({bare}\\)"]
  if match := re.fullmatch(r"\\?\$([0-9].*)", bare):  # money
    writings += [f"{bare}.", f"\\${match[1]}" if bare[0] == "$" else f"${match[1]}"]
  elif re.fullmatch(_NUMBER, bare):
    writings += _number_writings(bare)
  elif match := _FRACTION.fullmatch(bare):
    sign, top, bottom = match.groups()
    writings += [f"{sign}{top}/{bottom}", f"{sign}\\dfrac{{{top}}}{{{bottom}}}"]
  elif match := _QUANTITY.fullmatch(bare):
    number, one, other, power = match.groups()
    writings += [number] * (f"{number}m" not in bare)  # 5m may be a product
    writings += [f"{number}\\,\\text{{{one or other}}}{power}",
                 f"{number} {one or other}{power}"]
  elif _MATHS.search(bare):
    writings += _formula_writings(bare)
  elif re.fullmatch("[A-J](?:, [A-J])+", bare):
    writings += [bare.replace(",", " and"), ", ".join(sorted(bare.split(", "), reverse=True))]
  else:
    writings += [f"\\text{{{bare}}}", f"{bare}."]
    if re.fullmatch("[A-Z]?[a-z]{2,}(?: [A-Z]?[a-z]{2,})*", bare):
      writings += [bare.upper(), bare.lower()]
  return [writing for writing in dict.fromkeys(writings) if writing != truth]


_SIZED = {"(": "\\left(", ")": "\\right)"}  # \( and \) are delimiters: they stay as they are


def _formula_writings(text):
  plain = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
  writings = [text.replace("\\frac", "\\dfrac"), plain,
              re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)]
  if plain.count("(") == plain.count(")") and "\\right)" not in text:
    writings.append(re.sub(r"(?<!\\)([()])", lambda found: _SIZED[found[1]], plain))
  for command, character in _CHARACTERS.items():
    plain = re.sub(command, character, plain)
  return [*writings, plain]


def _number_writings(text):
  plain = text.replace(",", "")
  value = Fraction(plain)
  writings = [f"x = {text}", f"\\text{{{text}}}", f"{plain}0" if "." in plain else f"{plain}.0"]
  if value.denominator in range(2, 100):
    sign, top = "-" if value < 0 else "", abs(value.numerator)
    writings.append(f"{sign}\\frac{{{top}}}{{{value.denominator}}}")
  if abs(value) >= 1000 and value.denominator == 1:
    writings += [f"{value.numerator:,}", str(value.numerator)]
  return writings
