"""Validation while a stage trains: accuracy, pass@k, lengths and truncation on held-out problems.

The problems and the samples of their answers are the same every time, whatever the step and the
seed, so that two values of a curve are paired, and a resumed run measures what it would have.
"""

import dataclasses
import time

from ares_jax.evaluation.benchmarks import OWN, benchmark_schemas, check_prompts, open_benchmark
from ares_jax.evaluation.graded import (
  EvaluationSettings,
  answer_batch,
  prompt_batches,
  require_rows,
)
from ares_jax.evaluation.scores import percent, split_problems, summarize
from ares_jax.run.best import VALIDATION
from ares_jax.system.profiler import PhaseTimer

# Means of scores.summarize by the last part of a metric's name.
_MEANS = {"accuracy": "accuracy", "pass_at_k": "pass_at_k", "tokens": "length_mean",
          "truncated": "truncated", "format_ok": "format_ok"}


class Validation:
  """The problems of a run's validation, and how they are answered: `measure` of some weights."""

  def __init__(self, parts):
    """Opens the problems that `config.aepo.validate` and `validate_on` name, of a setup.Run.

    Raises:
      ValueError: there are too few problems, or a benchmark cannot be read, or two have one name.
    """
    config = parts.config
    self.every, self._problems, samples = config.aepo.validate
    self._reward, self._batch = config.aepo.reward, min(config.evaluate.batch, self._problems)
    # Its phases are not the step's: all its seconds are one phase of the run.
    self._phases = parts.generator.phases
    self._generator = dataclasses.replace(parts.generator, phases=PhaseTimer())
    self._settings = EvaluationSettings(samples, config.evaluate.sampling(
      config.aepo.sampling.max_tokens, greedy=samples == 1))
    self._sources = {"": parts.source("eval")}
    for text in config.aepo.validate_on:
      name, rows = open_problems(parts, text)
      if name in self._sources:
        raise ValueError(f"aepo.validate_on: {text!r} and another entry would both be logged as "
                         f"{name!r}; rename a file or leave one out")
      self._sources[name] = rows
    require_rows(self._sources[""], self._problems)
    self._began, self._spent = time.monotonic(), 0.0

  def measure(self, params):
    """(metrics, note for the progress bar) of weights.

    The metrics are validate/NAME of the held-out data and validate/BENCHMARK/NAME of the others.
    NAME/easy and NAME/level/LEVEL are those of a part of the problems. Where a problem has several
    answers, these weights' own answers make it easy, medium or hard. speed/validation is the share
    of this process's time that validations have taken.
    """
    began, metrics = time.monotonic(), {}
    with self._phases("validation"):
      for name, source in self._sources.items():
        metrics |= self._measure(f"{VALIDATION}{name}/" if name else VALIDATION, source, params)
    self._spent += time.monotonic() - began
    metrics["speed/validation"] = self._spent / (time.monotonic() - self._began)
    note = f"validated: {percent(metrics[VALIDATION + 'accuracy'])}"
    if self._settings.samples > 1:
      note += f", pass@{self._settings.samples} {percent(metrics[VALIDATION + 'pass_at_k'])}"
    return metrics, note + f", {metrics[VALIDATION + 'tokens']:.1f} tokens"

  def _measure(self, prefix, source, params):
    found, count = [], min(self._problems, len(source))
    for indices, prompts in prompt_batches(self._generator, source, count, self._batch):
      found += answer_batch(self._generator, params, indices, prompts, self._settings)[0]
    metrics = {prefix + name: summarize(found)[key] for name, key in _MEANS.items()}
    parts = split_problems(found, self._reward)
    named = {f"level/{level}": part for level, part in parts["level"].items()}
    if self._settings.samples > 1:  # one answer says nothing about difficulty
      named |= parts["bucket"]
      metrics |= {f"{prefix}share/{name}": len(part) / len(found)
                  for name, part in parts["bucket"].items()}
    for part, problems in named.items():
      means = summarize(problems)
      # NaN is null in the log: a bucket may be empty.
      metrics |= {f"{prefix}{name}/{part}": float("nan") if means[_MEANS[name]] is None
                  else means[_MEANS[name]] for name in ("accuracy", "tokens")}
    return metrics


def open_problems(parts, text):
  """(name, rows) of a benchmark, "NAME:PATH", or of a file of the user's, "PATH"."""
  name, colon, path = text.partition(":")
  known = bool(colon) and name in benchmark_schemas()
  benchmark = open_benchmark(name, path) if known else open_benchmark(OWN, text)
  benchmark = check_prompts(benchmark, parts.generator.encoder, parts.config.threads)
  if not known:
    name = text.rstrip("/").rpartition("/")[2].partition(".")[0]
  return name, benchmark.rows
