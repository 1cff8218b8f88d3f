"""Runs the paper's own checks on what runs have logged so far.

    python -m ares_jax.diagnose hwe --workdir=runs/ares_tiny [--labels=FILE]
    python -m ares_jax.diagnose kl --workdir=runs/ares_tiny
    python -m ares_jax.diagnose passk --workdir=runs/ares_tiny
    python -m ares_jax.diagnose ablation --workdir=runs/ares_tiny --compare=runs/uniform

hwe: do windows of high entropy find the words that mark a turn in the reasoning (figure 2a)? FILE
holds JSON lines with step, id, sample and triggers, the positions of labelled tokens; without it
the words of V_sem are used.
kl: does the controller hold the KL outside windows at its target, and would it at other rates?
passk: how often do 2, 4, 8 or 16 samples put a problem into another bucket than 64 do?
ablation: compares finished runs that shape all problems alike (--config.aepo.reward.easy=1.0
--config.aepo.reward.medium=0.0) with runs that shape by difficulty, on easy and on hard problems.
--png writes the pictures of hwe, kl and ablation into WORKDIR/diagnose/.
"""

import functools
import json
import os
import sys

import jax
from absl import flags

from ares_jax.diagnose import ablation, hwe, kl, passk, pictures
from ares_jax.run.records import read_run
from ares_jax.system.command import UsageError, run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", allow_override=True)
_COMPARE = flags.DEFINE_multi_string(
  "compare", [], "ablation: folders of other runs, comma-separated; may be repeated.",
  allow_override=True)
_LABELS = flags.DEFINE_string("labels", None, "hwe: JSON lines of labelled triggers.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object on stdout.", allow_override=True)
_PNG = flags.DEFINE_bool("png", False, "Also write the pictures as PNG.", allow_override=True)
CHECKS = ("hwe", "kl", "passk", "ablation")


def main(check):
  if not _WORKDIR.value:
    raise UsageError("pass --workdir=DIR, a run's folder")
  if check not in CHECKS:
    raise UsageError(f"unknown check {check!r}; say {', '.join(CHECKS[:-1])} or {CHECKS[-1]}")
  # A run that goes on holds the accelerator.
  jax.config.update("jax_platforms", "cpu")
  if check == "ablation":
    others = [folder for word in _COMPARE.value for folder in word.split(",")]
    result = ablation.measure_ablation([_WORKDIR.value, *others])
    told, drawn = ablation.ablation_text, pictures.ablation_picture
  else:
    records = read_run(_WORKDIR.value)
    if check == "hwe":
      labelled = hwe.read_labels(_LABELS.value) if _LABELS.value else None
      result, told, drawn = hwe.measure_hwe(records, labelled), hwe.hwe_text, pictures.hwe_picture
    elif check == "kl":
      result, told = kl.measure_kl(records), kl.kl_text
      drawn = functools.partial(pictures.kl_picture, records=records)
    else:
      result, told, drawn = passk.measure_passk(records), passk.passk_text, lambda _: {}
  print(json.dumps(result) if _JSON.value else told(result))
  if _PNG.value:
    for path in pictures.write_pictures(drawn(result), os.path.join(_WORKDIR.value, "diagnose")):
      print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
  run(main, positional=("check",))
