"""Whether an answer is the truth, as a careful person would say it.

The truth decides the kind: option letters, yes or no, number with unit, collection (set, tuple,
interval), words, formula. Each kind has its own comparison and the first that applies is final;
only formulas reach the symbolic parser (math-verify), which takes anagrams of words for equal
products of letters. No tolerance: 0.33 is not 1/3.
"""

import logging
import re
import unicodedata

from ares_jax.data import quantity

MAX_LENGTH = 256  # characters of an answer; nothing longer is compared but by equality

_CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full width -> ASCII
_CHARACTERS |= str.maketrans({
  "−": "-", "–": "-", "—": "-", "‐": "-", "\u2011": "-", "\u00a0": " ", "\u2009": " ",
  "\u202f": " ", "\u3000": " ", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ",
  "√": "\\sqrt ", "∞": "\\infty ", "∪": "\\cup ", "±": "\\pm ", "≤": "\\le ", "≥": "\\ge ",
  "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
  "Ω": "\\Omega ", "º": "°", "’": "'", "“": '"', "”": '"',
})  # fmt: skip
_TEXT = re.compile(
  r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
  r"\s*\{([^{}]*)\}"
)
_NUMBER_WORDS = {
  word: str(number)
  for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty".split()
  )
}
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "infty"}
_COMMANDS = _FUNCTIONS | {
  "frac", "cdot", "times", "div", "pm", "mp", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
  "cup", "cap", "in", "le", "ge", "leq", "geq", "ne", "neq", "lt", "gt", "Omega", "alpha", "beta",
  "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho", "varphi", "emptyset",
}  # fmt: skip
_FUNCTION = re.compile(r"\\[A-Za-z]+|" + "|".join(sorted(_FUNCTIONS, key=len, reverse=True)))
_NAMED = re.compile(
  r"([A-Za-z](?:_\{?\w\}?)?|\\[a-z]+|[A-Za-z]\([a-z]\))\s*(?:=|\\in\b)\s*(.+)"
)
_ARITHMETIC = re.compile(r"[0-9A-Za-z)}]\s*[-+*(]|\)\s*[0-9A-Za-z\\]|\\(?:times|cdot|div|pm|mp)\b")
_UNSAFE_POWER = re.compile(
  r"\^\s*\{?\s*[+-]?\s*[0-9]{4,}"  # x^{1000}
  r"|\^\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\^"  # a power of a power
  r"|\^\s*(?:\{[^{}]*\}|.)\s*\^"
)


def same_answer(answer, truth, symbolic=None):
  """Whether `answer` says the same as `truth`.

  Args:
    answer: str, what stands in the box; None (no box) is never right.
    truth: str, or a list or tuple of accepted ones.
    symbolic: function (answer, truth) -> bool for two formulas; None is `same_formula`, which has
      no time limit: grade what a model wrote with `grade.GradingPool`.

  Raises:
    ValueError: a truth is not a string or is empty.
  """
  truths = truth if isinstance(truth, list | tuple) else (truth,)
  for accepted in truths:
    if not isinstance(accepted, str) or not accepted.strip():
      raise ValueError(f"truth {accepted!r} is not a text; the data must give the right answer")
  if answer is None or not answer.strip():
    return False
  symbolic = same_formula if symbolic is None else symbolic
  return any(_same_text(answer, accepted, symbolic) for accepted in truths)


def normalise(text):
  """`text` without what only changes its look: math delimiters, spacing, text commands."""
  text = text.translate(_CHARACTERS).strip()
  for _ in range(4):  # \boxed inside $...$ inside \text: a few layers are all that is met
    before = text = text.rstrip(" .") or text
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
      inner = text[len(left) : len(text) - len(right)]
      if len(text) > len(left + right) and text == left + inner + right and left not in inner:
        text = inner.strip()
    text = _unbox(text)
    text = _TEXT.sub(r" \1", text).strip()  # 5\text{m} is a unit, 5m a product
    if text == before:
      break
  text = re.sub(r"\\[dtc]frac\b", r"\\frac", text)
  text = re.sub(r"\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])", "", text)
  text = re.sub(r"(?<=[0-9])(?:\\[,!]|\{,\}(?=[0-9]))+(?=[0-9])", _join_digits, text)
  text = re.sub(r"^([+-]?[0-9]{1,3})((?: [0-9]{3})+)(?! ?[0-9/])", _join_thousands, text)
  text = re.sub(r"\\[,;:! ]|\\quad\b|\\qquad\b|~", " ", text)
  text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|\\textdegree\b", "°", text)
  text = re.sub(r"\\([%$#&])", r"\1", text)
  text = re.sub(r"\\leq\b", r"\\le", re.sub(r"\\geq\b", r"\\ge", text))
  text = " ".join(text.split())
  return text


