"""Compares two formulas with math-verify, and decides which LaTeX its parser may see."""

import functools
import logging
import re

from ares_jax.grading.collection import depths

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
_ALONE = re.compile(rf"-?(?:{_NAME.pattern}(?: ?\([^()]*\))?|\|?[A-Z]{{2,3}}\|?)")
_BRACKET = re.compile(r" ?(?:\^ ?(?:\{[^{}]*\}|[0-9]) ?)?\(")  # f(x), f^2(x)
# A name that may be an argument, as in \frac ab or \sqrt\alpha, needs braces.
_ARGUMENT = re.compile(r"(?<=[A-Za-z}]) ?(\\variable\{(?:[^{}]|\{[^{}]*\})*\})")
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
_DIGITS = 120  # to which values are computed where they nearly cancel


def same_formula(answer, truth):
  """Whether math-verify finds two LaTeX formulas equal. Has no limit of time or memory."""
  # Imported here: it takes half a second, and only a formula needs it.
  from math_verify import verify

  parsed = [_parse(text) for text in (truth, answer)]
  if not all(parsed):
    return False
  pair = parsed[0][0], parsed[1][0]
  verdict = _compare_equations(*pair) if "=" in answer else _compare_values(*pair)
  if verdict is not None:
    return verdict
  # Rounded at 6 digits, its default, 1.414214 would be the square root of 2.
  return bool(verify(*parsed, float_rounding=15, timeout_seconds=None))


def _compare_equations(truth, answer):
  """Whether one equation is a multiple of the other; None where that decides nothing.

  Polynomials that are no multiples of each other are zero at other points.
  """
  import sympy

  if not (isinstance(truth, sympy.Eq) and isinstance(answer, sympy.Eq)):
    return None
  sides = [_exact(equation.lhs - equation.rhs) for equation in (truth, answer)]
  if sides[0] == sides[1]:
    return True
  point = _point(sides, start=53, step=31)
  values = [side.subs(point) for side in sides]
  if not all(values):
    return None
  same = _compare_values(sides[0] * values[1], sides[1] * values[0])
  return same if same or all(side.is_polynomial() for side in sides) else None


def _compare_values(truth, answer):
  """Whether two expressions have the same values; None where that decides nothing.

  Decimals and fractions are exact: 3.14159265359 is not pi, 2^{100}-1 is not 2^{100}. Other values
  are compared to 70 digits. The values are those at a point of positive numbers and, where both
  are real there, at one of negative numbers. Infinite values are compared as written: sympy's
  verdict on them is left to chance.
  """
  import sympy

  if not (isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr)):
    return None
  if truth == answer:
    return True
  sides = [_exact(side) for side in (truth, answer)]
  if any(map(_is_infinite, sides)):
    return False
  if sides[0] == sides[1]:
    return True
  names = sides[0].free_symbols | sides[1].free_symbols
  points = [_point(sides, start=37, step=29), _point(sides, start=-113, step=-71)]
  for number, point in enumerate(points if names else points[:1]):
    try:
      values = [side.subs(point) for side in sides]
      computed = [value.evalf(30, maxn=_DIGITS) for value in values]
      if any(map(_is_infinite, computed)):
        return number > 0
      parts = [part for value in computed for part in value.as_real_imag()]
      if number and any(parts[1::2]):  # not real
        return True
      difference = values[0] - values[1]
      largest = max(map(abs, parts))
      if 0 < largest < 1e-60:  # it may be 0
        return sympy.simplify(difference) == 0
      if not difference.is_Rational:
        parts = difference.evalf(30, maxn=_DIGITS).as_real_imag()
        difference = max(map(abs, parts)) > 1e-70 * largest
      if difference:
        return False
    except (TypeError, ValueError, ArithmeticError, AttributeError):  # no number
      return None
  return True


def _point(sides, *, start, step):
  """{name: value} of the names of both sides, with values start/100, (start + step)/100 ..."""
  import sympy

  names = sorted(sides[0].free_symbols | sides[1].free_symbols, key=str)
  return {name: sympy.Rational(start + step * index, 100) for index, name in enumerate(names)}


def _is_infinite(expression):
  import sympy

  return expression.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


def _exact(expression):
  """`expression` in sympy's own order, with fractions for its decimals and a name for each f(x)."""
  import sympy

  def rebuild(part):
    if isinstance(part, sympy.Float):
      return sympy.Rational(str(part))
    if isinstance(part, sympy.core.function.AppliedUndef):
      return sympy.Symbol(str(part), real=True)
    return part.func(*part.args) if part.args else part

  return sympy.bottom_up(expression, rebuild, atoms=True)


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
  text = _ARGUMENT.sub(r"{\1}", _NAME.sub(_plain_name, text))
  parsed = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
  return [_with_imaginary_unit(expression) for expression in parsed]


def _plain_name(match):
  """ "R_{\\max}'" as "\\variable{x_{rcapmaxprime}}", which is one token to math-verify.

  It takes R for r and E for e, drops primes, and reads a subscript for 10 ms. A name before a
  bracket may be that of a function, for which its grammar has no such token.
  """
  letter, _, _, primes = match.groups()
  below = _below(match)
  if not _is_name(letter) or (letter in ("e", "i") and not below and not primes):
    return match[0]
  plain = letter.removeprefix("\\")
  tail = "cap" * plain[0].isupper() + below + "prime" * len(primes)
  tail = re.sub("[A-Z]", lambda capital: "cap" + capital[0].lower(), tail)
  name = f"x_{{{plain.lower()}{tail}}}" if tail else plain
  if not _BRACKET.match(match.string, match.end()):
    return f"\\variable{{{name}}}"
  return f"{name} " if tail else letter


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
  if re.search(r"[0-9]{21,}|[0-9}] ?_", text) or _UNSAFE_POWER.search(text):
    return False
  if _UNSAFE_RANGE.search(text):
    return False
  depth = depths(text)
  return depth[-1] == 0 <= min(depth) and max(depth) <= 8


def is_solved(text):
  """Whether one side of a relation is a name and no other has any: x = 2, -f(3) < 2, |AB| = 5."""
  sides = re.split(r" ?(?:[=<>]|\\[gln]eq?(?![a-z])) ?", text)
  named = [side for side in sides if variables(side)]
  return len(sides) > 1 and len(named) == 1 and bool(_ALONE.fullmatch(named[0]))


def variables(text):
  """Names in `text`, with subscripts and primes, but for functions and constants."""
  return {(match[1], _below(match), match[4]) for match in _NAME.finditer(text)
          if _is_name(match[1])} - {("e", "", ""), ("i", "", "")}
