"""What a run needs on TPU chips: memory, work and the shortest time, from compiled programs."""

import dataclasses
import glob
import os
import re
import tempfile
import time

import jax

from ares_jax.plan import programs
from ares_jax.plan.hlo_cost import hlo_cost
from ares_jax.plan.jaxpr_cost import flops
from ares_jax.system import chips, mesh

NAMES = ("reshard", "prefill", "decode", "aepo_step")
GIB, ITERATIONS = 2**30, 1000


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a chip."""

  arguments: float | None  # None where the compiler gave up: it names the sum alone
  outputs: float | None
  temporaries: float | None
  aliases: float | None  # outputs in the place of arguments, counted in both
  beside: float  # what the run holds meanwhile and the program does not get
  total: float
  over: float  # beyond the chip's own; negative: left


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """One program of an iteration; work is of one call."""

  name: str
  calls: int  # an iteration
  memory: Memory
  model_flops: float  # all chips: what the mathematics needs
  flops: float  # all chips: what the program computes
  sent: dict | None  # bytes a chip sends, by kind of collective; None where they cannot be read
  across: float | None  # bytes a chip sends to other slices, over the data-centre network
  memory_bytes: float | None  # that a chip reads and writes
  unbounded: tuple[str, ...]  # loops counted once, as nothing says how often they run
  floor: float  # s
  limit: str  # what sets the floor: "compute", "memory" or "links"
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """What an iteration needs on a slice."""

  topology: str
  chip: chips.Chip
  chips: int
  mesh: tuple[int, int, int]  # slice, data, model
  programs: tuple[ProgramPlan, ...]
  fits: bool
  floor: float  # s an iteration: its programs one after the other
  hours: float  # of ITERATIONS iterations at that floor
  knobs: tuple[str, ...]  # to turn first where it does not fit


def make_plan(config, model, topology, *, only=NAMES, note=lambda line: None):
  """Plan of a TrainConfig on a described slice; nothing is run.

  Args:
    config: setup.TrainConfig.
    model: ModelConfig.
    topology: such as "v5e:8x8" (`chips.describe`).
    only: names of the programs that are compiled; the others are left out.
    note: is told of every program when it starts and ends.

  Raises:
    ValueError: an unknown topology, or a mesh or sizes that do not divide it.
  """
  chip, devices = chips.describe_slice(topology)
  with jax.set_mesh(mesh.make_mesh(config.mesh.data, config.mesh.model, devices,
                                   slices=config.mesh.slice)):
    layout = tuple(map(mesh.size, mesh.AXES))
    needed = programs.needed_flops(config, model)
    parts = []
    for program in programs.programs(config, model):
      if program.name in only:
        note(f"{program.name} for {topology}: tracing and compiling ...")
        parts.append(_measure(program, chip, len(devices), needed[program.name]))
        note(f"{program.name} for {topology}: {parts[-1].compile_seconds:.0f} s")
  floor = sum(part.calls * part.floor for part in parts)
  over = [part.name for part in parts if part.memory.over > 0]
  return Plan(topology, chip, len(devices), layout, tuple(parts), not over,
              floor, floor * ITERATIONS / 3600, suggestions(over, config, model, len(devices)))


def suggestions(names, config, model, devices):
  """Flags to try first, for programs that need more memory than a chip has.

  Args:
    names: of those programs.
    config, model: TrainConfig, ModelConfig.
    devices: chips of all slices.
  """
  found, settings, parts = [], config.aepo, config.mesh.model
  own = devices // config.mesh.slice
  wider = [n for n in range(parts + 1, own + 1) if own % n == model.mlp % n == model.vocab % n == 0]
  if set(names) & {"reshard", "prefill", "decode"}:
    # Keys and values that do not divide are whole on each device.
    split = [n for n in wider if model.kv_heads % n == 0]
    if split:
      found.append(f"--config.mesh.model={split[0]} (weights of rollouts and their keys and values "
                   "are split over it)")
    found.append(f"--config.engine.cache_gib={config.engine.cache_gib / 2:g} (fewer answers at "
                 "once; take more time)")
  if "prefill" in names:
    found.append(f"--config.engine.read={max(1, config.engine.read // 2)} (prompts a call), or a "
                 "smaller prompt.max_pixels with smaller prompt.windows")
  if "aepo_step" in names:
    if model.remat != "block":
      found.append("--config.model.remat=block (a block's inputs are kept alone)")
    rows = devices // parts
    if settings.microbatch > rows:
      found.append(f"--config.aepo.microbatch={max(rows, settings.microbatch // 2)} (packed rows "
                   "of a gradient)")
    if wider:
      found.append(f"--config.mesh.model={wider[0]} (weights, and heads or a row's tokens, "
                   "are split over it)")
    found.append(f"--config.aepo.sampling.max_tokens={settings.sampling.max_tokens // 2}")
    if not config.model.lora.rank:
      found.append("--config.aepo.optimizer.moments=factored (2 bytes a weight in place of 8)")
      found.append("--config.model.lora.rank=16 (adapters alone are trained)")
  if names:
    found.append("a larger slice: weights, gradients and moments are split over all its chips")
  return tuple(dict.fromkeys(found))


def _measure(program, chip, devices, model_flops):
  start = time.perf_counter()
  traced = program.trace()
  work = flops(traced.jaxpr, platform="tpu")
  sent, across, moved, unbounded = None, None, None, ()
  try:
    compiled, text = compile_for_chips(traced)
  except jax.errors.JaxRuntimeError as error:
    memory = _exhausted(error, program, chip)
  else:
    memory = _memory(compiled.memory_analysis(), program, chip)
    if text is not None:
      cost = hlo_cost(text)
      sent, across, moved, unbounded = cost.sent, cost.across, cost.memory, cost.unbounded
  needed = model_flops / program.calls
  # A floor takes all that can overlap as overlapping.
  seconds = {"compute": work / devices / chip.flops, "memory": (moved or 0.0) / chip.memory_rate,
             "links": sum((sent or {}).values()) / chip.link_rate}
  limit = max(seconds, key=seconds.get)
  return ProgramPlan(program.name, program.calls, memory, needed, float(work), sent, across, moved,
                     unbounded, seconds[limit], limit, time.perf_counter() - start)


def compile_for_chips(traced):
  """(compiled program, its text as libtpu writes it or None) of a `jax.stages.Traced`.

  `as_text` of what is compiled would do for small programs only: jaxlib does not read back all that
  libtpu has in its programs for v5p and v6e (asynchronous calls into which operands come late).
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = traced.lower().compile(
      compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    found = glob.glob(os.path.join(folder, "*.after_optimizations.txt"))
    if len(found) != 1:
      return compiled, None
    with open(found[0]) as file:
      return compiled, file.read()


def _memory(found, program, chip):
  parts = [float(size) for size in (
    found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes,
    found.alias_size_in_bytes)]
  total = sum(parts[:3]) - parts[3] + program.beside
  return Memory(*parts, program.beside, total, total - chip.memory)


def _exhausted(error, program, chip):
  """Memory of a program that the compiler refused for its size; other errors go on."""
  # Two wordings of libtpu's.
  found = re.search(r"(?:total memory required[^()]*\(|Used )([\d.]+)([KMGT])(?:\) exceeds| of )",
                    str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not found:
    raise error
  total = float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])) + program.beside
  return Memory(None, None, None, None, program.beside, total, total - chip.memory)


