"""What a compiled program moves: bytes over links and to and from memory, loops counted.

XLA's own cost analysis counts the body of a loop once. Here the text of a compiled program
(`compiled.as_text()`, of one device) is walked from its entry: a loop's body counts as often as it
runs, which its condition says where the compiler does not.
"""

import dataclasses
import math
import re

BITS = {"pred": 8, "token": 0, "opaque": 0}  # others carry their size in their name: bf16, s32
# Bytes a device sends in a ring of n, over the bytes it holds before (or, gathering, after).
SENT = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
  "collective-broadcast": lambda n: 1.0,
}
# They name or bring together values that are there, or their work is that of another computation.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "async-start",
        "async-update", "async-done", "copy-done", "all-gather-done", "all-reduce-done",
        "collective-permute-done", "send-done", "recv-done"}
# Which operand is written into the first one; the rest of that one stays.
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class HloCost:
  """Of one run of a program on one device."""

  sent: dict  # kind of collective -> bytes this device sends to others
  memory: float  # bytes read from and written to device memory
  unbounded: tuple[str, ...]  # loops whose length the program does not say, counted once


def hlo_cost(text):
  """HloCost of a compiled program.

  A loop that may end early counts as if it does not; of a conditional the branch that moves most
  counts. Memory is counted where operations meet: what a fusion keeps inside and what lies in
  on-chip memory is free, a slice costs its own size. A kernel costs its operands and results once.

  Args:
    text: of the optimised program, as `compiled.as_text()` returns it.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _parse(text)
  if entry is None:
    raise ValueError("the text has no ENTRY computation; pass compiled.as_text()")
  walk = _Walk(computations)
  sent, memory = walk.total(entry)
  return HloCost(sent, memory, tuple(sorted(walk.unbounded)))


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  literal: str  # between the brackets: a constant's value, a parameter's number
  attributes: str
  root: bool

  def called(self, *keys):
    """Names of the computations in the attributes `keys`."""
    return [name for key in keys for group in re.findall(
      rf"\b{key}=(%[\w.\-]+|{{[^}}]*}})", self.attributes) for name in _NAME.findall(group)]


_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")


def _parse(text):
  """{computation: {instruction: _Instruction}}, and the entry's name."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
      continue
    found = _LINE.match(line)
    if found is None or current is None:
      continue
    rest = line[found.end():]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    inside = rest[opens + 1:closes]
    current[found[2]] = _Instruction(found[2], shape, rest[:opens], tuple(_NAME.findall(inside)),
                                     inside, rest[closes + 1:], bool(found[1]))
  return computations, entry


