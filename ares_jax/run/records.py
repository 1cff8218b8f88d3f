"""Reads a run's folder: metrics by stage, logged responses, results."""

import collections.abc
import dataclasses
import itertools
import json
import os
import weakref

from ml_collections import ConfigDict

from ares_jax.run.config import AepoConfig
from ares_jax.run.files import current_names, read_json
from ares_jax.run.identity import STAGES
from ares_jax.system.config import build


class Lines(collections.abc.Sequence):
  """The whole lines of a JSONL file that are there now, each read when it is asked for.

  100 iterations of a 7B model log up to 1e8 tokens: as objects of Python they fill a machine. The
  file stays open: a run that resumes puts a shorter one in its place.
  """

  def __init__(self, path):
    """No file has no lines."""
    self._path, self._starts = path, [0]
    if os.path.exists(path):
      self._file = os.open(path, os.O_RDONLY)
      weakref.finalize(self, os.close, self._file)
      with open(self._file, "rb", closefd=False) as file:
        # The last one may still be being written.
        sizes = [len(line) for line in file if line.endswith(b"\n")]
      self._starts += itertools.accumulate(sizes)

  def __len__(self):
    return len(self._starts) - 1

  def __getitem__(self, number):
    number = range(len(self))[number]
    start, end = self._starts[number : number + 2]
    line = os.pread(self._file, end - start, start)
    try:
      return current_names(json.loads(line))
    except ValueError as error:
      raise ValueError(
        f"{self._path} line {number + 1} is not JSON ({error}); repair or move it") from error

  def drop_last(self):
    """Leaves out the last line; the file keeps it."""
    self._starts.pop()


@dataclasses.dataclass(frozen=True)
class Records:
  """What a run has written so far."""

  workdir: str
  config: dict  # config.json
  metrics: dict  # {stage: {step: line of metrics.jsonl}}
  rollouts: Lines  # of rollouts.jsonl, iterations that metrics.jsonl has
  held_out: list  # lines of held_out/STAGE.jsonl, stage after stage
  results: dict  # results.json; {} before the first stage has ended

  def aepo_config(self):
    """AepoConfig of the run."""
    return build(AepoConfig, ConfigDict(self.config["aepo"]), "config.aepo")

  def aepo_metrics(self):
    """{step: line} of the AEPO stage, {} where it has not begun."""
    return self.metrics["aepo"]


def read_run(workdir):
  """Records of a folder, whose run may go on meanwhile.

  Raises:
    ValueError: there is no run in the folder, or a line is not what a run writes.
  """
  for name in ("config.json", "metrics.jsonl"):
    if not os.path.isfile(os.path.join(workdir, name)):
      raise ValueError(f"{os.path.join(workdir, name)} does not exist; --workdir is the folder of "
                       "a run of ares_jax.train")
  metrics = {stage: {} for stage in STAGES}
  for line in Lines(os.path.join(workdir, "metrics.jsonl")):
    metrics[line["stage"]][line["step"]] = line
  rollouts = Lines(os.path.join(workdir, "rollouts.jsonl"))
  # Of the iteration that the run is in, the responses come before the metrics.
  last = max(metrics["aepo"], default=0)
  while rollouts and rollouts[-1]["step"] > last:
    rollouts.drop_last()
  return Records(
    workdir, read_json(workdir, "config.json"), metrics, rollouts,
    [line for stage in STAGES for line in Lines(os.path.join(workdir, f"held_out/{stage}.jsonl"))],
    read_json(workdir, "results.json"))
