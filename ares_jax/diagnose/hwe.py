"""Do windows of high entropy find triggers? Precision, recall and F1 (figure 2a).

A flagged window is right where it holds a trigger; a trigger is found where a flagged window holds
it. B rows, T tokens.
"""

import collections
import json

import numpy as np

from ares_jax import ops
from ares_jax.data.trigger_words import triggers
from ares_jax.diagnose.tables import format_number, text_table

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
CLAIM = {"window": 6, "f1": 0.5}  # what the paper reports
MOST = 2048  # responses: evenly spaced ones of more


def read_labels(path):
  """{(step, id, sample): token places} of a user's JSON lines."""
  found = {}
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
        found[row["step"], row["id"], row["sample"]] = [int(place) for place in row["triggers"]]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} line {number} has no step, id, sample and triggers "
                         f"({error!r})") from error
  return found


def measure_hwe(records, labelled=None, *, windows=WINDOWS, quantiles=QUANTILES):
  """Scores of every window and quantile on the logged rollouts.

  Args:
    records: records.Records.
    labelled: of `labels`, then only labelled responses count; None: tokens of V_sem.
    windows: tokens.
    quantiles: of the window means of a response.

  Returns:
    dict: responses, tokens, triggers, scores (a list of dicts), best (one of them), claim, found
    (tokens that the run's own detector and thresholds flag).

  Raises:
    ValueError: nothing was logged, or no response has a label.
  """
  # A null among the entropies would make a threshold of all of them null.
  places = [place for place, line in enumerate(records.rollouts)
            if line["tokens"] and np.isfinite(np.float32(line["entropy"])).all()
            and (labelled is None or _key(line) in labelled)]
  if not places:
    raise ValueError(f"{records.workdir}/rollouts.jsonl has no responses with token entropies"
                     + (" that are labelled" if labelled else "") + "; train with "
                     "config.aepo.log_responses > 0")
  chosen = np.unique(np.linspace(0, len(places) - 1, min(len(places), MOST)).astype(int))
  lines = [records.rollouts[places[number]] for number in chosen]
  entropy_BT, mask_BT, trigger_BT = _arrays(lines, labelled)
  config = records.aepo_config().entropy
  scores = [score_windows(entropy_BT, mask_BT, trigger_BT, window=window, quantile=quantile,
                          reduce=config.reduce) for window in windows for quantile in quantiles]
  known = [one for one in scores if one["f1"] is not None]
  of_claim = [one for one in known if one["window"] == CLAIM["window"]]
  top = max(of_claim, key=lambda one: one["f1"], default=None)
  return {
    "workdir": records.workdir, "responses": len(lines), "tokens": int(mask_BT.sum()),
    "triggers": int(trigger_BT.sum()), "scores": scores,
    "best": max(known, key=lambda one: one["f1"], default=None),
    "claim": CLAIM | {"best": top, "holds": None if top is None else top["f1"] > CLAIM["f1"]},
    "found": _found(lines, entropy_BT, mask_BT, records.aepo_metrics(), config)}


def score_windows(entropy_BT, mask_BT, trigger_BT, *, window, quantile, reduce="mean"):
  """Precision, recall and F1 of one window and quantile, and F1 of flagging every window.

  Returns:
    dict: window, quantile, threshold (nats), flagged (windows), precision, recall, f1, every;
    None where nothing is flagged or there is no trigger in any window.
  """
  mean_BT, whole_BT = ops.window_entropy(entropy_BT, mask_BT, window=window)
  threshold, _ = ops.entropy_threshold(mean_BT, whole_BT, quantile=quantile, reduce=reduce)
  flag_BT = ops.hwe_flags(entropy_BT, mask_BT, threshold, window=window)
  whole_BT, flag_BT, cover_BT, all_BT = map(np.asarray, (
    whole_BT, flag_BT, ops.hwe_cover(flag_BT, mask_BT, window=window),
    ops.hwe_cover(whole_BT, mask_BT, window=window)))
  # Triggers in t..t+window-1; responses shorter than a window have none that can be found.
  ahead_BT = np.pad(trigger_BT, ((0, 0), (0, window - 1))).astype(int)
  holds_BT = np.lib.stride_tricks.sliding_window_view(ahead_BT, window, 1).any(-1)
  triggers = (trigger_BT & all_BT).sum()

  def ratio(part, whole):
    return float(part / whole) if whole else None

  precision = ratio((flag_BT & holds_BT).sum(), flag_BT.sum())
  recall = ratio((trigger_BT & cover_BT).sum(), triggers)
  return {"window": window, "quantile": quantile, "threshold": float(threshold),
          "flagged": int(flag_BT.sum()), "precision": precision, "recall": recall,
          "f1": _f1(precision, recall),
          "every": _f1(ratio((whole_BT & holds_BT).sum(), whole_BT.sum()),
                       1.0 if triggers else None)}


