"""Shows a config's data before anything trains on them.

    python -m ares_jax.inspect_data --config=configs/aepo_7b.py --config.model.path=HF_FOLDER

Prints for each stage its sources, lengths, image sizes, rows that cannot be used, and tokens per
epoch. OUT/index.html shows the same, with a histogram (also OUT/STAGE_lengths.png) and ten rendered
examples of each stage.
--rows=N looks at N rows spread over each stage's data (0: all rows). Lengths are computed from
image headers, so damage after a header shows only where a row is rendered.
"""

import dataclasses
import os

import numpy as np
from absl import flags
from ml_collections import config_flags

from ares_jax.inspect_data import page, summary
from ares_jax.run.config import read_config
from ares_jax.run.files import write_text
from ares_jax.run.setup import open_run
from ares_jax.system.command import require_config, run

STAGES = ("warmup", "sft", "rl", "eval")


def main():
  words = flags.FLAGS
  config = read_config(require_config(words.config))
  os.makedirs(words.out, exist_ok=True)
  with open_run(config, workdir=os.path.abspath(words.out), check=False) as parts:
    inspect(parts, words.out, rows=words.rows, stages=words.stages)


def inspect(parts, out, *, rows, stages):
  """Prints the summaries and writes the page.

  Args:
    parts: setup.Run.
    out: folder for index.html and the histograms.
    rows: looked at in each stage's data, evenly spread; 0 is all.
    stages: of STAGES; those whose data the config leaves out are passed over.
  """
  config, encoder, sections = parts.config, parts.generator.encoder, []
  for name in stages:
    if config.data.files is not None and not getattr(config.data.files, name):
      print(f"{name}: no source in config.data.files")
      continue
    source = parts.source(name)
    found = summary.summarize(source, encoder, rows=rows, threads=config.threads)
    group = config.aepo.group if name == "rl" else config.evaluate.samples
    text = summary.summary_text(name, source, found, limit=encoder.config.max_tokens[-1],
                                group=group, answer=config.aepo.sampling.max_tokens)
    print(text)
    pictures = []
    if found.tokens:
      picture = os.path.join(out, f"{name}_lengths.png")
      page.histogram_png(found.tokens, picture, title=f"{name}: prompt tokens")
      pictures.append(page.picture_html(picture, f"histogram of prompt tokens of {name}"))
    places = np.linspace(0, len(source) - 1, min(10, len(source))).astype(int)
    sections.append((name, text, pictures + [page.example_html(source, encoder, int(place))
                                             for place in places]))
  path = os.path.join(out, "index.html")
  write_text(path, page.inspect_html(dataclasses.asdict(encoder.config), sections))
  print(f"examples: {path}")


def define_flags():
  """Not at import: two commands in one process would define --config twice."""
  config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
  flags.DEFINE_string("out", "inspect", "Folder to write.")
  flags.DEFINE_integer("rows", 2000, "Rows looked at in each stage's data; 0 is all.",
                       lower_bound=0)
  flags.DEFINE_list("stages", list(STAGES), f"Some of {', '.join(STAGES)}.")


if __name__ == "__main__":
  define_flags()
  run(main)
