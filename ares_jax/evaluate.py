"""Evaluates a run, or a Hugging Face folder, on a benchmark.

    python -m ares_jax.evaluate --config=configs/ares_tiny.py --workdir=runs/ares_tiny
    python -m ares_jax.evaluate --config=configs/aepo_7b.py --model=HF_FOLDER --workdir=DIR \\
      --benchmark=mathvista --data=testmini.parquet [--compare=OTHER/results.json]
    python -m ares_jax.evaluate ... --benchmark=mathvista --data=... --compare=paper:ARES-7B
    python -m ares_jax.evaluate ... --benchmark=charxiv --data=... --judge=my_judge.py:verdicts
    python -m ares_jax.evaluate --ablation=runs/table4/0/*,runs/table4/1/* --figure=figure.html

Without --benchmark, the problems are the config's own held-out data. --benchmark is a name in
ares_jax/evaluation/benchmarks.json, with its file or folder as --data, or a file of your own.
--images is the folder of its images, where they are not beside the file or in its parent folder.
--columns=question=Body+Question,answer=Answer names the columns of your file, as a source does.
Results go to WORKDIR/evaluate/BENCHMARK, or to --out: give each checkpoint of a run a folder of its
own. The same command resumes an evaluation that was stopped. --ablation answers nothing: it
compares finished runs by what they were trained with, as the paper's tables 4 and 5 do.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("evaluate")

import dataclasses
import functools
import glob
import json
import os
import sys

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from ares_jax.data.sources import ColumnsConfig
from ares_jax.evaluation import arms, arms_figure, paper
from ares_jax.evaluation.benchmarks import (
  OWN,
  Benchmark,
  benchmark_schemas,
  check_prompts,
  open_benchmark,
)
from ares_jax.evaluation.graded import require_rows
from ares_jax.evaluation.results import evaluate_benchmark, results_markdown
from ares_jax.models import lora
from ares_jax.run import bucket, restore
from ares_jax.run.config import read_config
from ares_jax.run.files import RENAMED_SETTINGS, write_text
from ares_jax.run.identity import latest_stage
from ares_jax.run.setup import open_run
from ares_jax.system import heartbeat, hosts, mesh
from ares_jax.system.cluster import join_cluster
from ares_jax.system.command import UsageError, require_config, run
from ares_jax.system.config import build
from ares_jax.system.gcs import bucket_errors, file_system, in_bucket


def main():
  words = flags.FLAGS
  if words.ablation:
    table, page = compare_arms(words.ablation)
    if words.figure:
      write_text(words.figure, arms_figure.arms_page(table))
    print(json.dumps(table) if words.json else page)
    return
  config, address = _config(words), bucket.absolute(words.workdir)
  with join_cluster(config.hosts), heartbeat.stop_signals(), \
      bucket.open_folder(address) as workdir, \
      heartbeat.watchdog(os.path.join(workdir, hosts.local_name("stacks.txt")),
                         config.stall_minutes, functools.partial(bucket.upload, workdir)), \
      jax.set_mesh(mesh.make_mesh(config.mesh.data, config.mesh.model, slices=config.mesh.slice)), \
      open_run(config, workdir=workdir, check=False) as parts:
    benchmark = choose_benchmark(parts, words.benchmark, words.data, words.images, words.columns)
    if words.benchmark and jax.process_index() == 0:
      print(benchmark.summary(), file=sys.stderr)
    if words.model:
      name, params = words.model, parts.init_params()
    else:
      name, params = newest_weights(parts, workdir)
    with bucket.open_folder(
        words.out or os.path.join(workdir, "evaluate", benchmark.name)) as folder:
      result = evaluate_benchmark(parts, params, benchmark, folder=folder, model=name,
                                  compare=words.compare, judge=words.judge)
    if jax.process_index() == 0:
      print(json.dumps(result) if words.json else results_markdown(result))


def compare_arms(patterns):
  """(rows, Markdown) of the finished runs in the folders that match; see arms.arm_rows."""
  folders = sorted({folder for pattern in patterns for folder in _matching(pattern)
                    if (epath.Path(folder) / "results.json").is_file()})
  if not folders:
    raise ValueError(f"no finished run (results.json) in {', '.join(patterns)}")
  table = arms.arm_rows(arms.collect_arms(folders))
  return table, arms.arms_markdown(table, paper.paper_tables())


def _matching(pattern):
  """The folders that match a pattern, on a disk or in a bucket."""
  if not in_bucket(pattern):
    return glob.glob(pattern)
  with bucket_errors(pattern):
    return [f"gs://{name}" for name in file_system().glob(bucket.absolute(pattern))]


def _config(words):
  """TrainConfig of --config, with the model of --model if it is given."""
  values = require_config(words.config)
  if not words.workdir:
    raise UsageError("no --workdir given; it holds the run, and the results")
  if words.model:
    values = values.copy_and_resolve_references()
    with values.unlocked():
      values.model.path = words.model
  return read_config(values, new=False)


def choose_benchmark(parts, name, path, images="", columns=""):
  """The Benchmark that flags name; `parts` is a setup.Run.

  All its prompts are encoded once, so that nothing is found wrong after hours of answering.

  Raises:
    ValueError: there is no such benchmark, or its data are missing, too few or cannot be used.
  """
  config = parts.config.evaluate
  if not name:
    source = parts.source("eval")
    require_rows(source, config.problems)
    return Benchmark("test", [source[index] for index in range(config.problems)], "avg@n",
                     config.samples)
  known = name in benchmark_schemas()
  if known and not path:
    raise ValueError(f"--benchmark={name} needs --data=FILE, its published file or folder")
  own = not known and os.path.exists(name)
  if columns and not own:
    raise UsageError("--columns names the columns of a file of your own: --benchmark=FILE")
  # An unknown name raises an error that suggests the right one.
  benchmark = open_benchmark(*((OWN, name) if own else (name, path)), images,
                             build(ColumnsConfig, columns, "columns"))
  benchmark = check_prompts(benchmark, parts.generator.encoder, parts.config.threads)
  if not own:
    return benchmark
  if benchmark.skipped:
    raise ValueError(f"{len(benchmark.skipped)} rows of {name} cannot be used; the first: "
                     f"{benchmark.skipped[0]}")
  stem = os.path.splitext(os.path.basename(name.rstrip("/")))[0]
  # The prefix keeps its folder apart from that of a published benchmark or of the held-out data.
  return dataclasses.replace(benchmark, name=f"file_{stem}")


def newest_weights(parts, workdir):
  """(name, weights) of the newest checkpoint of the last stage; ValueError if there is none."""
  stage = hosts.on_process_0(lambda: latest_stage(workdir))
  step, params, base = restore.restore_params(workdir, stage, parts.config, parts.model)
  return f"{workdir} {stage} step {step}", lora.join(base, params)


def define_flags():
  """Defines the flags; not at import, because another command in the process has a --config too."""
  config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
  flags.DEFINE_string("workdir", None, "Folder of the run and its results.")
  flags.DEFINE_string("benchmark", "", "Name of a benchmark, or a file of your own.")
  flags.DEFINE_string("data", "", "File or folder of the named benchmark.")
  flags.DEFINE_string("images", "", "Folder of the benchmark's images; default beside its file.")
  flags.DEFINE_string("columns", "", "Columns of a file of your own, where they have other names: "
                      "question=Body+Question,answer=Answer")
  flags.DEFINE_string("model", "", "Hugging Face folder; default the newest checkpoint.")
  flags.DEFINE_string("out", "", "Folder of the results; default WORKDIR/evaluate/BENCHMARK.")
  flags.DEFINE_string("compare", "", "results.json of an earlier evaluation, or paper:MODEL.")
  flags.DEFINE_string("judge", "", "FILE.py:function or package.module:function with the last word "
                      "on answers.")
  flags.DEFINE_list("ablation", [], "Folders of finished runs, or patterns of them.")
  flags.DEFINE_string("figure", "", "HTML file of --ablation's accuracy and tokens by difficulty.")
  flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


if __name__ == "__main__":
  define_flags()
  run(main, renamed=RENAMED_SETTINGS)
