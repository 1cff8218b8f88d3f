"""Parses and compares numbers with units: "1,200 cm", "\\frac{1}{2}", "50%", "$3.5 million".

Values are fractions, so nothing is rounded and no tolerance hides a wrong digit. Only ASCII digits
are read as digits: Arabic-Indic and other digits stay text and equal only themselves.
"""

import dataclasses
import re
from fractions import Fraction

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_PART = rf"(?:\{{ ?([+-]? ?{_DECIMAL}) ?\}}|([0-9]))"
_FRACTION = rf"\\frac ?{_PART} ?{_PART}"
_EXPONENT = r"(?:\{ ?([+-]?[0-9]{1,3}) ?\}|([+-]?[0-9]{1,3}))(?![0-9^])"
_SIGN = re.compile(r" ?([+-]?) ?([$€£¥]?) ?([+-]?) ?")

_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}

# Units of each dimension, and their size in its base.
_SIZES = {
  "length": "m=1 cm=1e-2 mm=1e-3 km=1e3 dm=0.1 nm=1e-9 \\mum=1e-6 in=0.0254 ft=0.3048 yd=0.9144 "
            "mi=1609.344",
  "mass": "g=1 kg=1e3 mg=1e-3 \\mug=1e-6 t=1e6 lb=453.59237 oz=28.349523125",
  "time": "s=1 ms=1e-3 \\mus=1e-6 min=60 h=3600 day=86400 week=604800", "month": "month=1 year=12",
  "volume": "l=1 ml=1e-3 cl=1e-2 \\mul=1e-6 \\muL=1e-6", "dollar": "dollar=1 cent=1e-2",
  "euro": "€=1", "sterling": "£=1", "yen": "¥=1", "degree": "°=1", "radian": "rad=1",
  "celsius": "°c=1", "fahrenheit": "°f=1", "kelvin": "K=1", "mole": "mol=1 mmol=1e-3",
  "newton": "N=1 kn=1e3", "joule": "J=1 kj=1e3 mJ=1e-3 MJ=1e6", "coulomb": "C=1 \\muC=1e-6",
  "watt": "W=1 kw=1e3 mW=1e-3 MW=1e6", "volt": "V=1 mV=1e-3 kV=1e3", "farad": "\\muF=1e-6",
  "ampere": "A=1 ma=1e-3 \\muA=1e-6", "hertz": "hz=1 khz=1e3 MHz=1e6 GHz=1e9",
  "pascal": "pa=1 kpa=1e3 mPa=1e-3 MPa=1e6 GPa=1e9 bar=1e5", "atmosphere": "atm=1",
  "ohm": "\\omega=1 k\\Omega=1e3 M\\Omega=1e6", "calorie": "cal=1 kcal=1e3 Cal=1e3",
  "electronvolt": "eV=1 keV=1e3 MeV=1e6 GeV=1e9 meV=1e-3", "psi": "psi=1", "rpm": "rpm=1",
  "bpm": "bpm=1", "percent": "%=1", "unit": "unit=1",
}  # fmt: skip
# name -> (dimension, size). A name is looked up as written, or in lower case where it has several
# letters, with or without a plural "s".
_UNITS = {name: (dimension, Fraction(size)) for dimension, units in _SIZES.items()
          for name, size in (unit.split("=") for unit in units.split())}
_SPELLINGS = {word: name for name, words in {
  "m": "meter metre 米", "cm": "centimeter centimetre 厘米", "mm": "millimeter millimetre 毫米",
  "km": "kilometer kilometre 千米 公里", "in": "inch inches", "ft": "foot feet", "yd": "yard",
  "mi": "mile", "g": "gram 克", "kg": "kilogram 千克 公斤", "mg": "milligram", "t": "tonne 吨",
  "lb": "pound", "oz": "ounce", "s": "second sec 秒", "ms": "millisecond", "min": "minute 分钟",
  "h": "hour hr 小时", "year": "yr 岁 年", "l": "liter litre L 升",
  "ml": "milliliter millilitre 毫升", "°": "degree deg 度", "rad": "radian", "K": "kelvin",
  "mol": "mole", "N": "newton", "J": "joule", "kj": "kilojoule", "W": "watt", "kw": "kilowatt",
  "V": "volt", "A": "ampere amp", "hz": "hertz", "pa": "pascal", "\\omega": "ohm",
  "C": "coulomb", "%": "percent percents pct percentage", "dollar": "usd $", "€": "euro eur",
  "¥": "yen", "day": "天", "dm": "分米",
}.items() for word in words.split()}  # fmt: skip
# Words that are not counted things: "5 thirds" is not 5, and "-ths" is refused too. Other plurals
# are counted things.
_NOT_COUNTED = set((
  "thirds halves halfs quarters tens twenties hundreds thousands dozens pairs couples scores gross "
  "lakhs crores grands myriads kilos megas ones twos threes fours fives sixes sevens eights nines "
  "times plus minus less roots powers factorials negatives inverses logs has is was its this thus "
  "does versus perhaps always lots guess unless").split())
_COUNTED = set("people children men women fish sheep mice person feet 个 人 只 条 本 元".split())
# "/ cm^2", " square metres": what stands between two units, square or cubic, a name and its power.
_UNIT = re.compile(
  r"(?P<between> ?(?:/|per\b) ?| ?(?:\\cdot|\*|·) ?|\s+)?(?:(?P<prefix>(?i:square|sq|cubic))\s+)?"
  r"(?P<name>[kM]?\\Omega|\\mu ?[mgsLlAFC](?![A-Za-z])|° ?[CF]\b|[A-Za-z]+|[一-鿿]+|[%°$€£¥])"
  r"(?: ?\^ ?\{? ?(?P<power>-?[1-9]) ?\}?)?")
