"""Reads the folder of a run: metrics by stage, logged responses, results."""

import collections.abc
import dataclasses
import functools
import itertools
import json
import os
import weakref

from ml_collections import ConfigDict

from ares_jax.run.config import AepoConfig
from ares_jax.run.files import current_names, read_json
from ares_jax.run.identity import STAGES
from ares_jax.system.config import build

STEP = {"stage": str, "step": int}  # keys of every line that a step writes
_RESPONSE = STEP | {
  "id": str, "sample": int, "question": str, "answer": object, "images": list, "correct": object,
  "format_ok": object, "pass_rate": float | int, "tokens": list, "entropy": list}


class Lines(collections.abc.Sequence):
  """The lines of a JSONL file, each parsed when it is indexed.

  100 iterations of a 7B model log up to 1e8 tokens, too many to hold as Python objects. The file
  stays open, because a run that resumes replaces it by a shorter one.
  """

  def __init__(self, path, types=None):
    """Finds the lines that are complete now; a missing file is treated as empty.

    A line that lacks one of the keys of `types`, or has a value of another type there, is refused
    like one that is not JSON.
    """
    self._path, self._types, self._starts = path, types or {}, [0]
    if os.path.exists(path):
      self._file = os.open(path, os.O_RDONLY)
      weakref.finalize(self, os.close, self._file)
      with open(self._file, "rb", closefd=False) as file:
        # A run may be writing the last line.
        sizes = [len(line) for line in file if line.endswith(b"\n")]
      self._starts += itertools.accumulate(sizes)

  def __len__(self):
    return len(self._starts) - 1

  def __getitem__(self, number):
    number = range(len(self))[number]
    start, end = self._starts[number : number + 2]
    line = os.pread(self._file, end - start, start)
    where = f"{self._path} line {number + 1}"
    try:
      found = current_names(json.loads(line))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{where} is not JSON ({error}); repair or move it") from error
    missing = [key for key, kind in self._types.items() if not isinstance(found, dict)
               or key not in found or not isinstance(found[key], kind)]
    if missing:
      raise ValueError(f"{where} is no object with {' and '.join(missing)}; remove the line")
    return found

  def drop_last(self):
    """Removes the last line from this object; the file keeps it."""
    self._starts.pop()


@dataclasses.dataclass(frozen=True)
class Records:
  """The files of a run, as far as it has written them."""

  workdir: str | os.PathLike  # the folder; of a run in a bucket a BucketFolder
  config: dict  # config.json
  metrics: dict  # {stage: {step: line of metrics.jsonl, with that of the step's validation}}
  rollouts: Lines  # of rollouts.jsonl, for the iterations in metrics.jsonl
  held_out: list  # lines of held_out/STAGE.jsonl, stage after stage
  results: dict  # results.json; {} before the first stage has been evaluated
  first: dict = dataclasses.field(default_factory=dict)  # {stage: validation before its first step}

  def aepo_config(self):
    """AepoConfig of the run; ValueError where config.json is damaged."""
    if "aepo" not in self.config:
      raise ValueError(f"{os.path.join(self.workdir, 'config.json')} has no section aepo; restore "
                       "it, or remove it: the run's command writes it anew")
    return build(AepoConfig, ConfigDict(self.config["aepo"]), "config.aepo")


def read_run(workdir, notes=None):
  """Records of the run in a folder; the run may continue meanwhile.

  `notes`, a list, takes a line for each file and line that is damaged, which is then left out.

  Raises:
    ValueError: the folder holds no run; or a file or a line is damaged and there are no `notes`.
  """
  def usable(read, otherwise):
    try:
      return read()
    except ValueError as error:
      if notes is None:
        raise
      notes.append(str(error))
      return otherwise

  for path in (os.path.join(workdir, name) for name in ("config.json", "metrics.jsonl")):
    if not os.path.isfile(path):
      raise ValueError(f"{path} does not exist; --workdir is the folder of a run of ares_jax.train")
  def lines(name, types=_RESPONSE):
    found = Lines(os.path.join(workdir, name), types)
    read = (usable(functools.partial(found.__getitem__, number), None)
            for number in range(len(found)))
    return (line for line in read if line and line["stage"] in STAGES)

  metrics, first = {stage: {} for stage in STAGES}, {}
  for line in lines("metrics.jsonl", STEP):
    stage, step = line["stage"], line["step"]
    if step == 0:
      first[stage] = line
    # The line of a step comes first: a validation alone is what damage has left of it.
    elif step in metrics[stage] or not any(name.startswith("validate/") for name in line):
      metrics[stage][step] = metrics[stage].get(step, {}) | line
  rollouts = Lines(os.path.join(workdir, "rollouts.jsonl"), _RESPONSE)
  # A run writes the responses of an iteration before its metrics.
  last = max(metrics["aepo"], default=0)
  while rollouts and usable(lambda: rollouts[-1]["step"], last + 1) > last:
    rollouts.drop_last()
  held_out = [line for stage in STAGES for line in lines(f"held_out/{stage}.jsonl")]
  return Records(workdir, usable(lambda: read_json(workdir, "config.json"), {}), metrics, rollouts,
                 held_out, usable(lambda: read_results(workdir, ("bucket", "level")), {}), first)


def read_results(workdir, keys=()):
  """results.json; ValueError where it is damaged, or no evaluation of a stage with the `keys`."""
  results = read_json(workdir, "results.json")
  for stage, result in results.items():
    if stage not in STAGES or not isinstance(result, dict) or {*keys} - {*result}:
      raise ValueError(f"{os.path.join(workdir, 'results.json')} has no evaluation at {stage!r}; "
                       "restore it, or remove it: the run's command writes it anew")
  return results
