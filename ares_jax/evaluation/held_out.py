"""Evaluates every finished stage of a run on held-out problems, for WORKDIR/results.json."""

import collections
import dataclasses
import functools
import os

import jax

from ares_jax.evaluation.graded import EvaluationSettings, answer_batch, prompt_batches
from ares_jax.evaluation.scores import percent, split_problems, summarize
from ares_jax.ops.difficulty import BUCKETS
from ares_jax.run.files import write_json
from ares_jax.run.records import STEP, Lines, read_results
from ares_jax.run.responses import write_held_out
from ares_jax.system import hosts
from ares_jax.system.tables import text_table

_SHOWN = {"problems": 32, "kept": 2}  # of a stage's evaluation, written for people to read


class StageResults:
  """Evaluations of finished stages, kept in WORKDIR/results.json."""

  def __init__(self, parts, workdir):
    """Reads the results that are already there; `parts` is the setup.Run of the workdir."""
    self._parts, self._workdir = parts, workdir
    self._results = hosts.on_process_0(lambda: read_results(workdir))

  def add(self, stage, params):
    """Evaluates `params` unless the results of the stage are already there."""
    steps = getattr(self._parts.config, stage).steps
    if self._results.get(stage, {}).get("steps") == steps:
      return
    show = functools.partial(write_held_out, self._workdir, stage, steps,
                             encoder=self._parts.generator.encoder, **_SHOWN)
    result = evaluate_stage(self._parts, params, show)
    seconds = hosts.on_process_0(lambda: stage_seconds(self._workdir, stage))
    self._results[stage] = result | {"steps": steps, "seconds": seconds}
    hosts.on_process_0(
      lambda: write_json(os.path.join(self._workdir, "results.json"), self._results))

  def show(self):
    """Prints the tables of all stages, on process 0."""
    if jax.process_index():
      return
    print(stage_table(self._results))
    if levels := level_table(self._results):
      print(levels)
    for stage, result in self._results.items():
      spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items())
      print(f"{stage} seconds in its steps: {spent}")


def stage_seconds(workdir, stage):
  """{phase: seconds} of the stage's steps, over all processes that worked on it."""
  spent = collections.Counter()
  for line in Lines(os.path.join(workdir, "metrics.jsonl"), STEP):
    if line["stage"] == stage:
      spent.update({name.removeprefix("seconds/"): value for name, value in line.items()
                    if name.startswith("seconds/")})
  return dict(spent)


def evaluate_stage(parts, params, show=None):
  """Answers the first held-out problems, once greedily and several times sampled.

  `parts` is a setup.Run; `show`, if given, is called with the GradedResponses of the first sampled
  batch.

  Returns:
    dict: n; samples; "greedy" and "sampled", means over all problems; "bucket", "level" and
    "source", {name: means over the problems of that name, of the sampled answers}. Means are those
    of scores.summarize, interval being the half-width; share is that of the problems. A level has
    "modes" too, {mode: share of its sampled answers}, where the source tells an answer's mode.
  """
  config, longest = parts.config.evaluate, parts.config.aepo.sampling.max_tokens
  once = EvaluationSettings(1, config.sampling(longest, greedy=True))
  several = EvaluationSettings(config.samples, config.sampling(longest, greedy=False))
  greedy, sampled, modes = [], [], collections.defaultdict(collections.Counter)
  source = parts.source("eval")
  for batch in prompt_batches(parts.generator, source, config.problems, config.batch):
    greedy += _without_texts(answer_batch(parts.generator, params, *batch, once)[0])
    problems, responses = answer_batch(parts.generator, params, *batch, several)
    if show is not None and not sampled:
      show(responses)
    if hasattr(source, "mode_of"):
      for problem in problems:
        modes[problem.level].update(source.mode_of(one.response) for one in problem.samples)
    sampled += _without_texts(problems)

  def means(problems):
    summary = summarize(problems)
    return {"n": len(problems), "share": len(problems) / config.problems,
            "interval": summary["half_width"], "length": summary["length_mean"],
            **{key: summary[key] for key in ("accuracy", "pass_at_k", "format_ok", "shows_work")}}

  result = {"n": config.problems, "samples": config.samples, "greedy": means(greedy),
            "sampled": means(sampled)}
  for field, split in split_problems(sampled, parts.config.aepo.reward).items():
    result[field] = {name: means(problems) for name, problems in split.items()}
  for level, counts in modes.items():
    result["level"][level]["modes"] = {
      mode: count / counts.total() for mode, count in sorted(counts.items())}
  return result


def _without_texts(problems):
  """The GradedProblems without the texts of their responses: a few numbers an answer are kept."""
  return [dataclasses.replace(problem, samples=[dataclasses.replace(sample, response="")
                                                for sample in problem.samples])
          for problem in problems]


def stage_table(results):
  """Text table of {stage: evaluation}, one row a stage."""
  first = next(iter(results.values()))
  head = ["stage", "greedy", "sampled", f"pass@{first['samples']}", "format", "tokens",
          *(f"{bucket} n/tokens" for bucket in BUCKETS)]
  rows = []
  for stage, result in results.items():
    sampled = result["sampled"]
    rows.append([
      stage, *(percent(result[way]["accuracy"], result[way]["interval"])
               for way in ("greedy", "sampled")),
      percent(sampled["pass_at_k"]), percent(sampled["format_ok"]), f"{sampled['length']:.1f}",
      *(f"{part['n']} / {part['length']:.1f}" if part["n"] else "0 / -"
        for part in map(result["bucket"].get, BUCKETS))])
  return text_table(head, rows) + (
    f"\n{first['n']} held-out problems, {first['samples']} samples each; ± is 1.96 standard errors "
    f"over {first['n']} problems (over groups, where the data name them); tokens are means of the "
    "sampled answers")


def level_table(results):
  """Text table of accuracy, tokens and share of answers with working by level, one row a stage.

  "" where the data have no levels.
  """
  if not any(result["level"] for result in results.values()):
    return ""
  text = "stage / level: sampled accuracy, tokens, answers with working"
  for stage, result in results.items():
    text += f"\n{stage}  " + "   ".join(
      f"{level}: {percent(part['accuracy'])} {part['length']:.1f} {percent(part['shows_work'])}"
      for level, part in result["level"].items())
  return text
