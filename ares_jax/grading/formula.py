"""What of LaTeX the symbolic parser may see, and its comparison of two formulas."""

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
# None of them is in _COMMANDS, so no text has them.
_SPARE = tuple(f"\\{name} " for name in "zeta xi eta psi kappa tau nu chi".split())
_UNSAFE_POWER = re.compile(
  r"\^\s*\{?\s*[+-]?\s*[0-9]{4,}"  # x^{1000}
  r"|\^\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\^"  # a power of a power
  r"|\^\s*(?:\{[^{}]*\}|.)\s*\^"
  # (x^{999})^{999}; in 3^{999} x^{999} the second base is a bare letter or number.
  r"|\^\s*\{?\s*[+-]?\s*[0-9]{3}.*(?:[^0-9A-Za-z]|_\s*[0-9A-Za-z]+)"
  r"\^\s*\{?\s*[+-]?\s*[0-9]{3}"
)
# Of letters and of numbers below 100: 10^9 over 5 10^8 has 300 million digits.
_BINOMIAL = re.compile(
  r"\\binom\s*" + 2 * r"\{(?:[A-Za-z+\- ]|(?<![0-9])[0-9]{1,2}(?![0-9]))*\}"
)


def same_formula(answer, truth):
  """Whether math-verify finds two LaTeX formulas equal. No time limit, memory as it comes."""
  # Imported here: it takes half a second, and only a formula needs it.
  from math_verify import verify

  parsed = [_parse(text) for text in (truth, answer)]
  if not all(parsed):
    return False
  settled = _compare_values(parsed[0][0], parsed[1][0])
  if settled is not None:
    return settled
  # Rounded at 6 digits, its default, 1.414214 would be the square root of 2.
  return bool(verify(*parsed, float_rounding=12, timeout_seconds=None))


def _compare_values(truth, answer):
  """Whether two expressions are equal as far as their values at a point tell; None is unsettled.

  A wrong answer is settled here in 1 ms, where simplifying the difference takes 8. So is all that
  is infinite: sympy's assumptions contradict each other there, and which wins is left to chance
  (of 20,000 tries oo oo - 7919 was zero in 156).
  """
  import sympy

  if not (isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr)):
    return None
  names = sorted(truth.free_symbols | answer.free_symbols, key=str)
  point = {name: sympy.Float(0.37 + 0.29 * place) for place, name in enumerate(names)}
  try:
    values = [side.subs(point).evalf(15) for side in (truth, answer)]
    if any(value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for value in values):
      return truth == answer
    first, second = map(complex, values)
    apart = abs(first - second) > 1e-6 * max(abs(first), abs(second), 1e-3)
  except (TypeError, ValueError, ArithmeticError):  # 6^{999} is too large for a float
    return None
  return False if apart else None


# A truth comes back with every sample of its prompt, and reading it is half of a comparison.
@functools.lru_cache(maxsize=4096)
def _parse(text):
  from latex2sympy2_extended import NormalizationConfig
  from math_verify import LatexExtractionConfig, parse

  # It warns at every call without its own time limit, which works in main threads only.
  logging.getLogger("math_verify").setLevel(logging.CRITICAL)
  # Only its LaTeX grammar: the plain-expression reader is sympy's, which executes what it reads.
  # Units are cut before; left to it, the h of 2h is an hour and goes.
  cleaning = NormalizationConfig(units=False, malformed_operators=True, nits=True)
  config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=cleaning)]
  text = _without_capitals(text)
  parsed = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
  return [_with_imaginary_unit(expression) for expression in parsed]


def _without_capitals(text):
  """ "R - r" with another letter for R, as math-verify reads both as r, E as e and I as i."""
  names = variables(text) | {"e", "i"}
  capitals = sorted(name for name in names if name.isupper() and name.lower() in names)
  spare = dict(zip(capitals, _SPARE, strict=False))
  return re.sub(r"\\[A-Za-z]+|[A-Z]", lambda found: spare.get(found[0], found[0]), text)


def _with_imaginary_unit(expression):
  """`expression` with sympy's own i: math-verify reads a letter, real here and not there."""
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
