"""The best value of a stage's metric: which checkpoint is kept for it, when the stage ends early.

Both follow from metrics.jsonl alone, so a run that resumes decides as one that was not stopped.
"""

import math
import os
import tempfile

from etils import epath

from ares_jax.run.checkpoint.reader import all_steps
from ares_jax.run.identity import stage_folder
from ares_jax.run.records import STEP, Lines
from ares_jax.system.config import suggest
from ares_jax.system.gcs import bucket_errors

VALIDATION = "validate/"  # begins the names of the metrics of a validation


class Best:
  """The best value so far of the metric that a LoopConfig names, and its step."""

  def __init__(self, config, lines=()):
    """Reads the `lines` of the stage in metrics.jsonl that are already there.

    `config.keep_best` is a metric of which more is better, or "-METRIC" of which less is.
    """
    self._metric, self._patience = config.keep_best.lstrip("-"), config.patience
    self._sign = -1.0 if config.keep_best.startswith("-") else 1.0
    self.step, self._best, self._since = None, None, 0
    self.validated = None  # the last step whose weights were validated
    for line in lines:
      self.see(line["step"], line)

  def see(self, step, metrics):
    """Takes the metrics of a step; returns whether their value is the best so far.

    Raises:
      ValueError: the metric is one of a validation, but no validation has it.
    """
    is_validation = any(name.startswith(VALIDATION) for name in metrics)
    if is_validation:
      self.validated = step
    value = metrics.get(self._metric)
    if value is None:
      if is_validation and self._metric.startswith(VALIDATION) and self._metric not in metrics:
        raise ValueError(f"loop.keep_best names {self._metric!r}, which no validation measures"
                         f"{suggest(self._metric, [*metrics])}")
      return False
    value = float(value)
    if not math.isfinite(value):
      return False
    if self._best is not None and not self._sign * value > self._sign * self._best:
      self._since += 1
      return False
    self.step, self._best, self._since = step, value, 0
    return True

  @property
  def ends_stage(self):
    """Whether `config.patience` values in a row were not the best; never with a patience of 0."""
    return 0 < self._patience <= self._since

  def note(self):
    """The best value for the progress bar; "" without one."""
    return "" if self._best is None else f"best {self._best:.3g} at {self.step}"


def lines_of(config, workdir, stage, last=math.inf):
  """What `Best` reads of a stage's lines in WORKDIR/metrics.jsonl, up to step `last`."""
  metric = config.keep_best.lstrip("-")
  return [{name: value for name, value in line.items()
           if name in ("step", metric) or name.startswith(VALIDATION)}
          for line in Lines(os.path.join(workdir, "metrics.jsonl"), STEP)
          if line["stage"] == stage and line["step"] <= last]


def best_step(workdir, stage, config):
  """The step of a stage's best checkpoint, by its LoopConfig; ValueError without one."""
  if not config.keep_best:
    raise ValueError(f"{workdir} kept no best checkpoint: {stage}.loop.keep_best was not set; "
                     "leave out --best for the newest one")
  saved = all_steps(stage_folder(workdir, stage))
  with tempfile.TemporaryDirectory() as copy, bucket_errors(workdir):
    log = epath.Path(workdir) / "metrics.jsonl"
    if log.exists():
      log.copy(epath.Path(copy) / log.name)
    lines = lines_of(config, copy, stage)
  # A better one may be missing, if its save failed. Step 0 has no checkpoint.
  best = Best(config, [line for line in lines if line["step"] in {0, *saved}]).step
  if best not in saved:
    raise ValueError(f"{workdir} has no checkpoint of {stage} at step {best}, the best by "
                     f"{config.keep_best}; there are {saved}")
  return best
