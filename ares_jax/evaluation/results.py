"""Evaluates a model on a benchmark; writes, shows and compares the results.

The folder of an evaluation holds predictions.jsonl, results.json and results.md.
"""

import json
import os

import jax
import numpy as np
from etils import epath

from ares_jax.evaluation import paper, predictions, scores
from ares_jax.evaluation.graded import EvaluationSettings
from ares_jax.evaluation.scores import percent
from ares_jax.grading import sandbox
from ares_jax.run.files import write_text
from ares_jax.system.gcs import bucket_errors
from ares_jax.system.tables import markdown_table

PAPER = "paper:"  # begins the name of a row of the paper's tables, in place of a results.json


def evaluate_benchmark(parts, params, benchmark, *, folder, model, compare="", judge=""):
  """Answers and scores a benchmark, writes the files, and returns the dict of results.json.

  `parts` is a setup.Run, `model` the name of the weights for people. `compare` is the path of an
  earlier results.json, "paper:MODEL" for a row of the paper's tables, or "". `judge` is the
  "package.module:function" that grades instead of the grader (graded.verdicts), or "".

  Raises:
    ValueError: `compare` is no result of this benchmark, `judge` does not load, or see `predict`.
  """
  # Both are read before anything is answered, so that a wrong name costs no time.
  other = earlier_result(compare, benchmark) if compare else None
  if judge:
    sandbox.load_function(judge, "judge")
  config = parts.config.evaluate
  sampling = config.sampling(parts.config.aepo.sampling.max_tokens, greedy=benchmark.n == 1)
  os.makedirs(folder, exist_ok=True)
  head, problems = predictions.predict(
    parts.generator, params, benchmark, EvaluationSettings(benchmark.n, sampling, judge),
    batch=config.batch, path=os.path.join(folder, "predictions.jsonl"), model=model)
  result = head | score_benchmark(problems, benchmark.metric, parts.config.aepo.reward) | {
    "skipped": list(benchmark.skipped), "note": benchmark.note}
  if other:
    result["compare"] = {"with": compare} | compare_results(result, other)
  if jax.process_index() == 0:
    write_text(os.path.join(folder, "results.json"), json.dumps(result, indent=1) + "\n")
    write_text(os.path.join(folder, "results.md"), results_markdown(result) + "\n")
  return result


def score_benchmark(problems, metric, reward):
  """The part of results.json that follows from the answers; arguments are those of scores.py.

  A dict of metric, n (samples), units {id: value}, groups (scores.unit_groups), score,
  score_half_width, interval [low, high] within 0..1; the means of scores.summarize over all
  problems; by_source, by_level and by_bucket, {name: means}; timed_out, the number of answers whose
  grading timed out; tokens_per_second.
  """
  units = scores.unit_values(problems, metric)
  groups, n = scores.unit_groups(problems, metric), len(problems[0].samples)
  score, half = float(np.mean(list(units.values()))), _half_width(units, groups)
  result = {"metric": metric, "n": n, "units": units, "groups": groups, "score": score,
            "score_half_width": half,
            "interval": None if half is None else [max(score - half, 0.0), min(score + half, 1.0)],
            **scores.summarize(problems)}
  for field, split in scores.split_problems(problems, reward).items():
    result[f"by_{field}"] = {name: scores.summarize(part) for name, part in split.items() if part}
  if n == 1:
    result["by_bucket"] = {}  # one sample says nothing about difficulty
  tokens = sum(sample.tokens for problem in problems for sample in problem.samples)
  return result | {"timed_out": sum(problem.timed_out for problem in problems),
                   "tokens_per_second": tokens / sum(problem.seconds for problem in problems)}


def _half_width(units, groups):
  """Half the width of the interval of the mean of {unit: value}; `groups` are of unit_groups."""
  cluster = scores.cluster_numbers([groups.get(unit) for unit in units])
  return scores.half_width(list(units.values()), cluster)


