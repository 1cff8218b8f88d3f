"""Compares two formulas with math-verify, and decides which LaTeX its parser may see."""

import functools
import logging
import re

FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "infty"}
_LETTERS = set(
  "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau "
  "phi varphi chi psi omega hbar ell Delta Theta Lambda Sigma Phi Psi Omega".split())
_COMMANDS = FUNCTIONS | _LETTERS | {
  "frac", "binom", "cdot", "times", "div", "pm", "mp", "arcsin", "arccos", "arctan", "sinh", "cosh",
  "tanh", "cup", "cap", "in", "le", "ge", "leq", "geq", "ne", "neq", "lt", "gt", "emptyset", "sum",
  "max", "min",
}  # fmt: skip
# A letter with its subscript and primes is a name, unless it belongs to a command or a function.
_NAME = re.compile(
  r"(\\[A-Za-z]+|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r"|[A-Za-z])"
  r"(?: ?_ ?(?:\{([^{}]*)\}|([A-Za-z0-9]|\\[A-Za-z]+)))?('*)"
)
_UNSAFE_POWER = re.compile(
  r"\^ ?\{? ?[+-]? ?[0-9]{4,}"  # x^{1000}
  r"|\^ ?\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\^"  # a power of a power
  r"|\^ ?(?:\{[^{}]*\}|.) ?\^"
  # (x^{999})^{999}; in 3^{999} x^{999} the second base is a bare letter or number.
  r"|\^ ?\{? ?[+-]? ?[0-9]{3}.*(?:[^0-9A-Za-z]|_ ?[0-9A-Za-z]+)"
  r"\^ ?\{? ?[+-]? ?[0-9]{3}"
)
# Binomials of letters and of numbers below 100: 10^9 over 5 10^8 has 300 million digits.
_BINOMIAL = re.compile(
  r"\\binom ?" + 2 * r"\{(?:[A-Za-z+\- ]|(?<![0-9])[0-9]{1,2}(?![0-9]))*\}"
)
# Factorials and sums of letters and of numbers below 100.
_UNSAFE_RANGE = re.compile(
  r"[0-9]{3}!|!!|[^A-Za-z0-9)]!|\([^()]*(?:[0-9]{3}|[\^!])[^()]*\)!|\)\)!"
  r"|\\sum ?_ ?\{[^{}]*[0-9]{3}|\\sum ?_ ?\{[^{}]*\} ?\^ ?\{[^{}]*[0-9]{3}"
)


def same_formula(answer, truth):
  """Whether math-verify finds two LaTeX formulas equal. Has no limit of time or memory."""
  # Imported here: it takes half a second, and only a formula needs it.
  from math_verify import verify

  parsed = [_parse(text) for text in (truth, answer)]
  if not all(parsed):
    return False
  verdict = _compare_values(parsed[0][0], parsed[1][0])
  if verdict is not None:
    return verdict
  # Rounded at 6 digits, its default, 1.414214 would be the square root of 2.
  return bool(verify(*parsed, float_rounding=15, timeout_seconds=None))


def _compare_values(truth, answer):
  """Whether two expressions have the same values, to 30 digits; None where that decides nothing.

  Decimals are exact: 3.14159265359 is not pi. The values are those at a point of positive numbers
  and, where both are real there, at one of negative numbers. Infinite values are compared as
  written: sympy's verdict on them is left to chance.
  """
  import sympy

  if not (isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr)):
    return None
  sides = [side.xreplace({value: sympy.Rational(str(value)) for value in side.atoms(sympy.Float)})
           for side in (truth, answer)]
  names = sorted(sides[0].free_symbols | sides[1].free_symbols, key=str)
  points = [[37 + 29 * index for index in range(len(names))],
            [-113 - 71 * index for index in range(len(names))]]
  for number, point in enumerate(points if names else points[:1]):
    point = {name: sympy.Rational(value, 100) for name, value in zip(names, point, strict=True)}
    try:
      values = [side.subs(point).evalf(30) for side in sides]
      if any(value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for value in values):
        return truth == answer if number == 0 else True
      parts = [value.as_real_imag() for value in values]
      if number and any(imaginary for _, imaginary in parts):
        return True
      largest = max(abs(part) for pair in parts for part in pair)
      if 0 < largest < 1e-60:  # digits may be lost
        return sympy.simplify(sides[0] - sides[1]) == 0
      if any(abs(first - second) > 1e-20 * largest for first, second in zip(*parts, strict=True)):
        return False
    except (TypeError, ValueError, ArithmeticError, AttributeError):  # no number
      return None
  return True


