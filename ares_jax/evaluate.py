"""Evaluates a run, or a Hugging Face folder, on a benchmark.

    python -m ares_jax.evaluate --config=configs/ares_tiny.py --workdir=runs/ares_tiny
    python -m ares_jax.evaluate --config=configs/aepo_7b.py --model=HF_FOLDER --workdir=DIR \\
      --benchmark=mathvista --data=testmini.parquet [--compare=OTHER/results.json]
    python -m ares_jax.evaluate ... --benchmark=mathvista --data=... --compare=paper:ARES-7B
    python -m ares_jax.evaluate ... --benchmark=charxiv --data=... --judge=my_judge:verdicts
    python -m ares_jax.evaluate --ablation=runs/table4/0/*,runs/table4/1/* --figure=figure.html

Without --benchmark, the config's own held-out data are used. --benchmark is either a name in
ares_jax/evaluation/benchmarks.json, with its file or folder as --data, or the path of a file of
your own.
Results go to WORKDIR/evaluate/BENCHMARK, or to --out: to evaluate several checkpoints of one run,
give each its own folder. The same command resumes where it was stopped.
"""

import dataclasses
import glob
import json
import os

import jax
from absl import flags
from ml_collections import config_flags

from ares_jax.evaluation import arms, arms_figure, paper, predictions, scores
from ares_jax.evaluation.benchmarks import Benchmark, benchmark_schemas, open_benchmark
from ares_jax.evaluation.held_out import percent
from ares_jax.grading import sandbox
from ares_jax.models import lora
from ares_jax.run import restore
from ares_jax.run.config import read_config
from ares_jax.run.files import write_text
from ares_jax.run.identity import latest_stage
from ares_jax.run.setup import open_run
from ares_jax.sampling.sampler import SamplingConfig
from ares_jax.system import heartbeat, hosts, mesh
from ares_jax.system.cluster import join_cluster
from ares_jax.system.command import UsageError, require_config, run

_PAPER = "paper:"  # before a model of the paper's tables, where an earlier results.json may stand


def main():
  words = flags.FLAGS
  if words.ablation:
    table, page = ablate(words.ablation)
    if words.figure:
      write_text(words.figure, arms_figure.arms_page(table))
    print(json.dumps(table) if words.json else page)
    return
  values = require_config(words.config)
  if not words.workdir:
    raise UsageError("no --workdir given; it holds the run, and the results")
  if words.model:
    values = values.copy_and_resolve_references()
    with values.unlocked():
      values.model.path = words.model
  config, workdir = read_config(values), os.path.abspath(words.workdir)
  with join_cluster(config.hosts), heartbeat.stop_signals(), heartbeat.watchdog(
      os.path.join(workdir, hosts.local_name("stacks.txt")), config.stall_minutes), jax.set_mesh(
      mesh.make_mesh(config.mesh.data, config.mesh.model, slices=config.mesh.slice)), (
      open_run(config, workdir=workdir, check=False)) as parts:
    benchmark = choose(parts, words.benchmark, words.data)
    name, params = (words.model, parts.init_params()) if words.model else newest(parts, workdir)
    folder = words.out or os.path.join(workdir, "evaluate", benchmark.name)
    result = evaluate(parts, params, benchmark, folder=folder, model=name, compare=words.compare,
                      judge=words.judge)
    if jax.process_index() == 0:
      print(json.dumps(result) if words.json else evaluation_text(result))


def choose(parts, name, path):
  """The Benchmark that --benchmark and --data mean."""
  if name in benchmark_schemas():
    if not path:
      raise ValueError(f"--benchmark={name} needs --data=FILE, its published file or folder")
    return open_benchmark(name, path)
  if name and not os.path.exists(name):
    open_benchmark(name, path)  # says which names there are
  if name:
    stem = os.path.splitext(os.path.basename(name.rstrip("/")))[0]
    # Apart from the published ones and from the held-out data.
    return dataclasses.replace(open_benchmark("generic", name), name=f"file_{stem}")
  config, source = parts.config.evaluate, parts.source("test")
  if len(source) < config.problems:
    raise ValueError(f"{config.problems} problems to evaluate on, the source has {len(source)}; "
                     "lower evaluate.problems")
  return Benchmark("test", [source[index] for index in range(config.problems)], "avg@n",
                   config.samples)


