"""The text of a compiled program, taken apart: computations, instructions, sizes of shapes."""

import dataclasses
import math
import re

BITS = {"pred": 8, "token": 0, "opaque": 0}  # others carry their size in their name: bf16, s32
# A collective of TPUs that lasts over several fusions stands in each, between these two calls.
_ASYNC = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; its operands are lines of the same."""

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


def parse(text):
  """{computation: {instruction: Instruction}}, and the entry's name."""
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
    current[found[2]] = Instruction(found[2], shape, rest[:opens], tuple(_NAME.findall(inside)),
                                    inside, rest[closes + 1:], bool(found[1]))
  return computations, entry


def _closing(text, opens):
  depth = 0
  for place in range(opens, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def bytes_of(shape, *, device=False):
  """Bytes of a shape, tuples summed; with `device` only what lies in the device's main memory."""
  total = 0
  for kind, sizes, layout in ARRAY.findall(shape):
    # Layouts name other memory spaces than the main one: S(1) is on the chip.
    if device and "S(" in layout:
      continue
    bits = BITS[kind] if kind in BITS else int(re.search(r"\d+", kind)[0])
    total += bits * math.prod(int(size) for size in sizes.split(",") if size) / 8
  return total


def root(computation):
  """The instruction whose value is a computation's."""
  return next(item for item in computation.values() if item.root)


def parameter(computation, number):
  """Name of the instruction that stands for argument `number`."""
  return next(item.name for item in computation.values()
              if item.opcode == "parameter" and item.literal == str(number))


def asynchronous(item):
  """"Start" or "Done" of a call that begins or ends a lasting collective, else None."""
  found = _ASYNC.search(item.attributes) if item.opcode == "custom-call" else None
  return found and found[1]


def channel(item):
  """What the parts of one lasting collective have in common."""
  found = re.search(r"\bchannel_id=(\d+)", item.attributes)
  return item.opcode, found and found[1]


def group_size(attributes):
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
