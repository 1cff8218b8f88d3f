"""Accuracy on held-out problems: greedy and sampled, with intervals, lengths by difficulty."""

import collections
import dataclasses
import math

import numpy as np

from ares_jax.data import sharded
from ares_jax.evaluation.scores import BUCKETS
from ares_jax.grading.response import shows_work
from ares_jax.sampling.sampler import stage_key

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
    show: called with (rows, samples, texts, correct, format_ok) of the first sampled batch.

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
      samples, texts, correct, format_ok, _ = generator.answer(
        params, prompts, stage_key(_SEED, "evaluate"), group=group, sampling=sampling)
      if show is not None and name == "sampled" and start == 0:
        show(prompts.rows[:fresh], samples, texts, correct, format_ok)
      thoughts = [shows_work(text) for text in texts]
      for field, values in (("correct", correct), ("format_ok", format_ok),
                            ("shows_work", thoughts), ("length", samples.mask.sum(1))):
        answers[name, field].append(np.float64(values).reshape(-1, group)[:fresh])
    levels += [row.get("level") for row in prompts.rows[:fresh]]
  answers = {key: np.concatenate(parts) for key, parts in answers.items()}

  everything = np.ones(config.problems, bool)
  rate = answers["sampled", "correct"].mean(1)
  buckets = np.where(rate >= easy, 0, np.where(rate >= medium, 1, 2))
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
