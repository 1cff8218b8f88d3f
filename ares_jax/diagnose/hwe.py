"""Measures whether windows of high entropy find trigger words: precision, recall, F1 (figure 2a).

A flagged window counts as right if it holds a trigger; a trigger counts as found if a flagged
window holds it. B rows, T tokens.
"""

import collections
import json

import numpy as np

from ares_jax import ops
from ares_jax.data.trigger_words import are_triggers, triggers_in
from ares_jax.system import figures
from ares_jax.system.figures import Curve
from ares_jax.system.tables import format_number, text_table

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CLAIM = {"window": 6, "f1": 0.5}  # what the paper reports
MAX_RESPONSES = 2048  # of more, evenly spaced ones are taken


def read_labels(path):
  """{(step, id, sample): indices of trigger tokens} from a user's file of JSON lines."""
  found = {}
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
        found[row["step"], row["id"], row["sample"]] = [int(index) for index in row["triggers"]]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} line {number} has no step, id, sample and triggers "
                         f"({error!r})") from error
  return found


def measure_hwe(records, labelled=None, *, windows=WINDOWS, quantiles=QUANTILES):
  """Scores of every window (tokens) and quantile (of window means) on the logged rollouts.

  With `labelled`, a result of `read_labels`, only labelled responses count; without it the triggers
  are the tokens of V_sem.

  Returns:
    dict: "responses", "tokens", "triggers" (counts), "scores" (a list of `score_windows`), "best"
    (one of them), "claim" (the paper's, with the best score at its window), "found" (the tokens
    that the run's own detector and thresholds flag most often).
  """
  # One entropy that is null (not finite) would make the threshold over all responses null.
  usable = [index for index, line in enumerate(records.rollouts)
            if line["tokens"] and np.isfinite(np.float32(line["entropy"])).all()
            and (labelled is None or _key(line) in labelled)]
  if not usable:
    raise ValueError(f"{records.workdir}/rollouts.jsonl has no responses with token entropies"
                     + (" that are labelled" if labelled else "") + "; train with "
                     "config.aepo.log_responses > 0")
  chosen = np.unique(np.linspace(0, len(usable) - 1, min(len(usable), MAX_RESPONSES)).astype(int))
  lines = [records.rollouts[usable[number]] for number in chosen]
  entropy_BT, mask_BT, trigger_BT = _arrays(lines, labelled)
  config = records.aepo_config().entropy
  scores = [score_windows(entropy_BT, mask_BT, trigger_BT, window=window, quantile=quantile,
                          reduce=config.reduce) for window in windows for quantile in quantiles]
  known = [one for one in scores if one["f1"] is not None]
  top = max((one for one in known if one["window"] == CLAIM["window"]),
            key=lambda one: one["f1"], default=None)
  return {
    "workdir": str(records.workdir), "responses": len(lines), "tokens": int(mask_BT.sum()),
    "triggers": int(trigger_BT.sum()), "scores": scores,
    "best": max(known, key=lambda one: one["f1"], default=None),
    "claim": CLAIM | {"best": top, "holds": None if top is None else top["f1"] > CLAIM["f1"]},
    "found": _found(lines, entropy_BT, mask_BT, records.metrics["aepo"], config)}


def score_windows(entropy_BT, mask_BT, trigger_BT, *, window, quantile, reduce="mean"):
  """Precision, recall and F1 of one window and quantile, as a dict.

  "threshold" is in nats, "flagged" a number of windows, "every" the F1 of flagging every window.
  Scores are None if no window is flagged or no window holds a trigger.
  """
  mean_BT, complete_BT = ops.window_entropy(entropy_BT, mask_BT, window=window)
  threshold, _ = ops.entropy_threshold(mean_BT, complete_BT, quantile=quantile, reduce=reduce)
  flag_BT = ops.hwe_flags(entropy_BT, mask_BT, threshold, window=window)
  # Tokens inside flagged windows, and those inside any window.
  cover_BT = np.asarray(ops.hwe_cover(flag_BT, mask_BT, window=window))
  any_BT = np.asarray(ops.hwe_cover(complete_BT, mask_BT, window=window))
  complete_BT, flag_BT = np.asarray(complete_BT), np.asarray(flag_BT)
  # True where one of the tokens t..t+window-1 is a trigger.
  ahead_BT = np.pad(trigger_BT, ((0, 0), (0, window - 1))).astype(int)
  holds_BT = np.lib.stride_tricks.sliding_window_view(ahead_BT, window, 1).any(-1)
  triggers = (trigger_BT & any_BT).sum()

  def ratio(part, total):
    return float(part / total) if total else None

  precision = ratio((flag_BT & holds_BT).sum(), flag_BT.sum())
  recall = ratio((trigger_BT & cover_BT).sum(), triggers)
  return {"window": window, "quantile": quantile, "threshold": float(threshold),
          "flagged": int(flag_BT.sum()), "precision": precision, "recall": recall,
          "f1": _f1(precision, recall),
          "every": _f1(ratio((complete_BT & holds_BT).sum(), complete_BT.sum()),
                       1.0 if triggers else None)}