def results_markdown(result):
  """The results as Markdown, for results.md and for a terminal."""
  independent = result["independent"]
  counted = "problems" if independent == result["problems"] else "groups of problems"
  lines = [
    f"# {result['benchmark']}: {percent(result['score'], result['score_half_width'])}", "",
    f"{result['metric']} of {result['model']} (weights {result['weights']}); "
    f"{result['problems']} problems, {result['n']} sample(s) each at temperature "
    f"{result['temperature']:g}, top-p {result['top_p']:g}, at most {result['max_tokens']} tokens, "
    f"seed {result['seed']}, prompts {result['prompts']}, graded by {result['grader']}. ± is 1.96 "
    f"standard errors over {independent} {counted}; in a part, over those in it.", "",
    *markdown_table(["", "problems", "accuracy", "tokens mean / median", "truncated",
                     "well formed"], _rows(result)), "",
    f"{result['timed_out']} answers timed out in grading; {result['tokens_per_second']:.0f} "
    "tokens/s."]
  if result["skipped"]:
    lines += ["", f"{len(result['skipped'])} published rows cannot be used: "
                  f"{'; '.join(result['skipped'][:3])}."]
  if result["note"]:
    lines += ["", f"Scored otherwise by its authors: {result['note']}"]
  if "compare" in result:
    lines += ["", _comparison(result["compare"])]
  return "\n".join(lines)


def _rows(result):
  """Cells of all problems, then by source (if there are several), level and bucket."""
  parts = {"all": result}
  for field in ("source", "level", "bucket"):
    if field != "source" or len(result["by_source"]) > 1:
      parts |= {f"{field} {name}": part for name, part in result[f"by_{field}"].items()}
  return [[name, str(part["problems"]), percent(part["accuracy"], part["half_width"]),
           f"{part['length_mean']:.1f} / {part['length_median']:.0f}", percent(part["truncated"]),
           percent(part["format_ok"])] for name, part in parts.items()]


def earlier_result(path, benchmark):
  """The results.json at `path`, or the paper's for "paper:MODEL"; ValueError if it does not fit."""
  if path.startswith(PAPER):
    return paper.paper_result(path.removeprefix(PAPER), benchmark.name, benchmark.metric)
  try:
    with bucket_errors(path):
      other = json.loads(epath.Path(path).read_text("utf-8"))
    said = f"{other['metric']} of {other['benchmark']}"
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is no results.json of an evaluation: {error!r}") from error
  if said != f"{benchmark.metric} of {benchmark.name}":
    raise ValueError(f"{path} is {said}, not {benchmark.metric} of {benchmark.name}")
  return other


def compare_results(result, other):
  """Difference of two results of one benchmark, with its 95% interval.

  Scores of the same units are paired: the interval is that of the units' differences. Otherwise it
  follows from both scores' intervals, as if they were independent.
  """
  difference, half = result["score"] - other["score"], None
  paired = result["units"].keys() == other.get("units", {}).keys()
  if paired:
    half = _half_width({unit: value - other["units"][unit]
                        for unit, value in result["units"].items()}, result["groups"])
  elif result["interval"] and other["interval"]:
    half = float(np.hypot(_score_half(result), _score_half(other)))
  length = other["length_mean"]
  return {"model": other["model"], "score": other["score"], "difference": difference,
          "interval": None if half is None else [difference - half, difference + half],
          "paired": paired, **{f"same_{key}": other[key] == result[key]
                               for key in ("prompts", "grader")},
          "length_difference": None if length is None else result["length_mean"] - length}


def _score_half(result):
  """Half the width of a score's interval; files of before version 0.2 hold the interval alone."""
  return result.get("score_half_width", _half(result["interval"]))


def _comparison(compare):
  """A sentence about a result of `compare_results`."""
  half = _half(compare["interval"])
  text = (f"against {compare['model']} ({percent(compare['score'])}): "
          f"{100 * compare['difference']:+.1f}{'' if half is None else f' ±{100 * half:.1f}'} "
          f"points, {'paired by problem' if compare['paired'] else 'not paired'}")
  if compare["length_difference"] is not None:
    text += f", {compare['length_difference']:+.1f} tokens"
  if compare["with"].startswith(PAPER):
    return text + "; the paper's score is treated as exact; its prompts and grading differ"
  if not compare["same_prompts"]:
    text += "; the prompts differ"
  if not compare["same_grader"]:
    text += "; the graders differ"
  return text


def _half(interval):
  """Half the width of [low, high]; None for None."""
  return None if interval is None else (interval[1] - interval[0]) / 2
