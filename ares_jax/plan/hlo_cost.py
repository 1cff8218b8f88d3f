"""What a compiled program moves: bytes over links and to and from memory, loops counted.

XLA's own cost analysis counts the body of a loop once. Here the text of a compiled program
(`compiled.as_text()`, of one device) is walked from its entry: a loop's body counts as often as it
runs, which its condition says where the compiler does not.
"""

import dataclasses
import functools
import re

from ares_jax.plan import hlo_text
from ares_jax.plan.hlo_text import asynchronous, bytes_of, channel

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
        "async-update"}
# Which operand is written into the first one; the rest of that one stays.
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
SLICES = ("dynamic-slice", "slice", "gather")


_ACROSS = "across "  # before the kind of a collective between slices


@dataclasses.dataclass(frozen=True)
class HloCost:
  """Of one run of a program on one device."""

  sent: dict  # kind of collective -> bytes this device sends to others, over links
  across: float  # bytes that go to other slices, over the data-centre network
  memory: float  # bytes read from and written to device memory
  unbounded: tuple[str, ...]  # loops whose length the program does not say, counted once


def hlo_cost(text):
  """HloCost of a compiled program.

  A loop that may end early counts as if it does not; of a conditional the branch that moves most
  counts. A collective that goes on through several fusions counts where it starts. Memory is
  counted where operations meet: what a fusion keeps inside or hands on and what lies in on-chip
  memory is free, a slice costs its own size. A kernel costs its operands and results once.

  Args:
    text: of the optimised program, as `compiled.as_text()` returns it.

  Raises:
    ValueError: the text has no entry computation, or a transfer to other slices without its kind.
  """
  computations, entry = hlo_text.parse(text)
  if entry is None:
    raise ValueError("the text has no ENTRY computation; pass compiled.as_text()")
  walk = _Walk(computations)
  sent, memory = walk.total(entry)
  across = sum(sent.pop(kind) for kind in list(sent) if kind.startswith(_ACROSS))
  return HloCost(sent, across, memory, tuple(sorted(walk.unbounded)))


