"""Parses the text of a compiled program into computations, instructions and shapes."""

import dataclasses
import math
import re

BITS = {"pred": 8, "token": 0, "opaque": 0}  # other types have their size in the name: bf16, s32
# A TPU may spread a collective over several fusions. Each fusion contains it; these two calls mark
# the first fusion and the last.
_ASYNC = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_NAME = re.compile(r"%([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+(?:#\d+)*)")  # %x#2 is element 2 of the tuple x
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation. Operands are names of other lines of the computation."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  literal: str  # text between the brackets: a constant's value, a parameter's number
  attributes: str
  root: bool

  def called(self, *keys):
    """Names of the computations that the attributes `keys` refer to."""
    return [name for key in keys for group in re.findall(
      rf"\b{key}=(%[\w.\-]+|{{[^}}]*}})", self.attributes) for name in _NAME.findall(group)]


def parse(text):
  """({computation: {instruction: Instruction}}, name of the entry computation or None).

  XLA from jax 0.11 on writes an element of a tuple as `%x#2` where it is used. Such an operand
  becomes the `get-tuple-element` that older texts have.
  """
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
    operands = tuple(_OPERAND.findall(inside))
    for operand in operands:
      _add_elements(current, operand)
    current[found[2]] = Instruction(found[2], shape, rest[:opens], operands, inside,
                                    rest[closes + 1:], bool(found[1]))
  return computations, entry


def _add_elements(computation, name):
  """Adds the instruction for an operand `x#2`, and first for `x#2` of an operand `x#2#0`."""
  source, _, index = name.rpartition("#")
  if source and name not in computation:
    _add_elements(computation, source)
    computation[name] = Instruction(
      name, _element(computation[source].shape, int(index)), "get-tuple-element", (source,),
      f"%{source}", f", index={index}", False)


def _element(shape, index):
  """The shape of one element of a tuple."""
  depth, parts = 0, [""]
  for letter in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return parts[index].strip()


def _closing(text, opens):
  depth = 0
  for index in range(opens, len(text)):
    depth += {"(": 1, ")": -1}.get(text[index], 0)
    if depth == 0:
      return index
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def bytes_of(shape, *, device=False):
  """Bytes of a shape, summed over a tuple; `device` counts only the device's main memory."""
  total = 0
  for kind, sizes, layout in ARRAY.findall(shape):
    # A layout names memory spaces other than the main one: S(1) is on the chip.
    if device and "S(" in layout:
      continue
    bits = BITS[kind] if kind in BITS else int(re.search(r"\d+", kind)[0])
    total += bits * math.prod(int(size) for size in sizes.split(",") if size) / 8
  return total


def root(computation):
  """The instruction whose value the computation returns."""
  return next(item for item in computation.values() if item.root)


def parameter(computation, number):
  """Name of the instruction for argument `number`."""
  return next(item.name for item in computation.values()
              if item.opcode == "parameter" and item.literal == str(number))


def asynchronous(item):
  """"Start" or "Done" if a call begins or ends a spread collective, else None."""
  found = _ASYNC.search(item.attributes) if item.opcode == "custom-call" else None
  return found and found[1]


def channel(item):
  """(opcode, channel id): equal for all parts of one spread collective."""
  found = re.search(r"\bchannel_id=(\d+)", item.attributes)
  return item.opcode, found and found[1]


def group_size(attributes):
  """Number of devices in one group of a collective; 1 if it names pairs of devices instead.

  Raises ValueError if the groups are written in a way that is not known here.
  """
  if "replica_groups=" not in attributes:
    return 1
  lists = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if lists:
    return len(lists[1].split(","))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
  if iota:
    return int(iota[1])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", attributes)
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    # 'data':(2)4 is a part of the axis: 4 devices, of which 2 such groups stand one after another.
    return math.prod(int(part or sizes[name]) for name, part in re.findall(
      r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))
  written = attributes[attributes.index("replica_groups="):][:100]
  raise ValueError(f"cannot read how many devices a collective has: {written}")