def hwe_text(result):
  """The tables and the verdict, for a terminal."""
  windows, quantiles, by_key = _score_table(result)
  scores = [[window, *(format_number(by_key[window, quantile]["f1"]) for quantile in quantiles),
             format_number(by_key[window, quantiles[0]]["every"])] for window in windows]
  best = {f"best at w = {CLAIM['window']}": result["claim"]["best"], "best": result["best"]}
  rows = [[name, row["window"], row["quantile"], *(format_number(row[key]) for key in (
    "threshold", "flagged", "precision", "recall", "f1"))] for name, row in best.items() if row]
  parts = [
    f"{result['responses']} responses, {result['tokens']} tokens, {result['triggers']} triggers",
    "", "F1 by window (rows) and quantile of window means; all: every window flagged",
    text_table(["window", *quantiles, "all"], scores), "",
    text_table(["", "window", "quantile", "tau", "flagged", "precision", "recall", "F1"], rows),
    "", hwe_verdict(result)]
  if result["found"]:
    most = result["found"][0]["count"]
    parts += ["", "Tokens that the run itself flagged:", text_table(
      ["token", "flags", "nats", "V_sem", ""],
      [[json.dumps(row["token"], ensure_ascii=False), row["count"], format_number(row["entropy"]),
        "yes" if row["trigger"] else "", ("#" * round(20 * row["count"] / most)).ljust(20)]
       for row in result["found"]])]
  return "\n".join(parts)


def hwe_verdict(result):
  """Whether the paper's claim holds for these responses, in a sentence."""
  claim, top = result["claim"], result["claim"]["best"]
  said = f"F1 > {claim['f1']} at w = {claim['window']}"
  if top is None:
    return f"{said}: cannot be decided; no window of {claim['window']} tokens holds a trigger."
  verdict = "holds" if claim["holds"] else "does not hold"
  line = f"{said} {verdict} here: F1 = {format_number(top['f1'])}"
  if top["every"] >= top["f1"]:
    line += (f"; flagging every window gives {format_number(top['every'])}, so entropy tells "
             "nothing about triggers here")
  return line + "."


def hwe_pictures(result):
  """{name: figure}: F1 by window with a curve for each quantile, and the tokens the run flagged."""
  windows, quantiles, by_key = _score_table(result)
  values = {f"quantile {quantile}": [by_key[window, quantile]["f1"] for window in windows]
            for quantile in quantiles}
  values["every window flagged"] = [by_key[window, quantiles[0]]["every"] for window in windows]
  curves = [Curve(name, windows, y) for name, y in values.items() if y.count(None) < len(y)]
  found = {}
  if curves:
    top = result["claim"]["best"]
    best = "not known" if top is None else format_number(top["f1"])
    found["hwe_f1"] = figures.curve_figure(
      f"HWE windows against triggers (figure 2a); best at w = {CLAIM['window']}: {best}", curves,
      x_label="window, tokens", y_label="F1")
  if result["found"]:
    groups = [(json.dumps(row["token"], ensure_ascii=False)[:18] + (" *" if row["trigger"] else ""),
               [(row["count"], f"{row['entropy']:.2f} nats")]) for row in result["found"]]
    found["hwe_tokens"] = figures.bar_figure(
      "Tokens that the run flagged most often (* in V_sem)", groups, x_label="flags")
  return found


def _score_table(result):
  """(windows, quantiles, {(window, quantile): score})."""
  by_key = {(one["window"], one["quantile"]): one for one in result["scores"]}
  windows, quantiles = (sorted({key[part] for key in by_key}) for part in (0, 1))
  return windows, quantiles, by_key


def _found(lines, entropy_BT, mask_BT, metrics, config):
  """The tokens that the run flagged most often, with its detector and each iteration's tau."""
  # An iteration without metrics has not ended; an infinite threshold flags nothing.
  threshold_B = np.float32([metrics.get(line["step"], {"hwe/threshold": np.inf})["hwe/threshold"]
                            for line in lines])
  trigger_BT = np.zeros_like(mask_BT)
  for row, line in enumerate(lines):
    trigger_BT[row, :len(line["tokens"])] = are_triggers(line["tokens"])  # as in training
  flags = np.argwhere(np.asarray(ops.hwe_flags(
    entropy_BT, mask_BT, threshold_B, window=config.window, detector=config.detector,
    semantic_BT=trigger_BT)))
  positions = collections.defaultdict(list)  # {token: [(row, index)]}
  for row, index in flags:
    positions[lines[row]["tokens"][index]].append((row, index))
  top = sorted(positions, key=lambda token: -len(positions[token]))[:20]
  return [{"token": token, "count": len(positions[token]),
           "entropy": float(np.mean([entropy_BT[at] for at in positions[token]])),
           "trigger": bool(trigger_BT[positions[token][0]])} for token in top]


def _arrays(lines, labelled):
  """(entropy float32, mask bool, trigger bool), each [B, T]."""
  shape = len(lines), max(len(line["tokens"]) for line in lines)
  entropy_BT, mask_BT, trigger_BT = (np.zeros(shape, kind) for kind in (np.float32, bool, bool))
  for row, line in enumerate(lines):
    length = len(line["tokens"])
    entropy_BT[row, :length], mask_BT[row, :length] = line["entropy"], True
    if labelled is None:
      trigger_BT[row, :length] = triggers_in(line["tokens"])
      continue
    indices = labelled[_key(line)]
    if indices and not 0 <= min(indices) <= max(indices) < length:
      raise ValueError(f"triggers {indices} of {_key(line)} are outside its {length} tokens")
    trigger_BT[row, indices] = True
  return entropy_BT, mask_BT, trigger_BT


def _key(line):
  return line["step"], line["id"], line["sample"]


def _f1(precision, recall):
  if precision is None or recall is None:
    return None
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