# A truth is compared with every sample of its prompt, and parsing it is half of a comparison.
@functools.lru_cache(maxsize=4096)
def _parse(text):
  from latex2sympy2_extended import NormalizationConfig
  from math_verify import LatexExtractionConfig, parse

  # It warns at every call without its own time limit, which works in the main thread only.
  logging.getLogger("math_verify").setLevel(logging.CRITICAL)
  # Only its LaTeX grammar: plain expressions are parsed by sympy, which executes them. Units were
  # cut before; math-verify would drop the h of 2h as an hour.
  cleaning = NormalizationConfig(units=False, malformed_operators=True, nits=True)
  config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=cleaning)]
  parsed = parse(f"${_NAME.sub(_plain_name, text)}$", config, fallback_mode="no_fallback",
                 parsing_timeout=None)
  return [_with_imaginary_unit(expression) for expression in parsed]


def _plain_name(match):
  """ "R_{\\max}'" as "x_{rcapmaxprime}": math-verify takes R for r, E for e and drops primes."""
  letter, _, _, primes = match.groups()
  below = _below(match)
  if not _is_name(letter) or (letter in ("e", "i") and not below and not primes):
    return match[0]
  tail = "cap" * letter.removeprefix("\\")[0].isupper() + below + "prime" * len(primes)
  tail = re.sub("[A-Z]", lambda capital: "cap" + capital[0].lower(), tail)
  return f"x_{{{letter.lower().removeprefix(chr(92))}{tail}}} " if tail else match[0]


def _below(match):
  """Letters and digits of a name's subscript; + and - as letters, so that n-k is not nk."""
  text = (match[2] or match[3] or "").replace("-", "minus").replace("+", "plus")
  return re.sub(r"[^A-Za-z0-9]", "", text)


def _is_name(letter):
  return letter[1:] in _LETTERS if letter[0] == "\\" else letter not in FUNCTIONS


def _with_imaginary_unit(expression):
  """`expression` with sympy's imaginary unit for the letter i, which math-verify reads."""
  import sympy

  if not isinstance(expression, sympy.Expr):
    return expression
  return expression.subs({name: sympy.I for name in expression.free_symbols if name.name == "i"})


def is_safe(text):
  """Whether the symbolic parser may see `text`: short, known commands, small powers."""
  if not re.fullmatch(r"[A-Za-z0-9+\-*/^_()\[\]{},.=<>|\\ '!°%]+", text):
    return False
  without_names = _NAME.sub(lambda name: name[1] if _is_name(name[1]) else name[0], text)
  if any(command not in _COMMANDS for command in re.findall(r"\\([A-Za-z]*)", without_names)):
    return False
  if text.count("\\binom") != len(_BINOMIAL.findall(text)) or "'" in without_names:
    return False
  if re.search(r"[0-9]{21,}|[0-9]_", text) or _UNSAFE_POWER.search(text):
    return False
  if _UNSAFE_RANGE.search(text):
    return False
  depth = deepest = 0
  for letter in text:
    depth += (letter in "({[") - (letter in ")}]")
    deepest = max(deepest, depth)
    if depth < 0:
      return False
  return depth == 0 and deepest <= 8


def variables(text):
  """Names in `text`, with subscripts and primes, but for functions and constants."""
  return {(match[1], _below(match), match[4]) for match in _NAME.finditer(text)
          if _is_name(match[1])} - {("e", "", ""), ("i", "", "")}
