"""Compares two formulas with math-verify, and decides which LaTeX its parser may see."""

import functools
import logging
import re

FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "infty"}
_COMMANDS = FUNCTIONS | {
  "frac", "binom", "cdot", "times", "div", "pm", "mp", "arcsin", "arccos", "arctan", "sinh", "cosh",
  "tanh", "cup", "cap", "in", "le", "ge", "leq", "geq", "ne", "neq", "lt", "gt", "Omega", "alpha",
  "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho", "varphi",
  "emptyset",
}  # fmt: skip
_FUNCTION = re.compile(r"\\[A-Za-z]+|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)))
# Letters that no text has: none of these commands is in _COMMANDS.
_SPARE = tuple(f"\\{name} " for name in "zeta xi eta psi kappa tau nu chi".split())
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
  return bool(verify(*parsed, float_rounding=12, timeout_seconds=None))


def _compare_values(truth, answer):
  """False where the values of two expressions differ at one point; None where that decides nothing.

  This takes 1 ms for a wrong answer, where simplifying the difference takes 8. Infinite values are
  compared as written: sympy's verdict on them is left to chance.
  """
  import sympy

  if not (isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr)):
    return None
  names = sorted(truth.free_symbols | answer.free_symbols, key=str)
  point = {name: sympy.Float(0.37 + 0.29 * index) for index, name in enumerate(names)}
  try:
    values = [side.subs(point).evalf(15) for side in (truth, answer)]
    if any(value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for value in values):
      return truth == answer
    first, second = map(complex, values)
    apart = abs(first - second) > 1e-6 * max(abs(first), abs(second), 1e-3)
  except (TypeError, ValueError, ArithmeticError):  # 6^{999} is too large for a float
    return None
  return False if apart else None


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
  parsed = parse(f"${_without_capitals(text)}$", config, fallback_mode="no_fallback",
                 parsing_timeout=None)
  return [_with_imaginary_unit(expression) for expression in parsed]


def _without_capitals(text):
  """ "R - r" with another letter for R: math-verify reads both as r, E as e and I as i."""
  names = variables(text) | {"e", "i"}
  capitals = sorted(name for name in names if name.isupper() and name.lower() in names)
  spare = dict(zip(capitals, _SPARE, strict=False))
  return re.sub(r"\\[A-Za-z]+|[A-Z]", lambda found: spare.get(found[0], found[0]), text)


def _with_imaginary_unit(expression):
  """`expression` with sympy's imaginary unit for the letter i, which math-verify reads."""
  import sympy

  if not isinstance(expression, sympy.Expr):
    return expression
  return expression.subs({name: sympy.I for name in expression.free_symbols if name.name == "i"})


def is_safe(text):
  """Whether the symbolic parser may see `text`: short, known commands, small powers."""
  if not re.fullmatch(r"[A-Za-z0-9+\-*/^_()\[\]{},.=<>|\\ '°%]+", text):
    return False
  if any(command not in _COMMANDS for command in re.findall(r"\\([A-Za-z]*)", text)):
    return False
  if text.count("\\binom") != len(_BINOMIAL.findall(text)):
    return False
  if re.search(r"[0-9]{21,}", text) or _UNSAFE_POWER.search(text):
    return False
  depth = deepest = 0
  for letter in text:
    depth += (letter in "({[") - (letter in ")}]")
    deepest = max(deepest, depth)
    if depth < 0:
      return False
  return depth == 0 and deepest <= 8


def variables(text):
  """Letters of `text` that are neither a function's nor a constant's."""
  return set(re.findall(r"[A-Za-z]", _FUNCTION.sub(" ", text))) - {"e", "i"}
