"""Computes the top of the page: what a run reached, and what it was made with."""

import os
import time

from ares_jax.evaluation.scores import percent
from ares_jax.run.identity import STAGES, flatten
from ares_jax.run.starts import read_starts


def overview(records, notes):
  """{"results": rows of texts, the first the head, "facts": [[name, text]], "settings": [...]}.

  "settings" is the complete config as [[key, text]]; "results" has no rows before a stage has been
  evaluated. A damaged starts.jsonl is noted in the list `notes`.
  """
  return {"results": _result_rows(records.results), "facts": _facts(records, notes),
          "settings": [[key, str(value)] for key, value in sorted(flatten(records.config).items())]}


def _result_rows(results):
  found = []
  for stage in STAGES:
    result = results.get(stage, {})
    if "greedy" not in result or "sampled" not in result:
      continue
    greedy, sampled = result["greedy"], result["sampled"]
    found.append([stage, percent(greedy["accuracy"], greedy["interval"]),
                  percent(sampled["accuracy"], sampled["interval"]),
                  percent(sampled["pass_at_k"]), f"{sampled['length']:.1f}",
                  f"{result['n']} x {result['samples']}"])
  return found and [["stage", "greedy", "sampled", "pass@k", "tokens", "problems x k"], *found]


def _facts(records, notes):
  config = records.config
  try:
    starts = read_starts(records.workdir)
  except ValueError as error:
    notes.append(str(error))
    starts = []
  steps = ", ".join(f"{stage} {max(records.metrics[stage], default=0)} of {config[stage]['steps']}"
                    for stage in STAGES if config.get(stage, {}).get("steps"))
  written = time.localtime(os.path.getmtime(os.path.join(records.workdir, "metrics.jsonl")))
  last = starts[-1] if starts else {}
  command = last.get("command", [])
  file = next((word.partition("=")[2] for word in command if word.startswith("--config=")), "")
  return [[name, str(text)] for name, text in (
    ("config", file or "unknown, see all settings"), ("seed", config.get("seed", "unknown")),
    ("steps", steps or "unknown"), ("commit", last.get("commit") or "unknown"),
    ("started", starts[0]["time"] if starts else "unknown"),
    ("last written", time.strftime("%Y-%m-%d %H:%M:%S %z", written)),
    ("machine", f"{last['devices']} x {last['device']}, {last['cpu']}, jax {last['jax']}"
     if last else "unknown"))]
