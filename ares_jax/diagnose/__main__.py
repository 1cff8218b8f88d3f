"""Runs the paper's own checks on the logs of finished or running runs.

    python -m ares_jax.diagnose hwe --workdir=runs/ares_tiny [--labels=FILE]
    python -m ares_jax.diagnose kl --workdir=runs/ares_tiny
    python -m ares_jax.diagnose terms --workdir=runs/ares_tiny
    python -m ares_jax.diagnose passk --workdir=runs/ares_tiny
    python -m ares_jax.diagnose ablation --workdir=runs/ares_tiny --compare=runs/uniform

hwe: do windows of high entropy find the words that mark a turn in the reasoning (figure 2a)? FILE
holds JSON lines with step, id, sample and triggers, the indices of labelled tokens; without it the
words of V_sem count as triggers.
kl: does the controller hold the KL outside windows at its target, and would it at other rates?
terms: how much of the updates comes from the entropy term and from the KL term?
passk: how often do 2, 4, 8 or 16 samples put a problem into another bucket than 64 do?
ablation: compares finished runs that shape all problems alike (--config.aepo.reward.easy=1.0
--config.aepo.reward.medium=0.0) with runs that shape by difficulty, on easy and on hard problems.
--png writes the check's pictures into WORKDIR/diagnose/.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("diagnose")

import json
import os
import sys

import jax
from absl import flags

from ares_jax.diagnose import ablation, hwe, kl, passk, terms
from ares_jax.run.bucket import open_folder
from ares_jax.run.records import read_run
from ares_jax.system import figures
from ares_jax.system.command import UsageError, run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", allow_override=True)
_COMPARE = flags.DEFINE_multi_string(
  "compare", [], "ablation: folders of other runs, comma-separated; may be repeated.",
  allow_override=True)
_LABELS = flags.DEFINE_string("labels", None, "hwe: JSON lines of labelled triggers.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object on stdout.", allow_override=True)
_PNG = flags.DEFINE_bool("png", False, "Also write the pictures as PNG.", allow_override=True)


def _measure_hwe(workdir):
  labels = hwe.read_labels(_LABELS.value) if _LABELS.value else None
  return hwe.measure_hwe(read_run(workdir), labels)


def _measure_ablation(_):
  others = [folder for text in _COMPARE.value for folder in text.split(",")]
  return ablation.measure_ablation([_WORKDIR.value, *others])


# {name: (folder -> result, result -> text, result -> {name: figure})}
CHECKS = {
  "hwe": (_measure_hwe, hwe.hwe_text, hwe.hwe_pictures),
  "kl": (lambda workdir: kl.measure_kl(read_run(workdir)), kl.kl_text, kl.kl_pictures),
  "terms": (lambda workdir: terms.measure_terms(read_run(workdir)), terms.terms_text,
            terms.terms_pictures),
  "passk": (lambda workdir: passk.measure_passk(read_run(workdir)), passk.passk_text,
            passk.passk_pictures),
  "ablation": (_measure_ablation, ablation.ablation_text, ablation.ablation_pictures),
}


def main(name):
  if not _WORKDIR.value:
    raise UsageError("pass --workdir=DIR, a run's folder")
  if name not in CHECKS:
    raise UsageError(f"unknown check {name!r}; use one of {', '.join(CHECKS)}")
  # A run that is still going on holds the accelerator.
  jax.config.update("jax_platforms", "cpu")
  measure, text, pictures = CHECKS[name]
  with open_folder(_WORKDIR.value) as workdir:
    result = measure(workdir)
    print(json.dumps(result) if _JSON.value else text(result))
    if _PNG.value:
      for path in figures.save_pngs(pictures(result), os.path.join(workdir, "diagnose")):
        print(f"wrote {workdir}/diagnose/{os.path.basename(path)}", file=sys.stderr)


if __name__ == "__main__":
  run(main, positional=("check",))