def same_formula(answer, truth):
  """Whether math-verify finds two LaTeX formulas equal. No time limit, memory as it comes."""
  # Imported here: it takes half a second, and only a formula needs it.
  from math_verify import LatexExtractionConfig, parse, verify

  # It warns at every call without its own time limit, which works in main threads only.
  logging.getLogger("math_verify").setLevel(logging.CRITICAL)
  # Only its LaTeX grammar: the plain-expression reader is sympy's, which executes what it reads.
  config = [LatexExtractionConfig(boxed_match_priority=-1)]
  parsed = [
    parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    for text in (truth, answer)
  ]
  if not all(parsed):
    return False
  # Rounded at 6 digits, its default, 1.414214 would be the square root of 2.
  return bool(verify(*parsed, float_rounding=12, timeout_seconds=None))


def _same_text(answer, truth, symbolic):
  if answer.strip() == truth.strip():
    return True
  if len(answer) > MAX_LENGTH or len(truth) > MAX_LENGTH or _has_control(answer):
    return False
  return _same(normalise(answer), normalise(truth), symbolic, depth=0)


def _same(answer, truth, symbolic, depth):
  """The layers, on normalised texts; `depth` counts collections inside collections."""
  if answer and _tight(answer) == _tight(truth):
    return True
  if depth > 2:
    return False
  if depth == 0:
    verdict = _same_option(answer, truth, symbolic)
    if verdict is not None:
      return verdict
    verdict = _same_yes_no(answer, truth)
    if verdict is not None:
      return verdict
  answer, truth = _spelled(answer), _spelled(truth)
  answer, truth = _without_name(answer, truth, depth)
  read_answer, read_truth = quantity.read(answer), quantity.read(truth)
  if read_answer and read_truth:
    return quantity.same(read_answer, read_truth)
  # "4+4" restates the question whose answer is 8; "3-1" as a truth is a score or a range.
  if (read_truth and _ARITHMETIC.search(answer)) or re.fullmatch(r"[0-9]+( ?- ?[0-9]+)+", truth):
    return False
  parts_answer = None if read_answer else _collection(answer)  # 1,234 is no list
  parts_truth = None if read_truth else _collection(truth)
  if parts_answer and parts_truth:
    return _same_collection(parts_answer, parts_truth, symbolic, depth)
  if _is_words(truth) or _is_words(answer):
    return _words(answer) == _words(truth) and _words(truth) != ""
  if parts_answer or parts_truth:
    return False
  return _same_formula_with_unit(answer, truth, symbolic)


def _same_formula_with_unit(answer, truth, symbolic):
  answer, truth = _cut_unit(answer), _cut_unit(truth)
  if answer[1] and truth[1] and answer[1] != truth[1]:
    return False
  answer, truth = answer[0], truth[0]
  if not (_is_safe(answer) and _is_safe(truth)) or answer.count("=") != truth.count("="):
    return False
  # Letters alone name a thing: the segment AB, not a product. Nor may an answer bring its own
  # variables (5 + 0x), and X is not x, though math-verify says so.
  if re.fullmatch(r"[A-Za-z' ]*", truth) or _variables(answer) != _variables(truth):
    return False
  return symbolic(answer, truth)


