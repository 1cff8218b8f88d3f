"""The data of a run: which rows each of its stages draws from."""

import dataclasses

from ares_jax.data import digits
from ares_jax.data.sources import SourceConfig, open_sources


@dataclasses.dataclass(frozen=True)
class DigitsData:
  """The embedded problem: how many rows each stage draws from."""

  problem: digits.DigitsConfig
  teacher: digits.TeacherConfig
  curated: int
  prompts: int
  test: int


@dataclasses.dataclass(frozen=True)
class FilesData:
  """Files (data/sources.py has their schemas) for each stage; () where a stage does not run."""

  lessons: tuple[SourceConfig, ...]
  curated: tuple[SourceConfig, ...]
  prompts: tuple[SourceConfig, ...]
  test: tuple[SourceConfig, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  digits: DigitsData | None
  files: FilesData | None

  def __post_init__(self):
    if (self.digits is None) == (self.files is None):
      raise ValueError("exactly one of digits and files must be set, the other None")


class RunData:
  """Sources by name: "lessons", "curated", "prompts" and "test"."""

  def __init__(self, config, grader):
    """
    Args:
      config: setup.TrainConfig.
      grader: data.grade.GradingPool.
    """
    self._config, self._grader = config, grader
    self._opened = {}

  def source(self, name):
    """Random access to the rows of `name`; ValueError where they cannot be read."""
    if name not in self._opened:
      data = self._config.data
      self._opened[name] = (open_sources(getattr(data.files, name)) if data.files is not None
                            else self._digits(name))
    return self._opened[name]

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

    The digits' truths are digits and are not read.
    """
    if self._config.data.files is None:
      return
    source = self.source(name)
    bad = list(self._grader.bad_truths(source[number] for number in range(len(source))))
    if bad:
      shown = ", ".join(f"{row}: {truth!r}" for row, truth in bad[:8])
      raise ValueError(f"{len(bad)} of {len(source)} truths of the {name!r} data count as wrong "
                       f"when a model writes them: {shown}; mend or remove these rows")
