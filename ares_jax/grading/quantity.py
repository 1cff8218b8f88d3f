"""Parses and compares numbers with units: "1,200 cm", "\\frac{1}{2}", "50%", "$3.5 million".

Values are fractions, so nothing is rounded and no tolerance hides a wrong digit. Only ASCII digits
are read as digits: Arabic-Indic and other digits stay text and equal only themselves.
"""

import dataclasses
import re
from fractions import Fraction

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_PART = rf"(?:\{{\s*([+-]?\s*{_DECIMAL})\s*\}}|([0-9]))"
_FRACTION = rf"\\frac\s*{_PART}\s*{_PART}"

# Tried in this order; each takes the longest reading of the text's beginning.
_MIXED_LATEX = re.compile(rf"([0-9]+)\s*{_FRACTION}")
_MIXED_PLAIN = re.compile(r"([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_LATEX_FRACTION = re.compile(_FRACTION)
_EXPONENT = r"(?:\{\s*([+-]?[0-9]{1,3})\s*\}|([+-]?[0-9]{1,3}))(?![0-9^])"
_SCIENTIFIC = re.compile(rf"(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*{_EXPONENT}")
_WITH_E = re.compile(rf"({_DECIMAL})\s*[eE]([+-]?[0-9]{{1,3}})(?![0-9A-Za-z])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}")
_PLAIN_FRACTION = re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})")
_PLAIN = re.compile(_DECIMAL)
_SIGN = re.compile(r"\s*([+-]?)\s*([$€£¥]?)\s*([+-]?)\s*")

_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}

