"""Finds the regular expressions of modules, and the texts on which one takes the longest.

A pattern is slow on a text that repeats what one of its loops takes, behind what leads to the loop
and before something that ends in failure. `attacks` makes such texts from the pattern itself.
"""

import ast
import builtins
import collections
import contextlib
import functools
import importlib
import inspect
import itertools
import random
import re
import re._constants as op
import re._parser as parser
import signal
import time

LENGTH = 256  # characters of the texts, as many as an answer may have
_ENDS = ("", "!")
_PIECES = 16  # texts made for a loop
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


class Slow(Exception):
  """A text took longer than allowed."""


def of_module(name, **local):
  """{source text: pattern} of all calls `re.f(pattern, ...)` in a module, and of its tables.

  `local` gives values to names inside functions that patterns are made of; others are "x".
  """
  module = importlib.import_module(name)
  names = collections.defaultdict(lambda: "x", vars(builtins) | vars(module) | local)
  found = {}
  for node in ast.walk(ast.parse(inspect.getsource(module))):
    if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
        and node.func.attr not in ("escape", "Pattern")):
      expression = ast.Expression(node.args[0])
      value = eval(compile(expression, name, "eval"), {}, names)
      if isinstance(value, str):
        flags = re.IGNORECASE if "IGNORECASE" in ast.unparse(node) else 0
        found[f"{name}: {ast.unparse(node.args[0])}"] = re.compile(value, flags)
  known = {pattern.pattern for pattern in found.values()}
  return found | {f"{name}: {pattern.pattern}": pattern for pattern in
                  _compiled(vars(module).values()) if pattern.pattern not in known}


def _compiled(values):
  """The patterns among values, and in tuples, lists and dicts among them."""
  for value in values:
    if isinstance(value, re.Pattern):
      yield value
    elif isinstance(value, tuple | list):
      yield from _compiled(value)
    elif isinstance(value, dict):
      yield from _compiled(value.values())


def attacks(pattern, length=LENGTH):
  """Texts of at most `length` characters on which the pattern may take long."""
  for lead, bodies in _loops(pattern):
    for piece in bodies | {"".join(pair) for pair in itertools.permutations(sorted(bodies)[:3], 2)}:
      for end in _ENDS:
        yield lead + piece * ((length - len(lead) - len(end)) // len(piece)) + end


def pieces(pattern):
  """Texts that the loops of a pattern take once."""
  return set().union(*(bodies for _, bodies in _loops(pattern)))


def longest(pattern, seconds, length=LENGTH):
  """(CPU seconds, text) of the slowest attack; stops at one that takes longer than `seconds`."""
  worst = (0.0, "")
  for text in dict.fromkeys(attacks(pattern, length)):
    for search in (pattern.fullmatch, pattern.search):
      took = cpu_seconds(lambda search=search, text=text: search(text), seconds)
      worst = max(worst, (took, text))
      if took > seconds:
        return worst
  return worst


def cpu_seconds(function, limit):
  """CPU seconds that `function` takes, the less of two where it is above `limit`; 4 limits at most.

  The matcher of `re` looks for signals, so even an exponential pattern is ended.
  """
  took = _cpu_seconds(function, limit)
  return took if took <= limit else min(took, _cpu_seconds(function, limit))


def _cpu_seconds(function, limit):
  def stop(*_):
    raise Slow

  before = signal.signal(signal.SIGVTALRM, stop)
  began = time.process_time()
  signal.setitimer(signal.ITIMER_VIRTUAL, 4 * limit)
  try:
    with contextlib.suppress(Slow):
      function()
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)
  return time.process_time() - began


def _loops(pattern):
  """[(text before, set of texts of the body)] of the loops of a pattern."""
  generator = random.Random(pattern.pattern)
  found = []

  def walk(tree, lead):
    for code, value in tree:
      for inside in _inside(code, value):
        if code in _REPEATS and value[1] > 2:
          found.append((lead, {_text(inside, generator) for _ in range(_PIECES)} - {""}))
        walk(inside, lead)
      lead += _text([(code, value)], generator)

  walk(parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE), "")
  return found


def _inside(code, value):
  """The parsed patterns inside one item of a parsed pattern."""
  if code in _REPEATS:
    return [value[2]]
  if code is op.BRANCH:
    return value[1]
  if code is op.SUBPATTERN:
    return [value[-1]]
  if code is op.ATOMIC_GROUP:
    return [value]
  return [value[1]] if code in (op.ASSERT, op.ASSERT_NOT) else []


def _text(tree, generator):
  """A text that a parsed pattern takes, but for what it looks at behind and ahead."""
  text = ""
  for code, value in tree:
    if code in _REPEATS:
      count = generator.choice([value[0], max(value[0], 1), min(value[0] + 2, value[1])])
      text += "".join(_text(value[2], generator) for _ in range(count))
    elif code in (op.LITERAL, op.NOT_LITERAL, op.IN, op.ANY):
      text += generator.choice(_characters(code, value))
    elif code not in (op.ASSERT, op.ASSERT_NOT) and (inside := _inside(code, value)):
      text += _text(generator.choice(inside), generator)
  return text


def _characters(code, value):
  """Characters that a set takes, up to six."""
  if code is op.ANY:
    return "a{"
  if code in (op.LITERAL, op.NOT_LITERAL):
    return chr(value) if code is op.LITERAL else "ab"["a" == chr(value)]
  likely = itertools.chain(" a1,.({A-xB=\\", filter(str.isprintable, map(chr, range(33, 0x2500))))
  found = list(itertools.islice(filter(functools.partial(_takes, value), likely), 6))
  return found or [chr(value[0][1][0] if value[0][0] is op.RANGE else value[0][1])]


def _takes(items, letter):
  """Whether a set takes a character."""
  found = False
  for code, value in items:
    if code is op.LITERAL:
      found |= chr(value) == letter
    elif code is op.RANGE:
      found |= value[0] <= ord(letter) <= value[1]
    elif code is op.CATEGORY:
      name = str(value).removeprefix("CATEGORY_")
      taken = {"SPACE": str.isspace, "DIGIT": str.isdigit,
               "WORD": lambda c: c.isalnum() or c == "_"}[name.removeprefix("NOT_")](letter)
      found |= taken != name.startswith("NOT_")
  return found != (items[0][0] is op.NEGATE)