def hwe_text(result):
  """The tables and the verdict."""
  windows = sorted({one["window"] for one in result["scores"]})
  quantiles = sorted({one["quantile"] for one in result["scores"]})
  by_key = {(one["window"], one["quantile"]): one for one in result["scores"]}
  parts = [f"{result['responses']} responses, {result['tokens']} tokens, {result['triggers']} "
           "triggers", "",
           "F1 by window (rows) and quantile of window means; last: every window flagged",
           text_table(
             ["window", *quantiles, "all"],
             [[window, *(format_number(by_key[window, quantile]["f1"]) for quantile in quantiles),
               format_number(by_key[window, quantiles[0]]["every"])] for window in windows])]
  rows = [result["claim"]["best"], result["best"]]
  parts += ["", text_table(
    ["", "window", "quantile", "tau", "flagged", "precision", "recall", "F1"],
    [[name, row["window"], row["quantile"], *(format_number(row[key]) for key in (
      "threshold", "flagged", "precision", "recall", "f1"))]
     for name, row in zip((f"best at w = {CLAIM['window']}", "best"), rows, strict=True) if row])]
  parts += ["", hwe_verdict(result)]
  if result["found"]:
    most = result["found"][0]["count"]
    parts += ["", "Tokens that the run itself flagged:", text_table(
      ["token", "flags", "nats", "V_sem", ""],
      [[json.dumps(row["token"], ensure_ascii=False), row["count"], format_number(row["entropy"]),
        "yes" if row["trigger"] else "", ("#" * round(20 * row["count"] / most)).ljust(20)]
       for row in result["found"]])]
  return "\n".join(parts)


def hwe_verdict(result):
  """Whether the paper's claim holds on what was given."""
  claim, top = result["claim"], result["claim"]["best"]
  said = f"F1 > {claim['f1']} at w = {claim['window']}"
  if top is None:
    return f"{said}: cannot be said; no window of {claim['window']} tokens or no trigger in one."
  verdict = "holds" if claim["holds"] else "does not hold"
  line = f"{said} {verdict} here: F1 = {format_number(top['f1'])}"
  if top["every"] >= top["f1"]:
    line += (
      f"; flagging every window gives {format_number(top['every'])}, so entropy tells nothing "
      "about triggers here")
  return line + "."


def _found(lines, entropy_BT, mask_BT, metrics, config):
  """The most frequent tokens that the run flagged, with its detector and each iteration's tau."""
  # inf, which flags nothing, for an iteration that has not ended.
  threshold_B = np.float32([metrics.get(line["step"], {"hwe/threshold": np.inf})["hwe/threshold"]
                            for line in lines])
  trigger_BT = _arrays(lines, None)[2]
  flags = np.argwhere(np.asarray(ops.hwe_flags(
    entropy_BT, mask_BT, threshold_B, window=config.window, detector=config.detector,
    semantic_BT=trigger_BT)))
  places = collections.defaultdict(list)
  for row, place in flags:
    places[lines[row]["tokens"][place]].append((row, place))
  top = sorted(places, key=lambda token: -len(places[token]))[:20]
  return [{"token": token, "count": len(places[token]),
           "entropy": float(np.mean([entropy_BT[at] for at in places[token]])),
           "trigger": bool(trigger_BT[places[token][0]])} for token in top]


def _arrays(lines, labelled):
  """entropy float32, mask bool, trigger bool, all [B, T]."""
  shape = len(lines), max(len(line["tokens"]) for line in lines)
  entropy_BT, mask_BT, trigger_BT = (np.zeros(shape, kind) for kind in (np.float32, bool, bool))
  for row, line in enumerate(lines):
    length = len(line["tokens"])
    entropy_BT[row, :length], mask_BT[row, :length] = line["entropy"], True
    if labelled is None:
      trigger_BT[row, :length] = triggers(line["tokens"])
      continue
    places = labelled[_key(line)]
    if places and not 0 <= min(places) <= max(places) < length:
      raise ValueError(f"triggers {places} of {_key(line)} are outside its {length} tokens")
    trigger_BT[row, places] = True
  return entropy_BT, mask_BT, trigger_BT


def _key(line):
  return line["step"], line["id"], line["sample"]


def _f1(precision, recall):
  if precision is None or recall is None:
    return None
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
