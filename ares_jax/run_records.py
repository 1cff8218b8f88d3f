"""Reads a run's folder: metrics by stage, logged responses, results."""

import dataclasses
import json
import os

from ml_collections import ConfigDict

from ares_jax.aepo import AepoConfig
from ares_jax.config import build
from ares_jax.run_folder import STAGES, read_json


@dataclasses.dataclass(frozen=True)
class Records:
  """What a run has written so far."""

  workdir: str
  config: dict  # config.json
  metrics: dict  # {stage: {step: line of metrics.jsonl}}
  rollouts: list  # lines of rollouts.jsonl
  held_out: list  # lines of held_out/STAGE.jsonl, stage after stage
  results: dict  # results.json; {} before the first stage has ended
  without_tokens: int  # lines of rollouts.jsonl without the entropies of their tokens

  def aepo_config(self):
    """AepoConfig of the run."""
    return build(AepoConfig, ConfigDict(self.config["aepo"]), "config.aepo")

  def aepo_metrics(self):
    """{step: line} of the AEPO stage, {} where it has not begun."""
    return self.metrics["aepo"]


def read(workdir):
  """Records of a folder, whose run may go on meanwhile.

  Raises:
    ValueError: there is no run in the folder, or a line is not what a run writes.
  """
  for name in ("config.json", "metrics.jsonl"):
    if not os.path.isfile(os.path.join(workdir, name)):
      raise ValueError(f"{os.path.join(workdir, name)} does not exist; --workdir is the folder of "
                       "a run of ares_jax.train")
  metrics = {stage: {} for stage in STAGES}
  for line in _lines(workdir, "metrics.jsonl"):
    metrics[line["stage"]][line["step"]] = line
  rollouts = list(_lines(workdir, "rollouts.jsonl"))
  # Runs of earlier versions wrote the text alone.
  whole = [line for line in rollouts if "tokens" in line]
  return Records(
    workdir, read_json(workdir, "config.json"), metrics, whole,
    [line for stage in STAGES for line in _lines(workdir, f"held_out/{stage}.jsonl")],
    read_json(workdir, "results.json"), len(rollouts) - len(whole))


def _lines(workdir, name):
  """Whole lines of a JSONL file; none where there is no file."""
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    return
  with open(path, "rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.endswith(b"\n"):
        return  # still being written
      try:
        yield json.loads(line)
      except ValueError as error:
        raise ValueError(
          f"{path} line {number} is not JSON ({error}); repair or move it") from error
