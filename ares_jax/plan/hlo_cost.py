"""Counts the bytes that a compiled program moves over links and to and from memory.

XLA's own cost analysis counts the body of a loop once. This module walks the text of a compiled
program (`compiled.as_text()`, of one device) from its entry and counts a body as often as the loop
runs. That number comes from the compiler or else from the loop's condition.
"""

import collections
import dataclasses
import functools
import re

from ares_jax.plan import hlo_text
from ares_jax.plan.hlo_text import asynchronous, bytes_of, channel

# Bytes that a device sends in a ring of n devices, divided by the bytes it holds before (for an
# all-gather: after).
SENT = {
  **dict.fromkeys(("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
                  lambda n: (n - 1) / n),
  "all-reduce": lambda n: 2 * (n - 1) / n,
  **dict.fromkeys(("collective-permute", "collective-broadcast"), lambda n: 1.0)}
# These name or combine existing values, or call a computation that is counted by itself.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "async-start",
        "async-update"}
# Index of the operand that is written into part of operand 0.
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
SLICES = ("dynamic-slice", "slice", "gather")
PAGED = "paged_attention"  # prefix of the name of a kernel of paged attention
_ACROSS = "across "  # prefix of the kind of a collective between slices
_MEMORY = "memory"  # beside the kinds of collectives: bytes read and written


@dataclasses.dataclass(frozen=True)
class HloCost:
  """Bytes that one device moves in one run of a program."""

  sent: dict  # {kind of collective: bytes sent to other devices over links}
  across: float  # bytes sent to other slices over the data-centre network
  memory: float  # bytes read from and written to device memory
  unbounded: dict  # {loop counted once, because the text does not show its length: bytes a round}


def hlo_cost(text):
  """HloCost of a compiled program.

  A loop that may end early is assumed not to. A conditional counts its most expensive branch. A
  collective that is spread over several fusions counts in the first. A fusion counts its operands
  and results, not the values inside it or those it passes on unchanged. On-chip memory is free. A
  slice counts its own size. A kernel counts its operands and results once, but one of paged
  attention nothing: how much it reads, lengths say that only a run knows.
  `text` is the optimised program, such as `compiled.as_text()` returns. Raises ValueError if it is
  None or has no entry computation, groups of devices that cannot be read, or a transfer to other
  slices without its kind.
  """
  if text is None:
    raise ValueError("the compiler refused the program or wrote no text of it")
  computations, entry = hlo_text.parse(text)
  if entry is None:
    raise ValueError("the text has no ENTRY computation; pass compiled.as_text()")
  walk = _Walk(computations)
  sent = dict(walk.total(entry))
  memory = sent.pop(_MEMORY, 0.0)
  across = sum(sent.pop(kind) for kind in list(sent) if kind.startswith(_ACROSS))
  return HloCost(sent, across, memory, walk.unbounded)


