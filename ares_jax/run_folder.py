"""The folder of a run: its stages, which settings make it another run, files written whole."""

import json
import os

from ares_jax.checkpoint import newest

STAGES = ("warmup", "adacs", "aepo")  # in the order of a run; each saves in a folder of its name

# Settings that may change when a run goes on: how it reads, where it runs, how often it saves. None
# of them changes what comes out.
FREE = ("threads", "mesh.", "engine.", "grade.workers", "grade.timeout",
        *(f"{stage}.loop." for stage in STAGES))


def latest_stage(workdir):
  """Name of the last stage of a run that has a checkpoint.

  Raises:
    ValueError: none has.
  """
  for stage in reversed(STAGES):
    if newest(os.path.join(workdir, stage)) is not None:
      return stage
  raise ValueError(f"{workdir} has no checkpoint of {', '.join(STAGES)} yet; train there first")


def flat(values, prefix=""):
  """{"aepo.loss.clip_low": 0.2, ...} of nested dicts."""
  found = {}
  for key, value in values.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return found


def write_text(path, text):
  """Writes a file that is there whole or not at all."""
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    file.write(text)
  os.replace(path + ".tmp", path)


def write_json(path, value):
  """`write_text` of a JSON object."""
  write_text(path, json.dumps(value, indent=1) + "\n")