def plan_table(result):
  """The plan as Markdown."""
  def gib(size):
    return "-" if size is None else f"{size / GIB:.2f}"

  chip = result.chip
  lines = [
    f"{result.topology}: {result.chips} chips of {chip.memory / GIB:.2f} GiB, "
    f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16, memory {chip.memory_rate / 1e9:.0f} GB/s, links "
    f"{chip.link_rate / 1e9:.0f} GB/s; mesh slice {result.mesh[0]} x data {result.mesh[1]} x model "
    f"{result.mesh[2]}", "",
    "GiB a chip:", "",
    "| program | arguments | outputs | temporaries | aliases | held beside | together | |",
    "| --- " * 8 + "|"]
  for part in result.programs:
    memory = part.memory
    verdict = (f"**{memory.over / GIB:.2f} too many**" if memory.over > 0 else
               f"fits, {-memory.over / GIB:.2f} left")
    sizes = (memory.arguments, memory.outputs, memory.temporaries, memory.aliases, memory.beside,
             memory.total)
    lines.append(f"| {part.name} | {' | '.join(map(gib, sizes))} | {verdict} |")
  lines += ["", "One call; PFLOP of all chips, GB of a chip:", "",
            "| program | calls | model PFLOP | computed PFLOP | sent | memory read and written | "
            "floor, s | by | an iteration, s | compiled in s |", "| --- " * 10 + "|"]
  for part in result.programs:
    moved = ["-" if size is None else f"{size / 1e9:.4g}" for size in (
      None if part.sent is None else sum(part.sent.values()), part.memory_bytes)]
    lines.append(
      f"| {part.name} | {part.calls} | {part.model_flops / 1e15:.4g} | {part.flops / 1e15:.4g} | "
      f"{' | '.join(moved)} | {part.floor:.4g} | {part.limit} | {part.calls * part.floor:.4g} | "
      f"{part.compile_seconds:.0f} |")
  for part in result.programs:
    if part.sent is None:
      lines += ["", f"{part.name}: the compiler refused it, or wrote no text of it; its floor is "
                    "of its FLOPs alone."]
    if part.across:
      lines += ["", f"{part.name}: {part.across / 1e9:.4g} GB of a chip go to other slices, over "
                    "the data-centre network, whose rate is in no floor."]
    if part.unbounded:
      lines += ["", f"{part.name}: loops of unknown length, counted once: "
                    f"{', '.join(part.unbounded)}."]
  names = ", ".join(part.name for part in result.programs)
  lines += ["", f"Floor of an iteration ({names}): {result.floor:.4g} s, {result.hours:.4g} hours "
                f"per {ITERATIONS} iterations, at the largest sizes of the config."]
  if result.knobs:
    lines += ["", "Does not fit. Turn first:", *(f"- {knob}" for knob in result.knobs)]
  return "\n".join(lines)
