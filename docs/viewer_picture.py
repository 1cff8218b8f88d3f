"""Draws docs/viewer.png: one problem before and after AEPO, in the report of a finished run.

    python -m ares_jax.train --config=configs/ares_tiny.py
    python -m docs.viewer_picture --workdir=runs/ares_tiny [--out=FILE]

It needs Chromium (or Chrome) on PATH. It chooses a problem that the model got wrong after AdaCS and
right after AEPO, with the most high-window-entropy tokens in the wrong answer. Nothing in the run's
folder is changed.
"""

import argparse
import io
import pathlib
import sys
import tempfile

from PIL import Image

from ares_jax.report.page import report_page
from ares_jax.run.records import read_run

DOCS = pathlib.Path(__file__).parent
sys.path.append(str(DOCS.parent / "tests"))
import browser  # noqa: E402

# Shows the two answers alone and reads out the trigger word, or else the first flagged token.
CHOOSE = """(() => {
  const answers = (stage, correct) => data.responses.filter((one) =>
    one.held_out && one.stage === stage && Boolean(one.correct) === correct);
  const late = answers("aepo", true), solved = new Set(late.map((one) => one.id));
  const wrong = answers("adacs", false).filter((one) => solved.has(one.id));
  if (!wrong.length) throw new Error("no held-out problem is wrong after adacs, right after aepo");
  const early = wrong.reduce((best, one) => one.count > best.count ? one : best);
  const all = data.responses.filter((one) => one.id === early.id);
  const choose = (name, value) => {
    at(name).value = value;
    at(name).dispatchEvent(new Event("change"));
  };
  choose("problem", early.id);
  choose("left", all.indexOf(early));
  choose("right", all.indexOf(late.find((one) => one.id === early.id)));
  const token = document.querySelector("#pair .trigger") || document.querySelector("#pair .flag");
  token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  for (const part of document.querySelectorAll("body > header, main > section")) {
    part.hidden = part.id !== "compare";
  }
  at("compare").firstElementChild.style.marginTop = "12px";
})()"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="folder of a finished run")
  parser.add_argument("--out", default=DOCS / "viewer.png", type=pathlib.Path)
  options = parser.parse_args()
  if browser.program() is None:
    parser.error("no Chromium on PATH")
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    page_file = pathlib.Path(folder) / "report.html"
    page_file.write_text(report_page(read_run(options.workdir), []), encoding="utf-8")
    with browser.browse(folder, width=1100, scale=2) as page:
      page.open(page_file.as_uri())
      page.run(CHOOSE)
      picture = page.screenshot("main")
  # 256 colours take a third of the bytes and look the same.
  image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
  image.save(options.out, optimize=True)
  print(f"wrote {options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
  main()
