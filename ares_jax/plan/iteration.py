"""Plans an AEPO iteration on TPU chips: memory, work and shortest time of its compiled programs."""

import dataclasses
import re
import time

import jax

from ares_jax.plan import programs
from ares_jax.plan.counted import LOOP, compile_for_chips, count
from ares_jax.plan.suggestions import GIB, larger_cache, suggestions
from ares_jax.system import chips, mesh

NAMES = ("reshard", "prefill", "decode", "aepo_step")
ITERATIONS = 1000


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a chip. A program that the compiler refuses for its size has a total alone."""

  arguments: float | None
  outputs: float | None
  temporaries: float | None
  aliases: float | None  # outputs that reuse the memory of arguments, counted in both
  beside: float  # arrays that the run holds meanwhile and the program does not get
  total: float
  over: float  # total minus the chip's memory; negative if it fits


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """One program of an iteration. Work and floor are those of one call; None is not counted."""

  name: str
  calls: int  # per iteration
  memory: Memory
  model_flops: float  # of all chips: what the mathematics needs
  flops: float | None  # of all chips: what the program computes
  sent: dict | None  # bytes a chip sends, by kind of collective
  across: float | None  # bytes a chip sends to other slices, over the data-centre network
  memory_bytes: float | None  # read and written by a chip
  not_counted: tuple[str, ...]  # why, line by line; the floor leaves it out
  floor: float  # s
  limit: str  # what sets the floor: "compute", "memory" or "links"
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """An iteration on a slice."""

  topology: str
  chip: chips.Chip
  chips: int
  mesh: tuple[int, int, int]  # slice, data, model
  programs: tuple[ProgramPlan, ...]
  fits: bool
  floor: float  # s an iteration, its programs one after the other
  hours: float  # of ITERATIONS iterations at that floor
  suggestions: tuple[str, ...]  # settings with which it may fit; if it fits, may be faster


def plan_iteration(config, model, topology, *, only=NAMES, note=lambda line: None):
  """Plan of a TrainConfig on a described slice such as "v5e:8x8"; nothing is run.

  Programs not in `only` are left out; `note` gets a line when a compilation starts and ends. Raises
  ValueError for an unknown topology, or a mesh or sizes that do not divide it.
  """
  chip, devices = chips.describe_slice(topology)
  with jax.set_mesh(mesh.make_mesh(config.mesh.data, config.mesh.model, devices,
                                   slices=config.mesh.slice)):
    layout = tuple(map(mesh.size, mesh.AXES))
    needed = programs.needed_flops(config, model)
    parts, rounds = [], 1
    for program in programs.aepo_programs(config, model):
      if program.name in only:
        rounds = max(rounds, program.rounds)
        note(f"{program.name} for {topology}: tracing and compiling ...")
        parts.append(_plan_program(program, chip, len(devices), needed[program.name]))
        note(f"{program.name} for {topology}: {parts[-1].compile_seconds:.0f} s")
  floor = sum(part.calls * part.floor for part in parts)
  over = [part.name for part in parts if part.memory.over > 0]
  left = {part.name: -part.memory.over for part in parts}
  if over:
    found = suggestions(over, config, model, len(devices))
  else:
    rollout = [left.get("prefill", 0), left.get("decode", 0)]
    found = larger_cache(config.engine, rounds, min(rollout), chip)
  return Plan(
    topology=topology, chip=chip, chips=len(devices), mesh=layout, programs=tuple(parts),
    fits=not over, floor=floor, hours=floor * ITERATIONS / 3600,
    suggestions=found)


def _plan_program(program, chip, devices, model_flops):
  start = time.perf_counter()
  traced = program.trace()
  try:
    compiled, text = compile_for_chips(traced)
  except jax.errors.JaxRuntimeError as error:
    memory, text = _refused_memory(error, program, chip), None
  else:
    memory = _compiled_memory(compiled.memory_analysis(), program, chip)
  cost = count(traced, text, chip)
  flops = None if cost.flops is None else cost.flops + program.paged[0]
  sent, across, moved = ((cost.moved.sent, cost.moved.across, cost.moved.memory + program.paged[1])
                         if cost.moved else (None, None, None))
  # The floor assumes that everything overlaps which can.
  seconds = {"compute": (flops or 0.0) / devices / chip.flops,
             "memory": (moved or 0.0) / chip.memory_rate,
             "links": sum((sent or {}).values()) / chip.link_rate}
  limit = max(seconds, key=seconds.get)
  return ProgramPlan(
    name=program.name, calls=program.calls, memory=memory,
    model_flops=model_flops / program.calls, flops=flops, sent=sent, across=across,
    memory_bytes=moved, floor=seconds[limit],
    not_counted=tuple(line for line in cost.missing if not (program.rare_loops and LOOP in line)),
    limit=limit if seconds[limit] else "-", compile_seconds=time.perf_counter() - start)


def _compiled_memory(found, program, chip):
  parts = [float(size) for size in (
    found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes,
    found.alias_size_in_bytes)]
  total = sum(parts[:3]) - parts[3] + program.beside
  return Memory(*parts, program.beside, total, total - chip.memory)


def _refused_memory(error, program, chip):
  """Memory of a program that the compiler refused for its size; raises any other error."""
  # libtpu has two wordings.
  found = re.search(r"(?:total memory required[^()]*\(|Used )([\d.]+)([KMGT])(?:\) exceeds| of )",
                    str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not found:
    raise error
  total = float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])) + program.beside
  return Memory(None, None, None, None, program.beside, total, total - chip.memory)


def plan_table(plan):
  """The plan as Markdown."""
  chip = plan.chip
  lines = [
    f"{plan.topology}: {plan.chips} chips of {chip.memory / GIB:.2f} GiB, "
    f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16, memory {chip.memory_rate / 1e9:.0f} GB/s, links "
    f"{chip.link_rate / 1e9:.0f} GB/s; mesh slice {plan.mesh[0]} x data {plan.mesh[1]} x model "
    f"{plan.mesh[2]}", "", *_memory_table(plan), "", *_work_table(plan)]
  for part in plan.programs:
    for line in part.not_counted:
      lines += ["", f"{part.name}: not counted, and left out of the floor: {line}."]
    if part.across:
      lines += ["", f"{part.name}: a chip sends {part.across / 1e9:.4g} GB to other slices, over "
                    "the data-centre network; no floor counts them."]
  names = ", ".join(part.name for part in plan.programs)
  lines += ["", f"Floor of an iteration ({names}): {plan.floor:.4g} s, {plan.hours:.4g} hours per "
                f"{ITERATIONS} iterations, at the largest sizes of the config."]
  if plan.suggestions:
    lines += ["", "It fits. For more speed:" if plan.fits else "It does not fit. Try first:",
              *(f"- {text}" for text in plan.suggestions)]
  return "\n".join(lines)


def _memory_table(plan):
  def gib(size):
    return "-" if size is None else f"{size / GIB:.2f}"

  lines = ["GiB a chip:", "",
           "| program | arguments | outputs | temporaries | aliases | held beside | total | |",
           "| --- " * 8 + "|"]
  for part in plan.programs:
    *sizes, over = dataclasses.astuple(part.memory)
    verdict = f"**{over / GIB:.2f} too many**" if over > 0 else f"fits, {-over / GIB:.2f} left"
    lines.append(f"| {part.name} | {' | '.join(map(gib, sizes))} | {verdict} |")
  return lines


def _work_table(plan):
  def shown(size, unit):
    return "-" if size is None else f"{size / unit:.4g}"

  lines = ["One call; PFLOP of all chips, GB of a chip:", "",
           "| program | calls | model PFLOP | computed PFLOP | sent | memory read and written | "
           "floor, s | limited by | an iteration, s | compiled in s |", "| --- " * 10 + "|"]
  for part in plan.programs:
    sent = None if part.sent is None else sum(part.sent.values())
    lines.append(
      f"| {part.name} | {part.calls} | {part.model_flops / 1e15:.4g} | "
      f"{shown(part.flops, 1e15)} | {shown(sent, 1e9)} | {shown(part.memory_bytes, 1e9)} | "
      f"{part.floor:.4g} | {part.limit} | "
      f"{part.calls * part.floor:.4g} | {part.compile_seconds:.0f} |")
  return lines