PERCENT = (("percent", 1),)  # the unit of "5%"
_MEASURED = re.compile(  # 89 years old
  r"(?<=[a-z]) (?:old|long|tall|wide|high|deep|thick|away|apart|ago|later|left|each|in total)$")


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number as written, and its unit."""

  number: Fraction
  unit: tuple | None  # sorted ((dimension, power), ...); None = none written
  size: Fraction  # of the unit in base units
  glued: bool  # "5m", "5 \\mu m": a unit or variables


def parse_quantity(text):
  """The Quantity that a complete, normalised `text` spells, or None."""
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
  rest = _MEASURED.sub("", rest)
  unit = _read_unit(f"{currency} {rest}".strip())
  if unit is None:
    return None
  glued = bool(re.match(r"[A-Za-z](?![A-Za-z])| ?\\mu", text[end:]))
  return Quantity(-number if "-" in (first, second) else number, *unit, glued)


def same_quantity(answer, truth):
  """Whether two quantities are equal; where only one has a unit, the other is taken to have it too.

  "50%" equals 0.5, and 50 where one side leaves the sign out. "0.5%" does not equal 0.5: a truth
  without a sign is read as a percentage only above 1.
  """
  if answer.unit == truth.unit:
    return answer.number * answer.size == truth.number * truth.size
  if answer.unit is None and truth.unit == PERCENT:
    return answer.number in (truth.number, truth.number / 100)
  if truth.unit is None and answer.unit == PERCENT:
    omitted = answer.number == truth.number and abs(truth.number) > 1
    return omitted or answer.number / 100 == truth.number
  one_has_none = answer.unit is None or truth.unit is None
  return one_has_none and answer.number == truth.number and not (answer.glued or truth.glued)


def _read_number(text, start):
  """(value, end) of the unsigned number at `start`, or (None, start)."""
  for pattern, value in _NUMBERS:
    if match := pattern.match(text, start):
      number = value(*filter(None, match.groups()))
      return (None, start) if number is None else (number, match.end())
  return None, start


def _decimal(text):
  return Fraction(re.sub(r"[,\s+]", "", text).rstrip(".") or "0")


def _ratio(top, bottom):
  return _decimal(top) / _decimal(bottom) if _decimal(bottom) else None


def _mixed(whole, top, bottom):
  """The value of a whole number and a proper fraction: 2\\frac{3}{2} could be a product."""
  part = _ratio(top, bottom)
  return _decimal(whole) + part if part and 0 < part < 1 else None


def _scientific(*parts):
  """The value of 3e8 or 3 \\times 10^8, of "3" and "8"; of "8" alone that of 10^8."""
  digits, power = parts if len(parts) == 2 else ("1", *parts)
  return _decimal(digits) * Fraction(10) ** int(power)


def _repeating(digits, again):
  """The value of 0.1\\overline{6}, of "0.1" and "6"."""
  decimals = len(digits.partition(".")[2])
  return _decimal(digits) + Fraction(int(again), (10 ** len(again) - 1) * 10**decimals)


# Tried in this order; each takes the longest reading of the text's beginning.
_NUMBERS = tuple((re.compile(pattern), value) for pattern, value in (
  (rf"([0-9]+) ?{_FRACTION}", _mixed),
  (r"([0-9]+)\s+([0-9]+) ?/ ?([0-9]+)", _mixed),
  (_FRACTION, _ratio),
  (rf"(?:({_DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?)?10 ?\^ ?{_EXPONENT}", _scientific),
  (rf"({_DECIMAL}) ?[eE]([+-]?[0-9]{{1,3}})(?![0-9A-Za-z])", _scientific),
  (r"([0-9]*\.[0-9]*)\\overline ?\{([0-9]+)\}", _repeating),
  (rf"({_DECIMAL}) ?/ ?({_DECIMAL})", _ratio),
  (rf"({_DECIMAL})", _decimal),
))


def _read_unit(text):
  """(unit, size) of a unit's text; (None, 1) where it is empty, None where it is not a unit."""
  if not text:
    return None, Fraction(1)
  text = text.replace("平方", "square ").replace("立方", "cubic ")
  text = re.sub(r"\bmph\b", "mi/h", text, flags=re.IGNORECASE)
  powers, size = {}, Fraction(1)  # dimension -> power; of the unit in base units
  position, sign = 0, 1  # -1 behind "/" and "per"
  while position < len(text):
    match = _UNIT.match(text, position)
    known = match and _find_unit(match["name"].replace(" ", ""))
    if not known or match["power"] and match["name"] in "$€£¥":  # "$12$^2" is no money
      return None
    position = match.end()
    sign = -1 if (match["between"] or "").strip() in ("/", "per") else sign
    prefix = {"square": 2, "sq": 2, "cubic": 3}.get((match["prefix"] or "").lower(), 1)
    power = int(match["power"] or 1) * prefix * sign
    powers[known[0]] = powers.get(known[0], 0) + power
    size *= known[1] ** power
  return tuple(sorted(powers.items())), size


def _find_unit(name):
  """(dimension, size) of a unit's name, or None; that of a counted thing is a dimension itself."""
  name = name if len(name) == 1 or name in _UNITS else name.lower()
  for word in (name, name.removesuffix("s"), name.removesuffix("es")):
    word = _SPELLINGS.get(word, word)
    if word in _UNITS:
      return _UNITS[word]
  counted = re.fullmatch(r"[A-Za-z]{3,}s", name) and not name.endswith(("ths", "illions"))
  return (name, Fraction(1)) if name in _COUNTED or counted and name not in _NOT_COUNTED else None
