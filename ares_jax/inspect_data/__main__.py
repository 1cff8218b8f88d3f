"""Shows a config's data before training.

    python -m ares_jax.inspect_data --config=configs/aepo_7b.py --config.model.path=HF_FOLDER

Prints sources, lengths, image sizes, rows that cannot be used, and tokens per epoch of each stage.
OUT/index.html shows the same, with a histogram (also OUT/STAGE_lengths.png) and ten examples of
each stage. --rows=N reads N rows spread over each stage's data (0: all rows). Rows are checked as
training checks them. Exit code 1: a stage has no row that can be used.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("inspect_data", needs_config=True)

import dataclasses
import functools
import os

from absl import flags
from ml_collections import config_flags

from ares_jax.inspect_data import page, summary
from ares_jax.run.config import read_config
from ares_jax.run.files import RENAMED_SETTINGS, write_text
from ares_jax.run.setup import open_run
from ares_jax.system.command import UsageError, require_config, run

STAGES = ("warmup", "sft", "rl", "eval")
_EXAMPLES = 10  # rows shown of each stage


def main():
  options = flags.FLAGS
  for name in options.stages:
    if name not in STAGES:
      raise UsageError(f"--stages={name} is none of {', '.join(STAGES)}")
  config = read_config(require_config(options.config))
  os.makedirs(options.out, exist_ok=True)
  with open_run(config, workdir=os.path.abspath(options.out), check=False) as parts:
    inspect(parts, options.out, rows=options.rows, stages=options.stages)


def inspect(parts, out, *, rows, stages):
  """Prints the summaries of a setup.Run's data and writes the page into the folder `out`.

  Of each stage's data as many `rows`, evenly spread, are read; 0 is all. Stages whose data the
  config leaves out are skipped.

  Raises:
    ValueError: no row of a stage can be used, or its data cannot be read.
  """
  files = parts.config.data.files
  sections, useless = [], []
  for name in stages:
    if files is not None and not getattr(files, name):
      print(f"{name}: no source in config.data.files")
    else:
      *section, used = _section(parts, out, name, rows)
      sections.append(section)
      useless += [] if used else [name]
  path = os.path.join(out, "index.html")
  prompt = dataclasses.asdict(parts.generator.encoder.config)
  write_text(path, page.inspect_html(prompt, sections))
  print(f"examples: {path}")
  if useless:
    raise ValueError(f"no row of {', '.join(useless)} can be used")


def _section(parts, out, name, rows):
  """(name, summary, figures and examples as HTML, rows used) of a stage; prints the summary."""
  config, encoder, source = parts.config, parts.generator.encoder, parts.source(name)
  found = summary.summarize(source, encoder, rows=rows,
                            examine=functools.partial(parts.data.examine, name))
  group = config.aepo.group if name == "rl" else config.evaluate.samples
  text = summary.summary_text(name, source, found, limit=encoder.config.max_tokens[-1],
                              group=group, answer=config.aepo.sampling.max_tokens)
  print(text)
  shown = []
  if found.tokens:
    path = os.path.join(out, f"{name}_lengths.png")
    page.histogram_png(found.tokens, path, title=f"{name}: prompt tokens")
    shown.append(page.picture_html(path, f"histogram of prompt tokens of {name}"))
  numbers = summary.spread(len(source), min(_EXAMPLES, len(source)))
  shown += [page.example_html(example, encoder)
            for example in parts.data.examine(name, numbers, lambda row, prompt: (row, prompt))]
  return name, text, shown, len(found.tokens)


def define_flags():
  """Defines the flags; not at import, because other commands define --config too."""
  config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
  flags.DEFINE_string("out", "inspect", "Folder to write.")
  flags.DEFINE_integer("rows", 2000, "Rows read of each stage's data; 0 is all.", lower_bound=0)
  flags.DEFINE_list("stages", list(STAGES), f"Some of {', '.join(STAGES)}.")


if __name__ == "__main__":
  define_flags()
  run(main, renamed=RENAMED_SETTINGS)