def _closing(text, opens):
  depth = 0
  for place in range(opens, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _bytes(shape, *, device=False):
  """Bytes of a shape, tuples summed; with `device` only what lies in the device's main memory."""
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    # Layouts name other memory spaces than the main one: S(1) is on the chip.
    if device and "S(" in layout:
      continue
    bits = BITS[kind] if kind in BITS else int(re.search(r"\d+", kind)[0])
    total += bits * math.prod(int(size) for size in sizes.split(",") if size) / 8
  return total


class _Walk:
  def __init__(self, computations):
    self.computations, self.unbounded, self.totals = computations, set(), {}

  def total(self, name):
    """({kind: bytes sent}, bytes of memory) of one run of a computation."""
    if name not in self.totals:
      self.totals[name] = self._total(name)
    return self.totals[name]

  def _total(self, name):
    sent, memory = {}, 0.0

    def add(part, times=1):
      nonlocal memory
      for kind, size in part[0].items():
        sent[kind] = sent.get(kind, 0.0) + times * size
      memory += times * part[1]

    for item in self.computations[name].values():
      if item.opcode == "while":
        (body,), (condition,) = item.called("body"), item.called("condition")
        trips = self._trips(name, item, condition, body)
        add(self.total(body), trips)
        add(self.total(condition), trips)
      elif item.opcode == "conditional":
        branches = map(self.total, item.called(
          "branch_computations", "true_computation", "false_computation"))
        add(max(branches, key=lambda part: sum(part[0].values()) + part[1]))
      elif item.opcode == "fusion":
        (called,) = item.called("calls")
        add((self.total(called)[0], self._memory(name, item)))
      elif item.opcode in ("call", "async-start"):
        for called in item.called("calls", "to_apply"):
          add(self.total(called))
      else:
        add((self._sent(name, item), self._memory(name, item)))
    return sent, memory

  def _sent(self, where, item):
    kind = item.opcode.removesuffix("-start")
    if kind not in SENT:
      return {}
    held = sum(_bytes(self.computations[where][operand].shape) for operand in item.operands)
    size = _group_size(item.attributes)
    # Before an all-gather a device holds one part of what it has after.
    return {kind: SENT[kind](size) * held * (size if kind == "all-gather" else 1)}

  def _memory(self, where, item):
    if item.opcode in FREE:
      return 0.0
    table = self.computations[where]
    shapes = [table[operand].shape for operand in item.operands]
    if item.opcode in SLICES:
      return _bytes(shapes[0], device=True) and _bytes(item.shape) + _bytes(item.shape, device=True)
    if item.opcode in IN_PLACE:
      return 2 * _bytes(shapes[IN_PLACE[item.opcode]]) if _bytes(item.shape, device=True) else 0.0
    if item.opcode != "fusion":
      if item.opcode.endswith("-start"):  # its shape names its operands too
        return 2 * sum(_bytes(shape, device=True) for shape in shapes)
      return sum(_bytes(shape, device=True) for shape in [*shapes, item.shape])
    inner = self.computations[item.called("calls")[0]]
    read = 0.0
    for number, shape in enumerate(shapes):
      part, on = self._read(inner, number, shape)
      read += _bytes(shape, device=True) if on else part
    return read + self._written(inner, item)

  def _read(self, inner, number, shape):
    """Bytes that a fusion reads of its operand `number`, and whether it hands it on as it is."""
    whole = _bytes(shape, device=True)
    if not whole:
      return 0.0, False
    names, parts, seen = [_parameter(inner, number)], 0.0, set()
    on = False
    while names:
      name = names.pop()
      on |= inner[name].root
      for item in inner.values():
        if name not in item.operands or item.name in seen:
          continue
        seen.add(item.name)
        if item.opcode in ("bitcast", "get-tuple-element"):
          names.append(item.name)
        elif item.opcode in SLICES and item.operands[0] == name:
          parts += _bytes(item.shape)
        elif item.opcode in IN_PLACE and item.operands[0] == name:
          continue  # what is overwritten is not read, the rest stays where it is
        elif item.opcode == "fusion":
          (called,) = item.called("calls")
          part, through = self._read(self.computations[called], item.operands.index(name), shape)
          parts += part
          names += [item.name] if through else []
        else:
          return whole, False
    return min(whole, parts), on

  def _written(self, inner, item):
    root = _root(inner)
    while root.opcode == "bitcast":
      root = inner[root.operands[0]]
    if root.opcode in IN_PLACE and _bytes(item.shape, device=True):
      return _bytes(inner[root.operands[IN_PLACE[root.opcode]]].shape)
    if root.opcode == "fusion":
      return self._written(self.computations[root.called("calls")[0]], item)
    return _bytes(item.shape, device=True)

  def _trips(self, where, item, condition, body):
    """How often a loop runs: what the compiler says, or its counter's start, step and limit."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', item.attributes)
    if known:
      return int(known[1])
    limit = self._limit(condition, _root(self.computations[condition]).name)
    if limit is not None:
      index, most = limit
      start = self._start(where, item, index)
      step = self._step(body, index)
      if start is not None and step:
        return max(0, -(-(most - start) // step))
    self.unbounded.add(item.name)
    return 1

  def _limit(self, where, name, outer=None):
    """(index of the counter in the loop's tuple, its limit) of `counter < limit`, or None.

    outer: what the parameters of a fusion stand for: ("index", i), ("value", n) or None.
    """
    table = self.computations[where]
    item = table[name]
    if item.opcode == "compare":
      left, right = (self._value(table, operand, outer) for operand in item.operands)
      if "direction=GT" in item.attributes:
        left, right = right, left
      elif "direction=LT" not in item.attributes:
        return None
      return (left[1], right[1]) if left and right and (left[0], right[0]) == (
        "index", "value") else None
    if item.opcode == "fusion":
      (called,) = item.called("calls")
      known = [self._value(table, operand, outer) for operand in item.operands]
      return self._limit(called, _root(self.computations[called]).name, known)
    if item.opcode in ("and", "bitcast", "copy", "convert"):
      # Of several conditions one that bounds is enough: the loop may end earlier, never later.
      found = (self._limit(where, operand, outer) for operand in item.operands)
      return next((one for one in found if one), None)
    return None

  def _value(self, table, name, outer):
    item = table[name]
    if item.opcode == "constant" and re.fullmatch(r"-?\d+", item.literal):
      return "value", int(item.literal)
    if item.opcode == "get-tuple-element":
      return "index", int(re.search(r"\bindex=(\d+)", item.attributes)[1])
    if item.opcode == "parameter" and outer:
      return outer[int(item.literal)]
    if item.opcode in ("copy", "bitcast", "convert"):
      return self._value(table, item.operands[0], outer)
    return None

  def _start(self, where, loop, index):
    table = self.computations[where]
    first = table[loop.operands[0]]
    value = self._value(table, first.operands[index], None) if first.opcode == "tuple" else None
    return value[1] if value and value[0] == "value" else None

  def _step(self, body, index):
    table = self.computations[body]
    root = _root(table)
    if root.opcode != "tuple":
      return None
    return self._added(body, root.operands[index], None)

  def _added(self, where, name, outer):
    table = self.computations[where]
    item = table[name]
    if item.opcode == "add":
      values = [self._value(table, operand, outer) for operand in item.operands]
      return next((value[1] for value in values if value and value[0] == "value"), None)
    if item.opcode == "fusion":
      (called,) = item.called("calls")
      known = [self._value(table, operand, outer) for operand in item.operands]
      return self._added(called, _root(self.computations[called]).name, known)
    if item.opcode in ("copy", "bitcast"):
      return self._added(where, item.operands[0], outer)
    return None


def _root(computation):
  return next(item for item in computation.values() if item.root)


def _parameter(computation, number):
  return next(item.name for item in computation.values()
              if item.opcode == "parameter" and item.literal == str(number))


def _group_size(attributes):
  """Devices that take part in a collective together."""
  lists = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if lists:
    return len(lists[1].split(","))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
  if iota:
    return int(iota[1])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", mesh[2]))
  return 1