class _Walk:
  def __init__(self, computations):
    self.computations, self.unbounded = computations, {}
    self.total = functools.cache(self._total)
    items = [(where, item) for where, table in computations.items() for item in table.values()]
    # Names of computations that are the body of a fusion.
    self.fused = {called for _, item in items if item.opcode == "fusion"
                  for called in item.called("calls")}
    # Collectives spread over several fusions: (channel, computation of the first).
    self.starts = set()
    for where, item in items:
      if asynchronous(item) == "Start":
        self.starts |= {(channel(each), at) for operand in item.operands
                        for at, each in self._collectives(where, operand)}
    self.spread = {channel for channel, _ in self.starts}

  def _collectives(self, where, name):
    """Yields (computation, collective) for an instruction, or for those inside a fusion."""
    item = self.computations[where][name]
    if item.opcode in SENT:
      yield where, item
    for called in item.called("calls") if item.opcode == "fusion" else ():
      for inner in self.computations[called]:
        yield from self._collectives(called, inner)

  def _started_before(self, where, item):
    """Whether this is a later part of a spread collective, or the call that ends one."""
    if asynchronous(item) == "Done":
      return True
    if item.opcode not in SENT or where not in self.fused:
      return False
    return channel(item) in self.spread and (channel(item), where) not in self.starts

  def _total(self, name):
    """Counter of {kind: bytes sent, _MEMORY: bytes} of one run of a computation."""
    total = collections.Counter()
    for item in self.computations[name].values():
      if item.opcode == "while":
        (body,), (condition,) = item.called("body"), item.called("condition")
        round_ = self.total(body) + self.total(condition)
        trips = self._trips(name, item, condition, body)
        if trips is None:
          self.unbounded[item.name], trips = round_.total(), 1
        total.update({kind: trips * size for kind, size in round_.items()})
      elif item.opcode == "conditional":
        branches = map(self.total, item.called(
          "branch_computations", "true_computation", "false_computation"))
        total.update(max(branches, key=collections.Counter.total))
      elif item.opcode == "fusion":
        (called,) = item.called("calls")
        total.update({**self.total(called), _MEMORY: self._memory(name, item)})
      elif item.opcode in ("call", "async-start"):
        for called in item.called("calls", "to_apply"):
          total.update(self.total(called))
      else:
        total.update({**self._sent(name, item), _MEMORY: self._memory(name, item)})
    return total

  def _sent(self, where, item):
    kind, table = item.opcode.removesuffix("-start"), self.computations[where]
    if item.opcode == "send" and "xla_megascale_runtime" in item.attributes:
      return _sent_across(table[item.operands[0]].shape, item.attributes)
    if kind not in SENT or self._started_before(where, item):
      return {}
    held = sum(bytes_of(table[operand].shape) for operand in item.operands)
    # TPUs write a reduce-scatter as a fused all-reduce of which only a slice is used.
    users = {other.opcode for other in table.values() if item.name in other.operands}
    if kind == "all-reduce" and where in self.fused and users == {"dynamic-slice"}:
      kind = "reduce-scatter"
    size = hlo_text.group_size(item.attributes)
    # Before an all-gather a device holds one of `size` parts.
    return {kind: SENT[kind](size) * held * (size if kind == "all-gather" else 1)}

  def _memory(self, where, item):
    if item.opcode in FREE or item.opcode.endswith("-done") or item.name.startswith(PAGED):
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
      # The shape of a start contains source and target; one may be on the chip.
      if item.opcode.endswith("-start") and item.shape.startswith("("):
        return bytes_of(item.shape, device=True)
      return sum(bytes_of(shape, device=True) for shape in [*shapes, item.shape])
    (called,) = item.called("calls")
    read = 0.0
    for number, shape in enumerate(shapes):
      part, passed_on = self._read(called, number, shape)
      read += bytes_of(shape, device=True) if passed_on else part
    return read + self._written(called, item.shape)

  def _read(self, where, number, shape):
    """(bytes that a fusion reads of operand `number`, whether it returns the operand itself)."""
    full = bytes_of(shape, device=True)
    if not full:
      return 0.0, False
    inner = self.computations[where]
    names, parts, seen = [hlo_text.parameter(inner, number)], 0.0, set()
    passed_on = False
    while names:
      name = names.pop()
      passed_on |= inner[name].root
      for item in inner.values():
        if name not in item.operands or item.name in seen:
          continue
        seen.add(item.name)
        if item.opcode in ("bitcast", "get-tuple-element"):
          names.append(item.name)
        elif item.opcode in SLICES and item.operands[0] == name:
          parts += bytes_of(item.shape)
        elif item.opcode in IN_PLACE and item.operands[0] == name:
          continue  # the overwritten part is not read, and the rest stays in place
        elif (item.root and item.opcode == "tuple") or self._started_before(where, item):
          continue
        elif item.opcode == "fusion":
          (called,) = item.called("calls")
          part, through = self._read(called, item.operands.index(name), shape)
          parts += part
          names += [item.name] if through else []
        else:
          return full, False
    return min(full, parts), passed_on

  def _written(self, where, shape):
    """Bytes that a fusion with a result of this shape writes."""
    inner = self.computations[where]
    root = hlo_text.root(inner)
    shapes = [found[0] for found in hlo_text.ARRAY.finditer(shape)]
    if root.opcode == "tuple" and len(shapes) == len(root.operands):
      return sum(map(functools.partial(self._written_as, where), root.operands, shapes))
    if asynchronous(root) == "Start":
      # The first shape is its operand's.
      return sum(bytes_of(part, device=True) for part in shapes[1:])
    return self._written_as(where, root.name, shape)

  def _written_as(self, where, name, shape):
    inner = self.computations[where]
    item = inner[name]
    while item.opcode == "bitcast":
      item = inner[item.operands[0]]
    if not bytes_of(shape, device=True) or self._started_before(where, item):
      return 0.0
    if item.opcode == "parameter" and not item.root:
      return 0.0  # passed on in a tuple
    if item.opcode in IN_PLACE:
      return bytes_of(inner[item.operands[IN_PLACE[item.opcode]]].shape)
    if item.opcode == "fusion":
      return self._written(item.called("calls")[0], shape)
    return bytes_of(shape, device=True)

  def _trips(self, where, item, condition, body):
    """How often a loop runs, from the compiler or its counter's start, step and limit, or None."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', item.attributes)
    if known:
      return int(known[1])
    limit = self._limit(condition, hlo_text.root(self.computations[condition]).name)
    if limit is not None:
      index, most = limit
      start = self._start(where, item, index)
      result = hlo_text.root(self.computations[body])
      step = self._added(body, result.operands[index]) if result.opcode == "tuple" else None
      if start is not None and step:
        return max(0, -(-(most - start) // step))
    return None

  def _limit(self, where, name, outer=None):
    """(index of the counter in the loop's tuple, its limit) of `counter < limit`, or None.

    outer: the known meaning of a fusion's parameters, each ("index", i), ("value", n) or None.
    """
    table = self.computations[where]
    item = table[name]
    if item.opcode == "compare":
      left, right = (self._value(table, operand, outer) for operand in item.operands)
      if "direction=GT" in item.attributes:
        left, right = right, left
      elif "direction=LT" not in item.attributes:
        return None
      known = left and right and (left[0], right[0]) == ("index", "value")
      return (left[1], right[1]) if known else None
    if item.opcode == "fusion":
      (called,) = item.called("calls")
      known = [self._value(table, operand, outer) for operand in item.operands]
      return self._limit(called, hlo_text.root(self.computations[called]).name, known)
    if item.opcode in ("and", "bitcast", "copy", "convert"):
      # One bound of several conditions is enough: the loop may end earlier, never later.
      found = (self._limit(where, operand, outer) for operand in item.operands)
      return next((one for one in found if one), None)
    return None

  def _value(self, table, name, outer):
    """("value", constant) or ("index", i) for element i of the loop's tuple; None if unknown."""
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
    """The counter's constant start, or None."""
    table = self.computations[where]
    first = table[loop.operands[0]]
    value = self._value(table, first.operands[index], None) if first.opcode == "tuple" else None
    return value[1] if value and value[0] == "value" else None

  def _added(self, where, name, outer=None):
    """The constant that a computation adds to the counter in its value `name`, or None."""
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
  """{kind: bytes} of a transfer to other slices, which the host makes."""
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
  if not found:
    raise ValueError("a transfer to other slices has no _xla_megascale_transfer_type, so its bytes "
                     f"cannot be counted: {attributes[:200]}; compile with another libtpu")
  kind, held = found[1].lower().replace("_", "-"), bytes_of(shape)
  # "{1,2}x{0:3}": slices, each alone or as first:last, then their devices.
  target = re.search(r'_xla_megascale_target="\{([^}]*)\}x', attributes)
  slices = 2
  if target:
    ends = [part.split(":") for part in target[1].split(",")]
    slices = sum(int(part[-1]) - int(part[0]) + 1 for part in ends)
  share = SENT[kind](slices) if kind in SENT else 1.0
  return {_ACROSS + kind: share * held * (slices if kind == "all-gather" else 1)}
