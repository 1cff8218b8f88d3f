"""Compiles a run's largest programs on its devices, to find what does not fit before it begins.

    python -m ares_jax.train --config=configs/ares_tiny.py --check

The shapes are the longest of the config: prompts of the last `prompt.max_tokens`, answers of
`max_tokens`, packed rows of the longest `row_tokens`. Fine-tuning is checked with every example in
a row of its own. This is an upper bound, because packing needs fewer rows, so a run does not
require it. jax's cache keeps the compiled programs for steps of the same shapes and layout.
"""

import contextlib
import dataclasses
import time

import jax

from ares_jax.plan.iteration import NAMES
from ares_jax.plan.programs import aepo_programs, sft_program
from ares_jax.plan.suggestions import GIB, suggestions
from ares_jax.run.checkpoint.reader import newest_step
from ares_jax.run.identity import STAGES, stage_folder
from ares_jax.system import compiling, hosts
from ares_jax.system.config import one_line


@dataclasses.dataclass(frozen=True)
class CheckedProgram:
  """A compiled program and the memory it needs."""

  name: str
  bytes: float | None  # of a device, with what the run holds beside it; None: the compiler gave up
  limit: float | None  # bytes of a device; None if the backend does not report it
  seconds: float  # of compiling

  @property
  def fits(self):
    """False if it certainly does not fit."""
    return self.bytes is not None and (self.limit is None or self.bytes <= self.limit)


def check_programs(config, model, end, stages=STAGES):
  """CheckedPrograms of a TrainConfig on the current mesh, in the order they run.

  `end` are the token ids that end an answer. Raises ValueError if sizes do not divide over the
  mesh, or keys and values do not fit engine.cache_gib.
  """
  largest, checked = [], []
  for stage in stages:
    if getattr(config, stage).steps:
      largest += (aepo_programs(config, model, end) if stage == "aepo"
                  else [sft_program(config, model, stage)])
  for program in largest:
    start, size = time.perf_counter(), None
    try:
      with compiling.announced(f"the longest shape of {program.name}"):
        found = program.trace().lower().compile().memory_analysis()
      size = (found.argument_size_in_bytes + found.output_size_in_bytes
              + found.temp_size_in_bytes - found.alias_size_in_bytes + program.beside)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
    checked.append(CheckedProgram(program.name, size, _device_bytes(),
                                  time.perf_counter() - start))
  return checked


def memory_table(checked):
  """The CheckedPrograms as Markdown."""
  lines = ["| program | GiB a device | of | compiled in s |", "| --- | --- | --- | --- |"]
  for one in checked:
    size, limit = ("?" if x is None else f"{x / GIB:.3f}" for x in (one.bytes, one.limit))
    lines.append(f"| {one.name} | {size}{'' if one.fits else ', too many'} | {limit} | "
                 f"{one.seconds:.0f} |")
  if {"warmup", "adacs"} & {one.name for one in checked}:
    lines += ["", "warmup and adacs with every example in a row of its own: an upper bound."]
  return "\n".join(lines)


def require_fit(checked, config, model):
  """Raises ValueError, with suggestions, if a CheckedProgram does not fit."""
  over = [one.name for one in checked if not one.fits]
  if over:
    raise ValueError(f"{', '.join(over)} need more memory than a device has; "
                     f"{_try_first(over, config, model)}")


def compile_longest_first(config, model, end, workdir):
  """Compiles AEPO's longest shapes before its first batch, if that batch may have shorter ones.

  Raises ValueError, with suggestions, if they do not fit.
  """
  several = len(config.prompt.max_tokens) > 1 or len(config.aepo.row_tokens) > 1
  if several and config.aepo.steps and hosts.on_process_0(
      lambda: newest_step(stage_folder(workdir, "aepo"))) is None:
    require_fit(check_programs(config, model, end, ("aepo",)), config, model)


@contextlib.contextmanager
def suggest_on_oom(config, model, workdir):
  """Turns a device's "out of memory" into a ValueError of one line with suggestions.

  They are for the first stage of the run in `workdir` that is not at its end.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    ends = {stage: getattr(config, stage).steps for stage in STAGES}
    stage = next((stage for stage, steps in ends.items()
                  if steps and newest_step(stage_folder(workdir, stage)) != steps), "aepo")
    names = NAMES if stage == "aepo" else (stage,)
    raise ValueError(f"out of device memory: {one_line(error)[:200]}; the newest checkpoint is "
                     f"complete; {_try_first(names, config, model)}") from error


def _try_first(names, config, model):
  return f"try first: {'; '.join(suggestions(names, config, model, len(jax.devices())))}"


def _device_bytes():
  """Bytes of this process's first device, or None if its backend does not report them."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