def newest(parts, workdir):
  """(name, weights) of the newest checkpoint of the latest stage.

  Raises:
    ValueError: there is none.
  """
  stage = hosts.on_process_0(lambda: latest_stage(workdir))
  step, params, base = restore.restore_params(workdir, stage, parts.config, parts.model)
  return f"{workdir} {stage} step {step}", lora.join(base, params)


def evaluate(parts, params, benchmark, *, folder, model, compare="", judge=""):
  """Answers, scores and writes predictions.jsonl, results.json and results.md in `folder`.

  Args:
    parts: setup.Run.
    params: weights.
    benchmark: Benchmark.
    folder: is made.
    model: name of the weights.
    compare: path of an earlier results.json, "paper:MODEL" for a row of the paper's tables, or "".
    judge: see predictions.predict.

  Returns:
    The dict of results.json.
  """
  config = parts.config
  greedy = benchmark.n == 1
  sampling = SamplingConfig(temperature=0.0 if greedy else config.evaluate.temperature,
                            top_p=1.0 if greedy else config.evaluate.top_p, top_k=0, min_tokens=0,
                            max_tokens=config.aepo.sampling.max_tokens)
  other = _earlier(compare, benchmark) if compare else None
  if judge:
    sandbox.load_grader(judge, "judge")  # a wrong name is told before anything is answered
  os.makedirs(folder, exist_ok=True)
  head, problems = predictions.predict(
    parts.generator, params, benchmark, path=os.path.join(folder, "predictions.jsonl"),
    sampling=sampling, batch=config.evaluate.batch, model=model, judge=judge)
  tokens = sum(sample["tokens"] for problem in problems for sample in problem["samples"])
  result = head | scores.score_benchmark(problems, benchmark.metric, easy=config.aepo.reward.easy,
                                         medium=config.aepo.reward.medium)
  result |= {"timed_out": sum(problem["timed_out"] for problem in problems),
             "tokens_per_second": tokens / sum(problem["seconds"] for problem in problems)}
  if other:
    result["compare"] = _compare(result, other, compare)
  if jax.process_index() == 0:
    for name, content in (("results.json", json.dumps(result, indent=1)),
                          ("results.md", evaluation_markdown(result))):
      write_text(os.path.join(folder, name), content + "\n")
  return result


def ablate(patterns):
  """(table, its Markdown) of finished runs by arm; see ablation.rows."""
  folders = sorted({folder for pattern in patterns for folder in glob.glob(pattern)
                    if os.path.isfile(os.path.join(folder, "results.json"))})
  if not folders:
    raise ValueError(f"no finished run (results.json) in {', '.join(patterns)}")
  table = arms.arm_rows(arms.collect_arms(folders))
  return table, arms.arms_markdown(table, paper.paper_tables())


def evaluation_markdown(result):
  """The results as a Markdown page."""
  lines = [f"# {result['benchmark']}: {percent(result['score'])}{_interval(result['interval'])}",
           "", f"{result['metric']} of {result['model']} (weights {result['weights']}); "
           f"{result['problems']} problems, {result['n']} sample(s) each at temperature "
           f"{result['temperature']:g}, top-p {result['top_p']:g}, at most {result['max_tokens']} "
           f"tokens, seed {result['seed']}, prompts {result['prompts']}, graded by "
           f"{result['grader']}. Interval: 95%, bootstrap over {len(result['units'])} problems or "
           "groups.", ""]
  lines += ["| | problems | accuracy | tokens mean / median | truncated | well formed |",
            "|" + " --- |" * 6]
  lines += ["| " + " | ".join(row) + " |" for row in _rows(result)]
  lines += ["", f"{result['timed_out']} answers timed out in grading; "
            f"{result['tokens_per_second']:.0f} tokens/s."]
  if "compare" in result:
    lines += ["", _versus(result["compare"])]
  return "\n".join(lines)


