"""Splits sets, lists, tuples, intervals, unions and matrices into their items, as texts."""

import itertools
import re

_MATRIX = re.compile(r"\\begin\{([pb]?matrix|vmatrix)\}(.*)\\end\{\1\}")
_ARRAY = re.compile(r"[(\[] ?\\begin\{array\} ?\{[clr| ]*\}(.*)\\end\{array\} ?[)\]]")
_RELATION = r" ?(<|>|\\le(?![a-z])|\\ge(?![a-z])) ?"
_BOUND = r"([^<>,;=]+?)"
_UNKNOWN = r"([A-Za-z](?: ?\([a-z]\))?|\\theta|\\alpha)"  # x, f(x)
_CHAIN = re.compile(rf"(?:{_BOUND}{_RELATION})?{_UNKNOWN}(?:{_RELATION}{_BOUND})?")
_BUILDER = re.compile(r"\\\{ ?([a-z]) ?(?:\||:|\\mid(?![a-z])) ?((?=.*\1)[^{}|:]+)\\\}")
_MIRROR = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def parse_collection(text):
  """(kind, items) of a normalised text, or None where it is not a collection.

  The kind is "list" (bare or in braces; order does not matter), "union", "matrix R x C" (round or
  square, its cells by row), "determinant R x C", or the two brackets of a tuple or interval.
  """
  if match := _MATRIX.fullmatch(text) or _ARRAY.fullmatch(text):
    rows = [[cell.strip() for cell in row.split("&")]
            for row in match[match.lastindex].split("\\\\") if row.strip()]
    name = "determinant" if match[1] == "vmatrix" else "matrix"
    columns = "/".join(str(len(row)) for row in rows)
    return f"{name} {columns}", [cell for row in rows for cell in row]
  parts = split_items(text, (r"\cup",))
  if len(parts) > 1:
    return "union", parts
  is_one = len(split_items(text, (",", ";"))) == 1 and not text.startswith("\\{")
  if is_one and text.count("\\pm") == 1:
    return "list", _with_both_signs([text])
  for left, right in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
    if text.startswith(left) and text.endswith(right) and closes_at_end(text, left):
      items = split_items(text[len(left) : len(text) - len(right)], (",", ";"))
      if "{" in left:
        return "list", _with_both_signs(items)
      return (left + right, items) if len(items) > 1 else None
  items = split_items(text, (",", ";", " or ", " and "))
  return ("list", _with_both_signs(item for item in items if item)) if len(items) > 1 else None


def _with_both_signs(items):
  """The items, with "1 \\pm a" as two items, one for each sign."""
  every = []
  for item in items:
    both = [item.replace("\\pm", sign).strip() for sign in "+-"]
    every.extend(both if item.count("\\pm") == 1 else [item])
  return every


def parse_inequality(text):
  """(variable, interval as text) of "-2 < x \\le 7", "x > 2" or "x < 1 or x > 2"; else None."""
  if not any(relation in text for relation in _MIRROR):
    return None
  if match := _BUILDER.fullmatch(text):  # \{x | x > 2\}
    text = match[2].strip()
  parts = [_interval(part) for part in split_items(text, (" or ",))]
  if None in parts or len({name for name, _ in parts}) != 1:
    return None
  return parts[0][0], " \\cup ".join(interval for _, interval in parts)


def _interval(text):
  """(variable, interval) of a chain "low < x < high"; an end that is not written is infinite."""
  match = _CHAIN.fullmatch(text)
  if match is None:
    return None
  low, first, name, second, high = match.groups()
  rising = {relation in ("<", "\\le") for relation in (first, second) if relation}
  if len(rising) != 1:
    return None
  if rising == {False}:
    low, first, second, high = high, _MIRROR.get(second), _MIRROR.get(first), low
  low, high = low or "-\\infty", high or "\\infty"
  left, right = "[" if first == "\\le" else "(", "]" if second == "\\le" else ")"
  return name, f"{left}{low}, {high}{right}"


def split_items(text, separators):
  """`text` split at separators outside all brackets; ", and" is one separator."""
  parts = []
  depth = start = position = 0
  while position < len(text):
    depth += (text[position] in "([{") - (text[position] in ")]}")
    hit = [word for word in separators if depth == 0 and text.startswith(word, position)]
    if hit:
      parts.append(text[start:position].strip())
      start = position + len(hit[0])
    position = start if hit else position + 1
  parts.append(re.sub(r"^(?:and|or)\s+", "", text[start:].strip()) if parts else text.strip())
  return [part for part in parts if part] if len(parts) > 1 else parts


def pair_up(items, others, same):
  """Whether each of `items` is the `same` as one of `others` that no item before it has taken."""
  left = list(others)
  for item in items:
    found = [index for index, other in enumerate(left) if same(item, other)]
    if not found:
      return False
    left.pop(found[0])
  return True


def closes_at_end(text, left):
  """Whether the bracket that `text` starts with is the one that ends it."""
  *inside, end = depths(text)[len(left) - 1 :]
  return end == 0 and 0 not in inside


def depths(text):
  """How many brackets are open behind each letter of a text."""
  return list(itertools.accumulate((letter in "([{") - (letter in ")]}") for letter in text))
