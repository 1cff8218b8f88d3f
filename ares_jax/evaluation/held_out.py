"""Accuracy on held-out problems: greedy and sampled, with intervals, lengths by difficulty."""

import collections
import dataclasses
import functools
import json
import math
import os

import jax
import numpy as np

from ares_jax.data import sharded
from ares_jax.grading.response import shows_work
from ares_jax.ops.difficulty import BUCKETS, bucket_of
from ares_jax.run.files import read_json, write_json
from ares_jax.run.responses import write_held_out
from ares_jax.sampling.sampler import stage_key
from ares_jax.system import hosts

_SHOWN = {"problems": 32, "kept": 2}  # of a stage's evaluation, written for people to read
_SEED = 0  # of the samples: runs of all seeds are asked alike


def evaluate(generator, params, source, config, *, max_tokens, easy, medium, show=None):
  """Evaluates `params` on the first `config.problems` rows of a source.

  Args:
    generator: rollout.Generator.
    params: weights.
    source: random access to rows; a row's `level`, where it has one, gives the table by level.
    config: EvaluateConfig.
    max_tokens: longest response.
    easy, medium: fractions of right answers from which a problem counts as easy, as medium.
    show: called with (rows, Samples, Grades) of the first sampled batch.

  Returns:
    dict: n, samples, and for "greedy" and "sampled" accuracy with the half-width of its 95%
    interval over problems (a problem's samples are not independent); pass_at_k, format_ok,
    length (tokens, mean of the sampled answers), shows_work (share of answers with working);
    `bucket` and `level`: the same by pass rate and by level, for the sampled answers.
  """
  if len(source) < config.problems:
    raise ValueError(f"{config.problems} problems to evaluate on, the source has {len(source)}; "
                     "lower evaluate.problems")
  sampled = config.sampling(max_tokens)
  greedy = dataclasses.replace(sampled, temperature=0.0, top_p=1.0)
  answers, levels = collections.defaultdict(list), []
  for start in range(0, config.problems, config.batch):
    # The last batch is filled with rows from the front, which are then dropped: one shape.
    places = np.arange(start, start + config.batch) % config.problems
    fresh = min(config.batch, config.problems - start)
    rows, encoded = sharded.read_sharded(source, places, generator.encoder.encode)
    prompts = generator.encoder.batch(rows, places, encoded)
    for name, sampling, group in (("greedy", greedy, 1), ("sampled", sampled, config.samples)):
      samples, grades = generator.answer(params, prompts, stage_key(_SEED, "evaluate"),
                                         group=group, sampling=sampling)
      if show is not None and name == "sampled" and start == 0:
        show(prompts.rows[:fresh], samples, grades)
      thoughts = [shows_work(text) for text in grades.texts]
      for field, values in (("correct", grades.correct), ("format_ok", grades.format_ok),
                            ("shows_work", thoughts), ("length", samples.mask.sum(1))):
        answers[name, field].append(np.float64(values).reshape(-1, group)[:fresh])
    levels += [row.get("level") for row in prompts.rows[:fresh]]
  answers = {key: np.concatenate(parts) for key, parts in answers.items()}

  everything = np.ones(config.problems, bool)
  buckets = bucket_of(answers["sampled", "correct"].sum(1), samples=config.samples, easy=easy,
                      medium=medium)
  result = {"n": config.problems, "samples": config.samples,
            "greedy": _summary(answers, "greedy", everything),
            "sampled": _summary(answers, "sampled", everything)}
  result["bucket"] = {name: _summary(answers, "sampled", buckets == index)
                      for index, name in enumerate(BUCKETS)}
  result["level"] = {str(level): _summary(answers, "sampled", np.array(levels) == level)
                     for level in sorted(set(levels) - {None})}
  return result


def _summary(answers, name, chosen):
  """Means over the chosen problems; None where there are none."""
  count = int(chosen.sum())
  if count == 0:
    return {"n": 0, "share": 0.0, "accuracy": None, "interval": None, "pass_at_k": None,
            "format_ok": None, "length": None, "shows_work": None}
  field = {key: answers[name, key][chosen] for key in ("correct", "format_ok", "length",
                                                       "shows_work")}
  rate = field["correct"].mean(1)
  spread = rate.std(ddof=1) / math.sqrt(count) if count > 1 else float("inf")
  return {
    "n": count,
    "share": count / len(chosen),
    "accuracy": float(rate.mean()),
    "interval": 1.96 * float(spread) if math.isfinite(spread) else None,
    "pass_at_k": float((field["correct"].max(1) > 0).mean()),
    "format_ok": float(field["format_ok"].mean()),
    "length": float(field["length"].mean()),
    "shows_work": float(field["shows_work"].mean()),
  }