def evaluation_text(result):
  """The results as a table for a terminal."""
  rows = [["", "problems", "accuracy", "tokens mean / median", "truncated", "well formed"]]
  rows += _rows(result)
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [f"{result['benchmark']} {result['metric']}, n = {result['n']}: "
           f"{percent(result['score'])}{_interval(result['interval'])}  ({result['model']})"]
  lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]
  lines.append(f"{result['timed_out']} timed out, {result['tokens_per_second']:.0f} tokens/s")
  return "\n".join(lines + ([_versus(result["compare"])] if "compare" in result else []))


def _rows(result):
  parts = {"all": result}
  for field in ("source", "level", "bucket"):
    if field != "source" or len(result["by_source"]) > 1:
      parts |= {f"{field} {name}": part for name, part in result[f"by_{field}"].items()}
  return [[name, str(part["problems"]), percent(part["accuracy"]),
           f"{part['length_mean']:.1f} / {part['length_median']:.0f}", percent(part["truncated"]),
           percent(part["format_ok"])] for name, part in parts.items()]


def _earlier(path, benchmark):
  """The results.json at `path`, or what the paper prints, read before anything is answered."""
  if path.startswith(_PAPER):
    return paper.paper_result(path.removeprefix(_PAPER), benchmark.name, benchmark.metric)
  try:
    with open(path, encoding="utf-8") as file:
      other = json.load(file)
    same = (other["benchmark"], other["metric"]) == (benchmark.name, benchmark.metric)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is no results.json of an evaluation: {error!r}") from error
  if not same:
    raise ValueError(f"{path} is {other['metric']} of {other['benchmark']}, not "
                     f"{benchmark.metric} of {benchmark.name}")
  return other


def _compare(result, other, path):
  difference, interval, paired = scores.compare(result, other)
  return {"with": path, "model": other["model"], "score": other["score"], "difference": difference,
          "interval": interval, "paired": paired,
          "same_prompts": other["prompts"] == result["prompts"],
          "same_grader": other["grader"] == result["grader"],
          "length_difference": (None if other["length_mean"] is None
                                else result["length_mean"] - other["length_mean"])}


def _versus(compare):
  interval = compare["interval"]
  ends = "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
  tokens = compare["length_difference"]
  return (f"against {compare['model']} ({percent(compare['score'])}): "
          f"{100 * compare['difference']:+.1f} points{ends}, "
          f"{'paired by problem' if compare['paired'] else 'not paired'}"
          + ("" if tokens is None else f", {tokens:+.1f} tokens")
          + ("; the paper's score is treated as exact; its prompts and grading differ"
             if compare["with"].startswith(_PAPER)
             else ("" if compare["same_prompts"] else "; the prompts differ")
             + ("" if compare["same_grader"] else "; the graders differ")))


def _interval(interval):
  return "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def define_flags():
  """Not at import: two commands in one process would define --config twice."""
  config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
  flags.DEFINE_string("workdir", None, "Folder of the run and its results.")
  flags.DEFINE_string("benchmark", "", "Name of a benchmark, or a file of your own.")
  flags.DEFINE_string("data", "", "File or folder of the named benchmark.")
  flags.DEFINE_string("model", "", "Hugging Face folder; default the newest checkpoint.")
  flags.DEFINE_string("out", "", "Folder of the results; default WORKDIR/evaluate/BENCHMARK.")
  flags.DEFINE_string("compare", "", "results.json of an earlier evaluation, or paper:MODEL.")
  flags.DEFINE_string("judge", "", "package.module:function with the last word on answers.")
  flags.DEFINE_list("ablation", [], "Folders of finished runs, or patterns of them.")
  flags.DEFINE_string("figure", "", "HTML file of --ablation's accuracy and tokens by difficulty.")
  flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


if __name__ == "__main__":
  define_flags()
  run(main)