class _Walk:
  def __init__(self, computations):
    self.computations, self.unbounded, self.totals = computations, set(), {}
    items = [(where, item) for where, table in computations.items() for item in table.values()]
    self.fused = {called for _, item in items if item.opcode == "fusion"
                  for called in item.called("calls")}
    # Collectives that start in a fusion and go on in others: (kind, channel) and where they start.
    self.starts = set()
    for where, item in items:
      if asynchronous(item) == "Start":
        self.starts |= {(channel(each), at) for operand in item.operands
                        for at, each in self._collectives(where, operand)}
    self.lasting = {channel for channel, _ in self.starts}

  def _collectives(self, where, name):
    """(computation, collective) of an instruction, or of the fusion that it is."""
    item = self.computations[where][name]
    if item.opcode in SENT:
      yield where, item
    for called in item.called("calls") if item.opcode == "fusion" else ():
      for inner in self.computations[called]:
        yield from self._collectives(called, inner)

  def _goes_on(self, where, item):
    """Whether a collective is only carried on or ended here, or this call ends one."""
    if asynchronous(item) == "Done":
      return True
    if item.opcode not in SENT or where not in self.fused:
      return False
    return channel(item) in self.lasting and (channel(item), where) not in self.starts

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
    kind, table = item.opcode.removesuffix("-start"), self.computations[where]
    if item.opcode == "send" and "xla_megascale_runtime" in item.attributes:
      return _sent_across(table[item.operands[0]].shape, item.attributes)
    if kind not in SENT or self._goes_on(where, item):
      return {}
    held = sum(bytes_of(table[operand].shape) for operand in item.operands)
    # A sum of which only a slice leaves its fusion is how TPUs have a reduce-scatter.
    users = {other.opcode for other in table.values() if item.name in other.operands}
    if kind == "all-reduce" and where in self.fused and users == {"dynamic-slice"}:
      kind = "reduce-scatter"
    size = hlo_text.group_size(item.attributes)
    # Before an all-gather a device holds one part of what it has after.
    return {kind: SENT[kind](size) * held * (size if kind == "all-gather" else 1)}

  def _memory(self, where, item):
    if item.opcode in FREE or item.opcode.endswith("-done"):
      return 0.0
    table = self.computations[where]
    shapes = [table[operand].shape for operand in item.operands]
    if item.opcode in SLICES:
      return bytes_of(shapes[0], device=True) and (
        bytes_of(item.shape) + bytes_of(item.shape, device=True))
    if item.opcode in IN_PLACE:
      return bytes_of(item.shape, device=True) and 2 * bytes_of(shapes[IN_PLACE[item.opcode]])
    if item.opcode == "send":
      return sum(bytes_of(shape, device=True) for shape in shapes)  # its result is the same buffer
    if item.opcode != "fusion":
      # The shape of a start names both ends; one may be on the chip.
      if item.opcode.endswith("-start") and item.shape.startswith("("):
        return bytes_of(item.shape, device=True)
      return sum(bytes_of(shape, device=True) for shape in [*shapes, item.shape])
    (called,) = item.called("calls")
    read = 0.0
    for number, shape in enumerate(shapes):
      part, on = self._read(called, number, shape)
      read += bytes_of(shape, device=True) if on else part
    return read + self._written(called, item.shape)

  def _read(self, where, number, shape):
    """Bytes that a fusion reads of its operand `number`, and whether it hands it on as it is."""
    whole = bytes_of(shape, device=True)
    if not whole:
      return 0.0, False
    inner = self.computations[where]
    names, parts, seen = [hlo_text.parameter(inner, number)], 0.0, set()
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
          parts += bytes_of(item.shape)
        elif item.opcode in IN_PLACE and item.operands[0] == name:
          continue  # what is overwritten is not read, the rest stays where it is
        elif item.root and item.opcode == "tuple" or self._goes_on(where, item):
          continue
        elif item.opcode == "fusion":
          (called,) = item.called("calls")
          part, through = self._read(called, item.operands.index(name), shape)
          parts += part
          names += [item.name] if through else []
        else:
          return whole, False
    return min(whole, parts), on

  def _written(self, where, shape):
    """Bytes that a fusion of this result writes."""
    inner = self.computations[where]
    root = hlo_text.root(inner)
    shapes = [found[0] for found in hlo_text.ARRAY.finditer(shape)]
    if root.opcode == "tuple" and len(shapes) == len(root.operands):
      return sum(map(functools.partial(self._written_as, where), root.operands, shapes))
    if asynchronous(root) == "Start":
      # The first is its operand.
      return sum(bytes_of(part, device=True) for part in shapes[1:])
    return self._written_as(where, root.name, shape)

  def _written_as(self, where, name, shape):
    inner = self.computations[where]
    item = inner[name]
    while item.opcode == "bitcast":
      item = inner[item.operands[0]]
    if not bytes_of(shape, device=True) or self._goes_on(where, item):
      return 0.0
    if item.opcode == "parameter" and not item.root:
      return 0.0  # handed on beside other results
    if item.opcode in IN_PLACE:
      return bytes_of(inner[item.operands[IN_PLACE[item.opcode]]].shape)
    if item.opcode == "fusion":
      return self._written(item.called("calls")[0], shape)
    return bytes_of(shape, device=True)

  def _trips(self, where, item, condition, body):
    """How often a loop runs: what the compiler says, or its counter's start, step and limit."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', item.attributes)
    if known:
      return int(known[1])
    limit = self._limit(condition, hlo_text.root(self.computations[condition]).name)
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
      return self._limit(called, hlo_text.root(self.computations[called]).name, known)
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
    root = hlo_text.root(table)
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
      return self._added(called, hlo_text.root(self.computations[called]).name, known)
    if item.opcode in ("copy", "bitcast"):
      return self._added(where, item.operands[0], outer)
    return None


def _sent_across(shape, attributes):
  """{kind: bytes} of a transfer that the host takes to other slices, as libtpu writes it."""
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
  if not found:
    raise ValueError("a transfer to other slices has no _xla_megascale_transfer_type, so its bytes "
                     f"cannot be counted: {attributes[:200]}; compile with another libtpu")
  kind, held = found[1].lower().replace("_", "-"), bytes_of(shape)
  # "{1,2}x{0:3}": slices, each written alone or as first:last, and their devices.
  target = re.search(r'_xla_megascale_target="\{([^}]*)\}x', attributes)
  slices = 2
  if target:
    ends = [part.split(":") for part in target[1].split(",")]
    slices = sum(int(part[-1]) - int(part[0]) + 1 for part in ends)
  share = SENT[kind](slices) if kind in SENT else 1.0
  return {_ACROSS + kind: share * held * (slices if kind == "all-gather" else 1)}