def _same_option(answer, truth, symbolic):
  """Truth "B", "(B)" or "B. 12": the letter decides; None when the truth is no option."""
  letters = re.fullmatch(r"[A-J](?:\s*(?:,|and|&)\s*[A-J])+", truth)
  if letters:
    found = re.fullmatch(r"\(?[A-J]\)?(?:\s*(?:,|and|&|\s)?\s*\(?[A-J]\)?)*", answer)
    return bool(found) and set(re.findall(r"[A-J]", answer)) == set(re.findall(r"[A-J]", truth))
  option = re.fullmatch(r"\(([A-Ja-j])\)\s*(.*)|([A-J])(?:[.:)]\s*(.*))?", truth)
  said = re.fullmatch(r"\(([A-Ja-j])\)\s*(.*)|([A-Ja-j])(?:[.:)]\s*(.*))?",
                      re.sub(r"^(?:option|choice)\s+", "", answer, flags=re.I))  # fmt: skip
  if option is None:
    # A truth that is an option's text: "C. 12" says 12.
    if said and (said[2] or said[4]) and not (said[3] or "A").islower():
      return _same(said[2] or said[4], truth, symbolic, depth=1) or None
    return None
  letter, text = (option[1] or option[3]).upper(), (option[2] or option[4] or "").strip()
  if said is None:
    return _same(answer, text, symbolic, depth=1) if text else False
  if (said[1] or said[3]).upper() != letter:
    return False
  said_text = (said[2] or said[4] or "").strip()
  return not (said_text and text) or _same(said_text, text, symbolic, depth=1)


def _same_yes_no(answer, truth):
  """Truth yes, no, true or false; "Yes, it is" says yes. None when the truth is none of them."""
  wanted = truth.lower()
  if wanted not in ("yes", "no", "true", "false"):
    return None
  words = re.findall(r"[a-z]+", answer.lower())
  said = [word for word in words if word in ("yes", "no", "not", "true", "false")]
  first = re.match(r"[a-z]+(?=$|[.,;:!])", answer.lower())
  return said == [wanted] and first is not None and first[0] == wanted


def _tight(text):
  """`text` without the spaces that mean nothing: "1 1/2" is not 11/2, "1, 234" not 1,234."""
  if re.search(r"[0-9], [0-9]{3}(?![0-9])", text):
    return text
  return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def _spelled(text):
  word = text.lower()
  return _NUMBER_WORDS[word] if word in _NUMBER_WORDS else re.sub(r"^(?:\\approx|≈)\s*", "", text)


def _without_name(answer, truth, depth):
  """Drops "x =" where both sides have the same name, or only one has and is no part of a list."""
  said, wanted = _named(answer), _named(truth)
  if said and wanted:
    if said[1] == wanted[1]:
      return _without_repeats(said), _without_repeats(wanted)
  elif depth == 0 and (said or wanted) and not re.search(
    r"=|<|>|\\le\b|\\ge\b", truth if said else answer
  ):
    return (_without_repeats(said), truth) if said else (answer, _without_repeats(wanted))
  return answer, truth


def _named(text):
  """Match of "x = ..." where x is the only name in `text`; else None."""
  match = _NAMED.fullmatch(text)
  names = set(re.findall(r"([^\s,;=]+)\s*=", text))
  return match if match and len(names) <= 1 else None


def _without_repeats(match):
  """ "x = 1 or x = 2" -> "1 or 2"."""
  return re.sub(rf"(?<![A-Za-z\\]){re.escape(match[1])}\s*=\s*", "", match[2])


def _is_words(text):
  """Whether `text` is language: letters in a row that are neither LaTeX nor a function."""
  bare = re.sub(r"\\[A-Za-z]+", " ", text)
  # Two letters beside digits or signs are a product: 4ac.
  least = 3 if re.search(r"[0-9+*/^=<>]|\\[A-Za-z]", text) else 2
  runs = re.findall(rf"[^\W\d_]{{{least},}}", bare)
  return any(run.lower() not in _FUNCTIONS for run in runs)


def _variables(text):
  return set(re.findall(r"[A-Za-z]", _FUNCTION.sub(" ", text))) - {"e", "i"}


