"""Normalises how a text is written: delimiters, spacing, characters."""

import functools
import re
import unicodedata

from ares_jax.grading.collection import closes_at_end

_CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full width -> ASCII
_CHARACTERS |= str.maketrans({
  "−": "-", "–": "-", "—": "-", "‐": "-", "\u2011": "-", "\u00a0": " ", "\u2009": " ",
  "\u202f": " ", "\u3000": " ", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ",
  "√": "\\sqrt ", "∞": "\\infty ", "∪": "\\cup ", "±": "\\pm ", "≤": "\\le ", "≥": "\\ge ",
  "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
  "Ω": "\\Omega ", "º": "°", "’": "'", "“": '"', "”": '"',
  "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "θ": "\\theta ",
  "λ": "\\lambda ", "μ": "\\mu ", "µ": "\\mu ", "ρ": "\\rho ", "σ": "\\sigma ", "φ": "\\phi ",
  "ω": "\\omega ", "∠": "\\angle ", "△": "\\triangle ", "∥": "\\parallel ", "⊥": "\\perp ",
  "≈": "\\approx ", "≠": "\\ne ", "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}",
  "℃": "°C", "。": ".",
})  # fmt: skip
_SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_ARGUMENT = r"(?:\{[^{}]*\}|[0-9A-Za-z])"
_TEXT = re.compile(
  r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
  r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
# Between values: or, and, a comma.
_CHINESE_WORD = re.compile(r" ?(?:(或者?)|(以?及|和|与)|、) ?")
_ELLIPSIS = re.compile(r" ?(?:\.{3,}|…|\\[lcv]?dots(?![a-z])|\betc\b\.?|, ?and so on\b)")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_SAME_COMMANDS = dict.fromkeys("left right displaystyle big Big rm bf".split(), "") | {
  "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom",
  "tbinom": r"\binom", "leq": r"\le", "geq": r"\ge", "leqslant": r"\le", "geqslant": r"\ge",
  "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "colon": ":", "lg": r"\log_{10}",
  "quad": " ", "qquad": " ", "degree": "°", "textdegree": "°",
}  # fmt: skip
# Replaced in this order.
_WRITINGS = tuple((re.compile(pattern), new) for pattern, new in (
  (r"^\*\*([^*]+)\*\*$", r"\1"),
  (r"\\frac ?([0-9]|\\pi)", r"\\frac{\1}"),  # \frac12
  (r"\\sqrt ?\(([^()]+)\)", r"\\sqrt{\1}"),  # √(3)
  (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
  (r"(?<=[0-9])\{,\}(?=[0-9])", ","),  # 10{,}236
  (r"(?<=[0-9]),\\! *(?=[0-9]{3}(?![0-9]))", ","),  # MATH's 10,\!236
  (r"(?<=[0-9])(?:\\[,!])+(?=[0-9])", ""),  # 10\,236
  (r"^[+-]?[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9/])", lambda number: number[0].replace(" ", "")),
  (r"(?<!\\)\\[,;:! ]|~", " "),
  (r"\^\s*\{?\s*(?:\\circ|o(?![a-z]))\s*\}?", "°"),
  (r"\\([%$#&])", r"\1"),
  (r"\^ ?(?:\{ ?\\prime ?\}|\\prime(?![a-z]))", "'"),
  (r"(?<![\\^_}\]A-Za-z])(?<!_[0-9])\{ ?([A-Za-z]+) ?\}", r" \1"),  # 4{cm}
  (rf"(\^{_ARGUMENT})(_{_ARGUMENT})", r"\2\1"),  # v^2_0
  (r"(?<=[)\]]) ?(or|and) ?(?=[(\[])", r" \1 "),
  (r"<=", r"\\le "), (r">=", r"\\ge "), (r"\+/-", r"\\pm "),
  (r"^([0-9]{1,2}:[0-9]{2}) *([APap])\.? ?[Mm]$", lambda time: f"{time[1]} {time[2].lower()}m"),
  (r"(?<=[①-⑳])[\s,;]*(?:and\s)?\s*(?=[①-⑳])", ""),
  (r"\s+", " "), (r"^ | $", ""),
  # Complete texts: sets and values in words or in other symbols.
  (r"(?i)^(?:\\varnothing|\\\{ ?\\\}|no solutions?)$", r"\\emptyset"),
  # The name stays: x in R is not y in R.
  (r"(?i)^([a-z] ?\\in ?(?=\\))?(?:\\mathbb ?(?:R|\{ ?R ?\})|all real numbers)$",
   r"\1(-\\infty, \\infty)"),
  (r"(?i)^(-?) ?infinity$", r"\1\\infty"),
))  # fmt: skip


@functools.lru_cache(maxsize=8192)
def normalise(text):
  """`text` in one notation: without math delimiters, spacing and text commands."""
  text = with_plain_characters(text).strip()
  text = _CHINESE_WORD.sub(
    lambda word: " or " if word[1] else " and " if word[2] else ", ", text)
  if "\\begin" not in text:
    text = re.sub(r"\\\\(?=[A-Za-z]{2}|[^\w\s])", r"\\", text)  # \\frac: a file escapes twice
  text = _said_once(_ELLIPSIS.sub(r" \\dots ", text))
  for _ in range(4):  # \boxed inside $...$ inside \text: a few layers occur
    before = text = text.rstrip(" .,;\\") or text
    text = _unbox(_without_delimiters(text).strip())
    text = _TEXT.sub(r" \1", text).strip()  # 5\text{m} is a unit, 5m a product
    if text == before:
      break
  text = _COMMAND.sub(lambda command: _SAME_COMMANDS.get(command[1], command[0]), text)
  for pattern, new in _WRITINGS:
    text = pattern.sub(new, text)
  return text


def with_plain_characters(text):
  """`text` with LaTeX or ASCII for the characters that stand for it: × √ ² ５."""
  return re.sub("[⁰¹²³⁴-⁹⁺⁻]+|[₀-₉]+", _lower, text.translate(_CHARACTERS))


@functools.lru_cache(maxsize=8192)
def tight(text):
  """`text` without the spaces that have no meaning: "1 1/2" is not 11/2, "1, 234" not 1,234."""
  if re.search(r"[0-9], [0-9]{3}(?![0-9])", text):
    return text
  text = re.sub(r"_(?:([0-9])|\{([0-9]+)\})", r"_\1\2", text)  # 2516_{8}
  text = re.sub(r"(?<=[A-Za-z])_(?=[0-9])", "", text)  # H_2O
  text = re.sub(r"(?<=[0-9]) (?=[A-Za-z] [A-Za-z](?![A-Za-z]))", "", text)  # 2 m g is 2mg
  text = re.sub(r"(?<![A-Za-z])([A-Za-z]) (?=[A-Za-z](?![A-Za-z]))", r"\1", text)
  return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def without_hidden(text):
  """`text` without control characters and invisible ones, which make it look like another."""
  hidden = [c for c in set(text) - set("\n\t\r")
            if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs")]
  return text.translate(str.maketrans("", "", "".join(hidden))) if hidden else text


def _without_delimiters(text):
  """ "\\(12\\) cm" or "$12$ cm" as "12 cm"; in "$12 and $13" the signs mean a currency."""
  text = re.sub(r"(?<!\\)\\[()]|^\\\[|\\\]$", " ", text)
  parts = re.split(r"(?<!\\)\$\$?", text)
  inside, behind = parts[1::2], parts[2::2]
  is_whole = len(parts) == 3 and parts[0] == parts[2] == ""
  are_pairs = len(parts) % 2 and all(part and part == part.strip() for part in inside)
  are_pairs = are_pairs and not any(part[:1].isdigit() for part in behind)
  return " ".join(parts) if is_whole or are_pairs else text


def _unbox(text):
  match = re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, flags=re.DOTALL)
  if match and closes_at_end(text[text.index("{") :], "{"):
    return match[1].strip()
  # Some data sets lost the closing brace of their answer's box.
  match = re.fullmatch(r"\\boxed\s*\{([^{}]*)", text)
  return match[1].strip() if match else text


def _said_once(text):
  """The x of "x}. The answer is x", a response cut from its first box to its last brace."""
  depth = 0
  for match in re.finditer(r"\\.|[{}]", text):
    depth += (match[0] == "{") - (match[0] == "}")
    if depth < 0:
      once, rest = text[: match.start()], text[match.end() :] + "}"
      again = re.fullmatch(rf"[A-Za-z .,:;{{\\$]*{re.escape(once)}\}}?", rest)
      return once if again and re.search(r"[0-9\\]", once) else text
  return text


def _lower(match):
  """ "²" -> "^2", "¹²" -> "^{12}", "₁" -> "_1"."""
  sign, digits = "_" if "₀" <= match[0] else "^", match[0].translate(_SMALL)
  return f"{sign}{digits}" if len(digits) == 1 else f"{sign}{{{digits}}}"