def stage_table(results):
  """The text table of {stage: evaluation}, one row a stage."""
  first = next(iter(results.values()))
  head = ["stage", "greedy", "sampled", f"pass@{first['samples']}", "format", "tokens"]
  head += [f"{bucket} n/tokens" for bucket in BUCKETS]
  rows = [head]
  for stage, result in results.items():
    rows.append([stage, _with_interval(result["greedy"]), _with_interval(result["sampled"]),
                 percent(result["sampled"]["pass_at_k"]),
                 percent(result["sampled"]["format_ok"]), f"{result['sampled']['length']:.1f}"]
                + [_bucket(result["bucket"][bucket]) for bucket in BUCKETS])
  widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
           for row in rows]
  return "\n".join(lines) + (
    f"\n{first['n']} held-out problems, {first['samples']} samples each; ± is a 95% interval over "
    "problems; tokens are means of the sampled answers")


def level_table(results):
  """Accuracy, length and share of answers with working by level, one row a stage and level."""
  lines = ["stage / level: sampled accuracy, tokens, answers with working"]
  for stage, result in results.items():
    cells = []
    for level, part in result["level"].items():
      accuracy, working = percent(part["accuracy"]), percent(part["shows_work"])
      cells.append(f"{level}: {accuracy} {part['length']:.1f} {working}")
    lines.append(f"{stage}  " + "   ".join(cells))
  return "\n".join(lines)


def percent(value):
  """A share for people; "-" for None."""
  return "-" if value is None else f"{100 * value:.1f}%"


def _with_interval(part):
  interval = "" if part["interval"] is None else f" ±{100 * part['interval']:.1f}"
  return percent(part["accuracy"]) + interval


def _bucket(part):
  return f"{part['n']} / {part['length']:.1f}" if part["n"] else "0 / -"


class StageResults:
  """Evaluations of finished stages, in WORKDIR/results.json."""

  def __init__(self, parts, workdir):
    """
    Args:
      parts: setup.Run.
      workdir: folder of the run; the results already there are kept.
    """
    self._parts, self._workdir = parts, workdir
    self._path = os.path.join(workdir, "results.json")
    self._results = hosts.on_process_0(lambda: read_json(workdir, "results.json"))

  def add(self, stage, params):
    """Evaluates `params` unless that was done before the run was stopped."""
    config, generator = self._parts.config, self._parts.generator
    steps = getattr(config, stage).steps
    if self._results.get(stage, {}).get("steps") == steps:
      return
    show = functools.partial(write_held_out, self._workdir, stage, steps,
                             group=config.evaluate.samples, chat=generator.encoder.chat, **_SHOWN)
    result = evaluate(generator, params, self._parts.source("test"), config.evaluate,
                      max_tokens=config.aepo.sampling.max_tokens, easy=config.aepo.reward.easy,
                      medium=config.aepo.reward.medium,
                      show=None if jax.process_index() else show)
    self._results[stage] = result | {"steps": steps}
    hosts.on_process_0(functools.partial(self._write, stage))

  def _write(self, stage):
    self._results[stage]["seconds"] = self._seconds(stage)
    write_json(self._path, self._results)

  def _seconds(self, stage):
    """Seconds of the stage's steps by phase, over all processes that worked on it."""
    spent = {}
    with open(os.path.join(self._workdir, "metrics.jsonl"), encoding="utf-8") as file:
      for line in map(json.loads, file):
        for name, value in line.items() if line["stage"] == stage else ():
          if name.startswith("seconds/"):
            spent[name[8:]] = spent.setdefault(name[8:], 0.0) + value
    return spent

  def show(self):
    """Prints the tables of all stages, on process 0."""
    if jax.process_index():
      return
    print(stage_table(self._results))
    print(level_table(self._results))
    for stage, result in self._results.items():
      spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items())
      print(f"{stage} seconds in its steps: {spent}")
