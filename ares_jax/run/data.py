"""The data of a run: the rows that each stage draws from, and those that cannot be used."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from typing import Literal

from ares_jax.data import digits, digits_teacher, validation
from ares_jax.data.bad_row import printable
from ares_jax.data.curation.pass_rates import candidate_responses, column_passes
from ares_jax.data.sources import SourceConfig, open_sources
from ares_jax.run.files import RENAMED_DATA, write_text
from ares_jax.system import hosts
from ares_jax.system.config import setting

# The stage that draws from each kind of data. "eval" is for the evaluation after every stage.
STAGE_OF = {"warmup": "warmup", "sft": "adacs", "rl": "aepo"}
_LEARNT = ("warmup",)  # kinds whose answers are learnt and never graded: they need no truth


@dataclasses.dataclass(frozen=True)
class DigitsData:
  """The embedded problem. Rows of each kind; the warm-up's follow from its steps and batch."""

  problem: digits.DigitsConfig
  teacher: digits_teacher.TeacherConfig
  sft: int = setting(first_read_by="adacs")
  rl: int = setting(first_read_by="aepo")
  eval: int

  def __post_init__(self):
    if self.teacher.warmup_smudge and not self.problem.smudge:
      raise ValueError("teacher.warmup_smudge needs problem.smudge > 0: without it no picture has "
                       "smudged cells and copies")


