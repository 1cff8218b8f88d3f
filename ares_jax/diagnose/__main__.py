"""The paper's own checks, on what a run has logged so far.

    python -m ares_jax.diagnose hwe --workdir=runs/ares_tiny [--labels=FILE]
    python -m ares_jax.diagnose kl --workdir=runs/ares_tiny
    python -m ares_jax.diagnose passk --workdir=runs/ares_tiny

hwe: do windows of high entropy find the words that mark a turn in reasoning (figure 2a)? FILE holds
JSON lines of step, id, sample and triggers, the places of labelled tokens; default: V_sem.
kl: does the controller hold the KL outside windows at its target, and would it at other rates?
passk: how often do 2, 4, 8, 16 samples put a problem into another bucket than 64 would?
"""

import json

import jax
from absl import flags

from ares_jax.command import UsageError, run
from ares_jax.diagnose import hwe, kl, passk
from ares_jax.run_records import read

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", allow_override=True)
_LABELS = flags.DEFINE_string("labels", None, "hwe: JSON lines of labelled triggers.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object on stdout.", allow_override=True)


def main(check):
  if not _WORKDIR.value:
    raise UsageError("pass --workdir=DIR, a run's folder")
  if check not in ("hwe", "kl", "passk"):
    raise UsageError(f"unknown check {check!r}; say hwe, kl or passk")
  # A run that goes on holds the accelerator.
  jax.config.update("jax_platforms", "cpu")
  records = read(_WORKDIR.value)
  if check == "hwe":
    labelled = hwe.labels(_LABELS.value) if _LABELS.value else None
    result, text = hwe.check(records, labelled), hwe.text
  elif check == "kl":
    result, text = kl.check(records), kl.text
  else:
    result, text = passk.check(records), passk.text
  print(json.dumps(result) if _JSON.value else text(result))


if __name__ == "__main__":
  run(main, positional=("check",))