# name -> (dimension, size in the dimension's base). A name is looked up as written, or in lower
# case where it has several letters, with or without a plural "s".
_UNITS = {
  "m": ("length", 1), "cm": ("length", "1/100"), "mm": ("length", "1/1000"),
  "km": ("length", 1000), "dm": ("length", "1/10"), "nm": ("length", "1/1000000000"),
  "in": ("length", "0.0254"), "ft": ("length", "0.3048"), "yd": ("length", "0.9144"),
  "mi": ("length", "1609.344"),
  "g": ("mass", 1), "kg": ("mass", 1000), "mg": ("mass", "1/1000"), "t": ("mass", 1000000),
  "lb": ("mass", "453.59237"), "oz": ("mass", "28.349523125"),
  "s": ("time", 1), "ms": ("time", "1/1000"), "min": ("time", 60), "h": ("time", 3600),
  "day": ("time", 86400), "week": ("time", 604800), "month": ("month", 1), "year": ("month", 12),
  "l": ("volume", 1), "ml": ("volume", "1/1000"), "cl": ("volume", "1/100"),
  "dollar": ("dollar", 1), "cent": ("dollar", "1/100"), "€": ("euro", 1), "£": ("sterling", 1),
  "¥": ("yen", 1),
  "°": ("degree", 1), "rad": ("radian", 1), "°c": ("celsius", 1), "°f": ("fahrenheit", 1),
  "K": ("kelvin", 1), "mol": ("mole", 1), "N": ("newton", 1), "kn": ("newton", 1000),
  "J": ("joule", 1), "kj": ("joule", 1000), "W": ("watt", 1), "kw": ("watt", 1000),
  "V": ("volt", 1), "A": ("ampere", 1), "ma": ("ampere", "1/1000"), "hz": ("hertz", 1),
  "khz": ("hertz", 1000), "pa": ("pascal", 1), "kpa": ("pascal", 1000), "\\omega": ("ohm", 1),
  "MPa": ("pascal", 10**6), "mPa": ("pascal", "1/1000"), "GPa": ("pascal", 10**9),
  "MW": ("watt", 10**6), "mW": ("watt", "1/1000"), "MJ": ("joule", 10**6),
  "mJ": ("joule", "1/1000"), "MHz": ("hertz", 10**6), "GHz": ("hertz", 10**9),
  "mV": ("volt", "1/1000"), "kV": ("volt", 1000), "k\\Omega": ("ohm", 1000),
  "M\\Omega": ("ohm", 10**6), "eV": ("electronvolt", 1), "keV": ("electronvolt", 1000),
  "MeV": ("electronvolt", 10**6), "GeV": ("electronvolt", 10**9), "meV": ("electronvolt", "1/1000"),
  "atm": ("atmosphere", 1), "bar": ("pascal", 10**5), "psi": ("psi", 1), "rpm": ("rpm", 1),
  "bpm": ("bpm", 1), "mmol": ("mole", "1/1000"), "cal": ("calorie", 1), "kcal": ("calorie", 1000),
  "Cal": ("calorie", 1000),
  "\\mum": ("length", "1/1000000"), "\\mug": ("mass", "1/1000000"), "\\mus": ("time", "1/1000000"),
  "\\mul": ("volume", "1/1000000"), "\\muL": ("volume", "1/1000000"),
  "\\muA": ("ampere", "1/1000000"), "\\muF": ("farad", "1/1000000"),
  "\\muC": ("coulomb", "1/1000000"),
  "C": ("coulomb", 1), "%": ("percent", 1), "unit": ("unit", 1),
}  # fmt: skip
_SPELLINGS = {
  "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm",
  "millimetre": "mm", "kilometer": "km", "kilometre": "km", "inch": "in", "inches": "in",
  "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg",
  "milligram": "mg", "tonne": "t", "pound": "lb", "ounce": "oz", "second": "s", "sec": "s",
  "millisecond": "ms", "minute": "min", "hour": "h", "hr": "h", "yr": "year", "liter": "l",
  "litre": "l", "milliliter": "ml", "millilitre": "ml", "degree": "°", "radian": "rad",
  "kelvin": "K", "mole": "mol", "newton": "N", "joule": "J", "kilojoule": "kj", "watt": "W",
  "kilowatt": "kw", "volt": "V", "ampere": "A", "amp": "A", "hertz": "hz", "pascal": "pa",
  "ohm": "\\omega", "coulomb": "C", "percent": "%", "percents": "%", "usd": "dollar",
  "$": "dollar", "euro": "€", "yen": "¥", "L": "l",
}  # fmt: skip
# Words that are not counted things: "5 thirds" is not 5, and "-ths" is refused too. Other plurals
# are counted things.
_NOT_COUNTED = {
  "thirds", "halves", "quarters", "hundreds", "thousands", "millions", "billions",
  "trillions", "dozens", "pairs", "scores", "times", "plus", "minus", "less", "roots", "powers",
  "has", "is", "was", "its", "this", "thus", "does", "versus", "perhaps",
  "always", "lots", "guess", "unless",
}  # fmt: skip
_COUNTED = {"people", "children", "men", "women", "fish", "sheep", "mice", "person", "feet"}
_UNIT_PART = re.compile(
  r"([kM]?\\Omega|\\mu\s?[mgsLlAFC](?![A-Za-z])|°\s?[CF]\b|[A-Za-z]+|[%°$€£¥])\s*(?:\^\s*\{?\s*(-?[1-9])\s*\}?)?"
)
# "20 cups of feed" are 20 cups; 5 minutes of arc are not a time, and 3 rows of five are not 3.
_OF = re.compile(
  r"(?!(?:row|group|set|order|degree)s? )([a-z]+) of (?!arc$)([a-z]+(?: [a-z]+){,2})"
)
_COMPOUND = re.compile(r"([0-9]+ ?[A-Za-z]+) (and )?([0-9.]+ ?[A-Za-z]+)")
# Units with "and" within one quantity (2 hours and 5 minutes); 5 m and 3 cm are two quantities.
_SPOKEN = ("time", "month", "dollar")
_SPOKEN_PARTS = [Fraction(_UNITS[name][1]) for name in ("in", "ft", "oz")]
_UNIT_WORDS = {"squared": 2, "cubed": 3}


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number as written, and its unit."""

  number: Fraction
  unit: tuple | None  # sorted ((dimension, power), ...); None = none written
  size: Fraction  # of the unit in base units
  glued: bool  # "5m", "5 \\mu m": a unit or variables
  counted: str | None  # "feed" of "20 cups of feed"


def parse_quantity(text):
  """The Quantity that the complete `text` spells, or None.

  Args:
    text: normalised by `notation.normalise`, at most a few hundred characters.
  """
  if match := _COMPOUND.fullmatch(text):
    return _compound(parse_quantity(match[1]), parse_quantity(match[3]),
                     spoken=match[2] is not None)
  match = _SIGN.match(text)
  first, currency, second = match.groups()
  number, end = _read_number(text, match.end())
  if number is None or (first and second):
    return None
  rest = text[end:].strip()
  word = re.match(r"[a-z]+", rest)
  if word and word[0] in _MULTIPLIERS:
    number *= _MULTIPLIERS[word[0]]
    rest = rest[word.end() :].strip()
  of = _OF.fullmatch(rest)
  unit = _read_unit(f"{currency} {of[1] if of else rest}".strip())
  if unit is None:
    return None
  glued = bool(re.match(r"[A-Za-z](?![A-Za-z])|\s*\\mu", text[end:]))
  return Quantity(-number if "-" in (first, second) else number, *unit, glued, of and of[2])


def same_quantity(answer, truth):
  """Whether two quantities are equal; where only one has a unit, the other is taken to have it too.

  "50%" equals 0.5, and 50 where one side leaves the sign out. "0.5%" does not equal 0.5: a truth
  without a sign is read as a percentage only above 1.
  """
  percent = (("percent", 1),)
  if None not in (answer.counted, truth.counted) and answer.counted != truth.counted:
    return False
  if answer.unit == truth.unit:
    return answer.number * answer.size == truth.number * truth.size
  if answer.unit is None and truth.unit == percent:
    return answer.number in (truth.number, truth.number / 100)
  if truth.unit is None and answer.unit == percent:
    omitted = answer.number == truth.number and abs(truth.number) > 1
    return omitted or answer.number / 100 == truth.number
  if answer.unit is None or truth.unit is None:
    return answer.number == truth.number and not answer.glued and not truth.glued
  return False


def _compound(large, small, *, spoken):
  """The sum of "2 hours and 30 minutes": one dimension, the second less than one of the first."""
  if None in (large, small) or large.unit is None or large.unit != small.unit:
    return None
  if spoken and large.unit[0][0] not in _SPOKEN and small.size not in _SPOKEN_PARTS:
    return None
  part = small.number * small.size / large.size
  return dataclasses.replace(large, number=large.number + part) if part < 1 else None


def _read_number(text, start):
  """(value, end) of the unsigned number at `start`, or (None, start)."""
  if match := _MIXED_LATEX.match(text, start):
    whole, *parts = match.groups()
    top, bottom = _decimal(parts[0] or parts[1]), _decimal(parts[2] or parts[3])
    # Only a proper fraction makes a mixed number: 2\frac{3}{2} could be a product.
    return (int(whole) + top / bottom, match.end()) if 0 < top < bottom else (None, start)
  if match := _MIXED_PLAIN.match(text, start):
    whole, top, bottom = map(int, match.groups())
    if 0 < top < bottom:
      return whole + Fraction(top, bottom), match.end()
    return None, start
  if match := _LATEX_FRACTION.match(text, start):
    parts = match.groups()
    bottom = _decimal(parts[2] or parts[3])
    return (_decimal(parts[0] or parts[1]) / bottom, match.end()) if bottom else (None, start)
  if match := _SCIENTIFIC.match(text, start):
    digits, braced, bare = match.groups()
    return _decimal(digits or "1") * Fraction(10) ** int(braced or bare), match.end()
  if match := _WITH_E.match(text, start):
    return _decimal(match[1]) * Fraction(10) ** int(match[2]), match.end()
  if match := _REPEATING.match(text, start):
    whole, once, again = match.groups()
    nines = (10 ** len(again) - 1) * 10 ** len(once)
    return _decimal(f"{whole}.{once}") + Fraction(int(again), nines), match.end()
  if match := _PLAIN_FRACTION.match(text, start):
    bottom = _decimal(match[2])
    return (_decimal(match[1]) / bottom, match.end()) if bottom else (None, start)
  if match := _PLAIN.match(text, start):
    return _decimal(match[0]), match.end()
  return None, start


def _decimal(text):
  return Fraction(re.sub(r"[,\s+]", "", text).rstrip(".") or "0")


def _read_unit(text):
  """(unit, size) of a unit's text; (None, 1) where it is empty, None where it is not a unit."""
  if not text:
    return None, Fraction(1)
  text = re.sub(r"\bmph\b", "mi/h", text, flags=re.IGNORECASE)
  powers, size = {}, Fraction(1)  # dimension -> power; of the unit in base units
  sign = 1  # -1 behind "/" and "per"
  prefix = 1  # power that "square" or "cubic" gives to the next name
  position = 0
  while position < len(text):
    if separator := re.compile(r"\s*(/|per\b)\s*").match(text, position):
      sign, position = -1, separator.end()
      continue
    if separator := re.compile(r"\s*(?:\\cdot|\*|·)\s*|\s+").match(text, position):
      position = separator.end()
      continue
    match = _UNIT_PART.match(text, position)
    if match is None:
      return None
    position = match.end()
    name, power = match[1].replace(" ", ""), int(match[2] or 1)
    name = name if len(name) == 1 or name in _UNITS else name.lower()
    if name in ("square", "sq", "cubic"):
      prefix = 3 if name == "cubic" else 2
      continue
    if name in _UNIT_WORDS and powers:
      last = list(powers)[-1]
      if powers[last] != 1:
        return None
      powers[last] = _UNIT_WORDS[name]
      size **= _UNIT_WORDS[name]
      continue
    known = _find_unit(name)
    if known is None:
      return None
    power, prefix = power * prefix * sign, 1
    dimension, unit_size = known
    powers[dimension] = powers.get(dimension, 0) + power
    size *= unit_size ** power
  if prefix != 1 or not powers or text.endswith(("/", "*", "per", "\\cdot")):
    return None
  return tuple(sorted(powers.items())), size


def _find_unit(name):
  for word in (name, name.removesuffix("s"), name.removesuffix("es")):
    word = _SPELLINGS[word] if word in _SPELLINGS else word
    if word in _UNITS:
      dimension, size = _UNITS[word]
      return dimension, Fraction(size)
  counted = name.endswith("s") and len(name) >= 4 and name.isascii() and name.isalpha()
  if name in _COUNTED or (counted and name not in _NOT_COUNTED and not name.endswith("ths")):
    return name, Fraction(1)
  return None