@dataclasses.dataclass(frozen=True)
class FilesData:
  """Files of each kind (schemas: data/files/schemas.json); () where a stage does not run."""

  warmup: tuple[SourceConfig, ...]
  sft: tuple[SourceConfig, ...] = setting(first_read_by="adacs", curation=True)
  rl: tuple[SourceConfig, ...] = setting(first_read_by="aepo")
  eval: tuple[SourceConfig, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where rows come from: files, or the digits problem."""

  digits: DigitsData | None = setting(curation=True)
  files: FilesData | None
  # Stop at a row that cannot be used, or list such rows first and leave them out.
  bad_rows: Literal["error", "skip"] = setting(curation=True)

  def __post_init__(self):
    if (self.digits is None) == (self.files is None):
      raise ValueError("exactly one of digits and files must be set, the other None")


class RunData:
  """The sources of a run, by kind: "warmup", "sft", "rl" and "eval"."""

  def __init__(self, config, encoder, grader, workdir):
    """Of a TrainConfig, Encoder and GradingPool; bad rows are listed in `workdir`, if any."""
    self._config, self._encoder, self._grader = config, encoder, grader
    self._workdir, self._opened = workdir, {}

  def source(self, kind):
    """Random access to the rows of a kind of data.

    Raises:
      ValueError: no files are named, or they cannot be read, or none of their rows can be used.
    """
    if kind not in self._opened:
      from_files = self._config.data.files is not None
      self._opened[kind] = self._open_files(kind) if from_files else self._open_digits(kind)
    return self._opened[kind]

  def check_truths(self, kind):
    """Reads all rows once; ValueError names truths that no answer can meet."""
    # Truths of the digits problem are right, and "skip" has looked at all rows already.
    if self._config.data.files is None or self._config.data.bad_rows == "skip":
      return
    source = self.source(kind)
    rows = ({"id": row["id"], "answer": row["answer"]}
            for row in map(source.__getitem__, range(len(source))))
    bad = list(validation.bad_truths(rows, self._grader))
    if bad:
      shown = "; ".join(f"{printable(row['id'])}: {reason}" for row, reason in bad[:8])
      raise ValueError(f"{len(bad)} of {len(source)} truths of the {kind!r} data cannot be met: "
                       f"{shown}; mend or remove these rows")

  def examine(self, kind, numbers, measure):
    """Yields validation.Examined of the rows with these numbers: the same decision as training's.

    Rows that "skip" has left out already are not in the source, and not counted.
    """
    return self._examine(kind, validation.examine)(self.source(kind), numbers=numbers,
                                                   measure=measure)

  def _open_digits(self, kind):
    data, config = self._config.data.digits, self._config
    if kind == "eval":
      return digits.DigitsSource(data.problem, "test", 0, data.eval)  # the same for every seed
    # The order of the warm-up's rows matters, so there are exactly as many as it takes.
    sizes = {"warmup": max(1, config.warmup.steps * config.warmup.batch), "sft": data.sft,
             "rl": data.rl}
    seed = 10 * config.seed + tuple(STAGE_OF).index(kind)
    problems = digits.DigitsSource(data.problem, "train", seed, sizes[kind])
    if kind == "warmup":
      return digits_teacher.WarmupSource(problems, data.teacher)
    return digits_teacher.Teacher(problems, data.teacher) if kind == "sft" else problems

  def _open_files(self, kind):
    sources = getattr(self._config.data.files, kind)
    if not sources:
      leave_out = f", or set {STAGE_OF[kind]}.steps = 0" if kind in STAGE_OF else ""
      raise ValueError(f"data.files.{kind} is empty; name files there{leave_out}")
    mixture = open_sources(sources, kind, truths=kind not in _LEARNT,
                           columns=bool(self._config.reward.function))
    if self._config.data.bad_rows == "error":
      return mixture
    return validation.without_bad_rows(
      mixture, hosts.on_process_0(lambda: self._bad_rows(kind, mixture)))

  def _bad_rows(self, kind, mixture):
    """The bad rows of each part of a Mixture, as listed in WORKDIR/bad_rows.jsonl.

    For each kind of data the file has a line of counts and then a line for each bad row. All rows
    are looked at again when the data files or the limits have changed, or a listed row was mended.
    """
    if self._workdir is None:
      raise ValueError("data.bad_rows = 'skip' lists bad rows in the run's folder; this command "
                       "has none, set it to 'error'")
    path, shown = os.path.join(self._workdir, "bad_rows.jsonl"), f"{self._workdir}/bad_rows.jsonl"
    lines = []
    if os.path.exists(path):
      try:
        with open(path, "rb") as file:
          lines = [json.loads(line) for line in file]
        for line in lines:
          line["data"] = RENAMED_DATA.get(line["data"], line["data"])
      except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{shown} is damaged ({error}); remove it: the same command looks at all "
                         "rows again") from error
    listed = [line for line in lines if line["data"] == kind]
    bad = [[line for line in listed[1:] if line["part"] == part]
           for part in range(len(mixture.parts))]
    checked = self._fingerprint(kind, mixture)
    scan = self._examine(kind, validation.find_bad_rows)
    note = functools.partial(print, file=sys.stderr, flush=True)
    outdated = ""
    if listed and listed[0]["checked"] != checked:
      outdated = "files or limits have changed"
    elif any(len(scan(part, numbers=[row["number"] for row in rows])) < len(rows)
             for part, rows in zip(mixture.parts, bad, strict=True)):
      # Images are files of their own, and may be mended where no data file changes.
      outdated = "listed rows were mended"
    if outdated:
      note(f"{kind!r} data: {outdated} since {shown} was made; looking at all rows again")
    if outdated or not listed:
      bad = [scan(part, numbers=range(len(part))) for part in mixture.parts]
      others = [line for line in lines if line["data"] != kind]
      head = {"data": kind, "checked": checked, "counts": validation.count_rows(mixture, bad)}
      rows = [{"data": kind, "part": part} | row for part, found in enumerate(bad) for row in found]
      os.makedirs(self._workdir, exist_ok=True)
      write_text(path, "".join(json.dumps(line) + "\n" for line in (*others, head, *rows)))
    for part in validation.count_rows(mixture, bad):
      note(f"{kind!r} data, {printable(part['source'])}: {part['used']} of {part['rows']} rows "
            f"used, {part['quarantined']} quarantined {part['reasons'] or ''} {shown}")
    return bad

  def _examine(self, kind, function):
    """`function`, of validation.py, with what decides which rows of a kind are bad."""
    return functools.partial(function, check=self._check(kind), threads=self._config.threads,
                             grader=None if kind in _LEARNT else self._grader)

  def _check(self, kind):
    """Function of a row: its EncodedPrompt, or BadRow where the stage cannot use it."""
    if kind not in ("warmup", "sft"):
      return self._encoder.encode
    section, curate = getattr(self._config, STAGE_OF[kind]), self._config.curate

    def check(row):
      if kind == "sft" and curate.pass_rates == "column":
        column_passes(row, curate.samples)
      responses = candidate_responses(row) if kind == "sft" else [row.get("response")]
      return validation.check_responses(self._encoder, row, responses,
                                        row_tokens=section.row_tokens,
                                        row_windows=section.row_windows)

    return check

  def _fingerprint(self, kind, mixture):
    """16 hex digits of all that decides which rows are bad, except the images."""
    config = self._config
    paths = [path for part in mixture.parts for path in part.files]
    files = [[path.name, path.stat().length, path.stat().mtime] for path in paths]
    decides = [dataclasses.asdict(source) for source in getattr(config.data.files, kind)]
    decides += [[len(part) for part in mixture.parts], files, dataclasses.asdict(config.prompt),
                config.grade.grader, config.model.path, config.warmup.row_tokens,
                config.warmup.row_windows, config.adacs.row_tokens, config.adacs.row_windows,
                config.curate.pass_rates, config.curate.samples]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
