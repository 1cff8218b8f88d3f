"""Compiles the largest programs of a run on its devices: what does not fit is said at the start.

    python -m ares_jax.train --config=configs/ares_tiny.py --check

Shapes are the longest of the config: prompts of the last `prompt.max_tokens`, answers of
`max_tokens`, packed rows of the longest `row_tokens`. Fine-tuning is checked with every example in
a row of its own, which is an upper bound: packed rows are fewer, so a run begins without it. jax
keeps what is compiled here for a step of the same shapes and layout.
"""

import contextlib
import dataclasses
import os
import time

import jax

from ares_jax.plan.plan import GIB, NAMES, suggestions
from ares_jax.plan.programs import programs, sft_program
from ares_jax.run.checkpoint.reader import newest_step
from ares_jax.run.identity import STAGES
from ares_jax.system import heartbeat, hosts
from ares_jax.system.config import one_line


@dataclasses.dataclass(frozen=True)
class Checked:
  """One compiled program."""

  name: str
  bytes: float | None  # of a device, with what the run holds beside it; None: the compiler gave up
  limit: float | None  # bytes of a device; None where the backend does not tell
  seconds: float  # of compiling

  @property
  def fits(self):
    """False where it surely does not."""
    return self.bytes is not None and (self.limit is None or self.bytes <= self.limit)


def check_programs(config, model, end, note=lambda line: None, stages=STAGES):
  """Checked programs of a TrainConfig on the current mesh, in the order they run.

  Args:
    config: setup.TrainConfig.
    model: ModelConfig.
    end: token ids that end an answer.
    note: is told of every program when it starts.
    stages: whose programs.

  Raises:
    ValueError: sizes do not divide over the mesh, or keys and values do not fit engine.cache_gib.
  """
  largest, checked = [], []
  for stage in stages:
    if getattr(config, stage).steps:
      largest += programs(config, model, end) if stage == "aepo" else [
        sft_program(config, model, stage)]
  for program in largest:
    note(f"compiling the longest shape of {program.name} ...")
    heartbeat.heartbeat()
    start, size = time.perf_counter(), None
    try:
      found = program.trace().lower().compile().memory_analysis()
      size = (found.argument_size_in_bytes + found.output_size_in_bytes
              + found.temp_size_in_bytes - found.alias_size_in_bytes + program.beside)
    except jax.errors.JaxRuntimeError as error:
      if not _exhausted(error):
        raise
    checked.append(Checked(program.name, size, _limit(), time.perf_counter() - start))
  return checked


def memory_table(checked):
  """The programs as Markdown."""
  lines = ["| program | GiB a device | of | compiled in s |", "| --- | --- | --- | --- |"]
  for one in checked:
    size, limit = ("?" if x is None else f"{x / GIB:.3f}" for x in (one.bytes, one.limit))
    lines.append(f"| {one.name} | {size}{'' if one.fits else ', too many'} | {limit} | "
                 f"{one.seconds:.0f} |")
  if {"warmup", "adacs"} & {one.name for one in checked}:
    lines += ["", "warmup and adacs with every example in a row of its own: an upper bound."]
  return "\n".join(lines)


def require_fit(checked, config, model):
  """Refuses programs that do not fit: ValueError names them and what to turn."""
  over = [one.name for one in checked if not one.fits]
  if over:
    raise ValueError(f"{', '.join(over)} need more memory than a device has; "
                     f"{suggestions_for(over, config, model)}")


def compile_longest_first(config, model, end, workdir, note):
  """Before AEPO begins: compiles its longest shapes, where the first batch may have shorter ones.

  Raises:
    ValueError: they do not fit; names what to turn.
  """
  several = len(config.prompt.max_tokens) > 1 or len(config.aepo.row_tokens) > 1
  if several and config.aepo.steps and hosts.on_process_0(
      lambda: newest_step(os.path.join(workdir, "aepo"))) is None:
    require_fit(check_programs(config, model, end, note, ("aepo",)), config, model)


@contextlib.contextmanager
def suggest_on_oom(config, model):
  """Turns a device's "out of memory" into one line that says what to turn."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not _exhausted(error):
      raise
    raise ValueError(f"out of device memory: {one_line(error)[:200]}; the newest checkpoint is "
                     f"whole; {suggestions_for(NAMES, config, model)}") from error


def suggestions_for(names, config, model):
  """What to turn first, in one line."""
  found = [f"--config.{name}.microbatch={getattr(config, name).microbatch // 2}" for name in (
    "warmup", "adacs") if name in names and getattr(config, name).microbatch > 1]
  found += suggestions(names, config, model, len(jax.devices()))
  return f"turn first: {'; '.join(dict.fromkeys(found))}"


def _exhausted(error):
  return "RESOURCE_EXHAUSTED" in str(error)


def _limit():
  """Bytes of this process's first device, where its backend tells."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
