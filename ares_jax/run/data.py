"""The data of a run: which rows each of its stages draws from, and which it cannot use."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from typing import Literal

from ares_jax.data import digits, validation
from ares_jax.data.sources import SourceConfig, open_sources
from ares_jax.run.files import write_text
from ares_jax.system import hosts
from ares_jax.system.config import setting

# What leaves out the stage that data are for.
_STEPS = {"lessons": "warmup.steps", "curated": "adacs.steps", "prompts": "aepo.steps"}


@dataclasses.dataclass(frozen=True)
class DigitsData:
  """The embedded problem: how many rows each stage draws from."""

  problem: digits.DigitsConfig
  teacher: digits.TeacherConfig
  curated: int = setting(first_read_by="adacs")
  prompts: int = setting(first_read_by="aepo")
  test: int


@dataclasses.dataclass(frozen=True)
class FilesData:
  """Files (data/sources.py has their schemas) for each stage; () where a stage does not run."""

  lessons: tuple[SourceConfig, ...]
  curated: tuple[SourceConfig, ...] = setting(first_read_by="adacs", curation=True)
  prompts: tuple[SourceConfig, ...] = setting(first_read_by="aepo")
  test: tuple[SourceConfig, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  digits: DigitsData | None = setting(curation=True)
  files: FilesData | None
  # Stop at a row that cannot be used, or quarantine it first.
  bad_rows: Literal["error", "skip"] = setting(curation=True)

  def __post_init__(self):
    if (self.digits is None) == (self.files is None):
      raise ValueError("exactly one of digits and files must be set, the other None")


class RunData:
  """Sources by name: "lessons", "curated", "prompts" and "test"."""

  def __init__(self, config, encoder, grader, workdir):
    """
    Args:
      config: setup.TrainConfig.
      encoder: data.prompts.Encoder.
      grader: data.grade.GradingPool.
      workdir: the run's folder, where bad rows are listed; None where none may be skipped.
    """
    self._config, self._encoder, self._grader = config, encoder, grader
    self._workdir, self._opened = workdir, {}

  def source(self, name):
    """Random access to the rows of `name`; ValueError where they cannot be read."""
    if name not in self._opened:
      data = self._config.data
      if data.files is None:
        self._opened[name] = self._digits(name)
      else:
        if not getattr(data.files, name):
          raise ValueError(f"data.files.{name} is empty; name files there"
                           + (f", or set {_STEPS[name]} = 0" if name in _STEPS else ""))
        opened = open_sources(getattr(data.files, name))
        self._opened[name] = (validation.without_bad_rows(opened,
                                                          hosts.on_process_0(
                                                            lambda: self._faults(name, opened)))
                              if data.bad_rows == "skip" else opened)
    return self._opened[name]

  def _faults(self, name, mixture):
    """The rows of each part that cannot be used, listed in WORKDIR/bad_rows.jsonl.

    The file holds for each of "lessons" ... a line of counts and then a line for each bad row. It
    is made anew where the data files or the limits have changed, or a listed row was mended.
    """
    if self._workdir is None:
      raise ValueError("data.bad_rows = 'skip' lists bad rows in the run's folder; this command "
                       "has none, set it to 'error'")
    path, lines = os.path.join(self._workdir, "bad_rows.jsonl"), []
    if os.path.exists(path):
      with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    known = [line for line in lines if line["data"] == name]
    checked, check = self._fingerprint(name, mixture), self._check(name)
    scan = functools.partial(validation.find_bad_rows, check=check, grader=self._grader,
                             threads=self._config.threads)
    faults, why = None, "files or limits have changed"
    if known and known[0]["checked"] == checked:
      faults = [[line for line in known[1:] if line["part"] == part]
                for part in range(len(mixture.parts))]
      # Images are files of their own, and may be mended where no data file changes.
      if any(len(scan(part, numbers=[fault["number"] for fault in bad])) < len(bad)
             for part, bad in zip(mixture.parts, faults, strict=True)):
        faults, why = None, "listed rows were mended"
    if faults is None:
      if known:
        print(f"{name!r} data: {why} since {path} was made; looking at all rows again",
              file=sys.stderr, flush=True)
      faults = [scan(part, numbers=range(len(part))) for part in mixture.parts]
      self._list(name, path, lines, checked, mixture, faults)
    for part in validation.count_rows(mixture, faults):
      print(f"{name!r} data, {part['source']}: {part['used']} of {part['rows']} rows used, "
            f"{part['quarantined']} quarantined {part['reasons'] or ''} {path}", file=sys.stderr,
            flush=True)
    return faults

  def _list(self, name, path, lines, checked, mixture, faults):
    """Writes `lines` with those of `name` in the place of its old ones."""
    lines = [line for line in lines if line["data"] != name]
    lines += [{"data": name, "checked": checked, "counts": validation.count_rows(mixture, faults)}]
    lines += [{"data": name, "part": part} | fault
              for part, bad in enumerate(faults) for fault in bad]
    os.makedirs(self._workdir, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

  def _check(self, name):
    """Function of a row that raises BadRow where the stage cannot use it."""
    config = self._config
    if name == "lessons":
      return functools.partial(validation.check_sft_row, self._encoder,
                               row_tokens=config.warmup.row_tokens,
                               row_windows=config.warmup.row_windows)
    if name == "curated":
      column = config.curate.pass_rates == "column"
      return functools.partial(validation.check_curation_row, self._encoder,
                               samples=config.curate.samples if column else None,
                               row_tokens=config.adacs.row_tokens,
                               row_windows=config.adacs.row_windows)
    return functools.partial(validation.check_rl_row, self._encoder)

  def _fingerprint(self, name, mixture):
    """16 hex digits of all that decides which rows are bad, except the images."""
    config, files = self._config, []
    for path in (path for part in mixture.parts for path in part.files):
      stat = path.stat()
      files.append([path.name, stat.length, stat.mtime])
    decides = [dataclasses.asdict(source) for source in getattr(config.data.files, name)]
    decides += [[len(part) for part in mixture.parts], files, dataclasses.asdict(config.prompt),
                config.grade.grader, config.model.path, config.warmup.row_tokens,
                config.warmup.row_windows, config.adacs.row_tokens, config.adacs.row_windows,
                config.curate.pass_rates, config.curate.samples]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

  def _digits(self, name):
    data, seed, warmup = self._config.data.digits, self._config.seed, self._config.warmup
    # Training rows differ by seed and stage; the test rows are the same for every seed.
    split, seed = ("test", 0) if name == "test" else (
      "train", 10 * seed + ("lessons", "curated", "prompts").index(name))
    # The course has an order: it is exactly as long as the warm-up.
    size = {"lessons": max(1, warmup.steps * warmup.batch), "curated": data.curated,
            "prompts": data.prompts, "test": data.test}[name]
    problems = digits.DigitsSource(data.problem, split, seed, size)
    if name == "lessons":
      return digits.Lessons(problems, data.teacher)
    return digits.Teacher(problems, data.teacher) if name == "curated" else problems

  def check_truths(self, name):
    """Reads all rows once; ValueError names truths that count as wrong when a model writes them.

    The digits' truths are digits and are not read; `skip` has read all.
    """
    if self._config.data.files is None or self._config.data.bad_rows == "skip":
      return
    source = self.source(name)
    bad = list(self._grader.bad_truths(source[number] for number in range(len(source))))
    if bad:
      shown = ", ".join(f"{row}: {truth!r}" for row, truth in bad[:8])
      raise ValueError(f"{len(bad)} of {len(source)} truths of the {name!r} data count as wrong "
                       f"when a model writes them: {shown}; mend or remove these rows")
