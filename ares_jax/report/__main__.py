"""Writes one self-contained HTML page of a run: its curves, and its responses token by token.

    python -m ares_jax.report --workdir=runs/ares_tiny
    python -m ares_jax.report --workdir=runs/a --compare=runs/b,runs/c --png

The page is WORKDIR/report.html and needs no network. --png also writes the pictures into
WORKDIR/report/ and as TensorBoard images. Runs given with --compare are drawn into the same curves.
The run may still be in progress.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("report")

import contextlib
import os
import sys

import jax
from absl import flags

from ares_jax.report.page import report_page
from ares_jax.report.pictures import write_pictures
from ares_jax.run.bucket import open_folder
from ares_jax.run.files import write_text
from ares_jax.run.records import read_run
from ares_jax.system.command import UsageError, run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", allow_override=True)
_COMPARE = flags.DEFINE_multi_string(
  "compare", [], "Folders of other runs, comma-separated; may be repeated.",
  allow_override=True)
_OUT = flags.DEFINE_string("out", None, "File to write; default WORKDIR/report.html.",
                           allow_override=True)
_PNG = flags.DEFINE_bool("png", False, "Also write the pictures as PNG and as TensorBoard images.",
                         allow_override=True)


def main():
  if not _WORKDIR.value:
    raise UsageError("pass --workdir=DIR, a run's folder")
  # A run that goes on holds the accelerator.
  jax.config.update("jax_platforms", "cpu")
  folders = [_WORKDIR.value, *(folder for word in _COMPARE.value for folder in word.split(","))]
  with contextlib.ExitStack() as stack:
    notes = []
    records, *others = (read_run(stack.enter_context(open_folder(folder)), notes)
                        for folder in folders)
    out = _OUT.value or os.path.join(records.workdir, "report.html")
    text = report_page(records, others, notes)
    write_text(out, text)
    for note in notes:
      print(f"left out: {note}", file=sys.stderr)
    shown = _OUT.value or f"{records.workdir}/report.html"
    print(f"wrote {shown}: {len(text.encode()) / 1e6:.1f} MB, {len(records.rollouts)} rollouts, "
          f"{len(records.held_out)} held-out answers")
    if _PNG.value:
      for path in write_pictures(records, others, os.path.join(records.workdir, "report")):
        print(f"wrote {records.workdir}/report/{os.path.basename(path)}")


if __name__ == "__main__":
  run(main)