def _cut_unit(text):
  """(formula, unit) of "2\\sqrt{3} cm"; the unit is None where none is written."""
  match = re.fullmatch(r"(.*(?:[})0-9]|\\pi))\s*((?:[A-Za-z]{2}|[°%]).*)", text)
  unit = quantity.read(f"1 {match[2]}") if match else None
  return (match[1], (unit.unit, unit.size)) if unit else (text, None)


def _words(text):
  text = re.sub(r"[\s_]+", " ", text.casefold()).strip(" .,;:!?\"'")
  return re.sub(r"^(?:the|an|a) ", "", text)


def _collection(text):
  """(kind, items): kind is "list" (bare or in braces), the two brackets, or "union"; or None."""
  parts = _split(text, (r"\cup",))
  if len(parts) > 1:
    return "union", parts
  if text.startswith(("\\pm", "+-")):
    rest = re.sub(r"^(?:\\pm|\+-)\s*", "", text)
    return ("list", [rest, f"-{rest}"]) if re.fullmatch(r"[0-9./]+|\\frac.*", rest) else None
  for left, right in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
    if text.startswith(left) and text.endswith(right) and _closes_at_end(text, left):
      items = _split(text[len(left) : len(text) - len(right)], (",", ";"))
      if "{" in left:
        return "list", items
      return (left + right, items) if len(items) > 1 else None
  items = _split(text, (",", ";", " or ", " and "))
  return ("list", [item for item in items if item]) if len(items) > 1 else None


def _same_collection(answer, truth, symbolic, depth):
  if answer is None or truth is None or answer[0] != truth[0] or len(answer[1]) != len(truth[1]):
    return False
  if truth[0] not in ("list", "union"):
    return all(
      _same(a, t, symbolic, depth + 1) for a, t in zip(answer[1], truth[1], strict=True)
    )
  if len(truth[1]) > 24:
    return False
  left = list(truth[1])
  for item in answer[1]:
    found = [i for i, wanted in enumerate(left) if _same(item, wanted, symbolic, depth + 1)]
    if not found:
      return False
    left.pop(found[0])
  return True


def _split(text, separators):
  """`text` cut at separators that stand outside all brackets; "and" after a comma joins it."""
  parts, depth, start, position = [], 0, 0, 0
  while position < len(text):
    if text[position] in "([{":
      depth += 1
    elif text[position] in ")]}":
      depth -= 1
    elif depth == 0:
      hit = [word for word in separators if text.startswith(word, position)]
      if hit:
        parts.append(text[start:position].strip())
        position += len(hit[0])
        start = position
        continue
    position += 1
  parts.append(re.sub(r"^(?:and|or)\s+", "", text[start:].strip()) if parts else text.strip())
  return [part for part in parts if part] if len(parts) > 1 else parts


def _closes_at_end(text, left):
  """Whether the bracket that `text` starts with is the one that ends it."""
  depth = 0
  for position, letter in enumerate(text):
    if letter in "([{":
      depth += 1
    elif letter in ")]}":
      depth -= 1
    if depth == 0 and position >= len(left) - 1:
      return position == len(text) - 1
  return False


def _is_safe(text):
  """Whether the symbolic parser may see `text`: short, known commands, small powers."""
  if not re.fullmatch(r"[A-Za-z0-9+\-*/^_()\[\]{},.=<>|\\ '°%]+", text):
    return False
  if any(command not in _COMMANDS for command in re.findall(r"\\([A-Za-z]*)", text)):
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


def _has_control(text):
  """Whether there are control, invisible or direction marks: they make a text look like another."""
  hidden = ("Cc", "Cf", "Co", "Cs")
  return any(unicodedata.category(c) in hidden and c not in "\n\t\r" for c in text)


def _unbox(text):
  match = re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, flags=re.DOTALL)
  if match and _closes_at_end(text[text.index("{") :], "{"):
    return match[1].strip()
  # Some data sets lost the closing brace of their answer's box.
  match = re.fullmatch(r"\\boxed\s*\{([^{}]*)", text)
  return match[1].strip() if match else text


def _join_thousands(match):
  return match[0].replace(" ", "")


def _join_digits(match):
  return "," if "," in match[0] and "{" in match[0] else ""
