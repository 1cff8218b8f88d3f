"""Makes one self-contained HTML file of a run, which needs no network and no server."""

import base64
import collections
import importlib.resources
import json
import os

import numpy as np

from ares_jax.ops.difficulty import BUCKETS
from ares_jax.report import statistics
from ares_jax.report.annotate import annotate
from ares_jax.report.overview import overview
from ares_jax.run.bucket import absolute

# Bytes of logged responses on a page. A browser on a phone opens 12 MB in a few seconds.
LIMIT = 12_000_000
_SCRIPTS = ("charts.js", "curves.js", "viewer.js", "report.js")


def report_page(records, others, notes=()):
  """The page of a run's Records as HTML text, with the curves of `others`, Records of more runs.

  `notes` are texts about what is damaged; the page has them, and those about what it leaves out.
  """
  files = importlib.resources.files("ares_jax.report")
  html, style, *scripts = ((files / name).read_text("utf-8")
                           for name in ("report.html", "report.css", *_SCRIPTS))
  # The data come last, so that a placeholder's name inside a response is not replaced.
  return html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", "\n".join(scripts)).replace(
    "/*DATA*/", script_json(page_data(records, others, notes)))


def panels():
  """{"aepo" or "sft": [{"title", "unit", "metrics": [[metric, label]]}]} from panels.json."""
  file = importlib.resources.files("ares_jax.report") / "panels.json"
  return json.loads(file.read_text("utf-8"))


def script_json(value):
  """JSON text that cannot end a script element or open a comment in it."""
  text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
  # Half a surrogate pair, which an incomplete token may leave, has no UTF-8.
  text = text.encode("utf-8", "replace").decode("utf-8")
  for sign in "<>&\u2028\u2029":
    text = text.replace(sign, f"\\u{ord(sign):04x}")
  return text


def page_data(records, others, notes=()):
  """The data of the page, as a dict for JSON."""
  notes = list(notes)
  rows, scale = annotated_responses(records, notes), 1.0
  if rows:
    # Entropy at the tint's full strength, which 2% of the tokens exceed.
    values = np.concatenate([row.entropy[np.isfinite(row.entropy)] for row in rows])
    scale = max(0.1, float(np.quantile(values, 0.98))) if len(values) else 1.0
  problems, images = page_problems(records.workdir, rows, notes)
  runs = [records, *others]
  return {
    "runs": [{"name": name, "stages": statistics.curves(run),
              "results": statistics.lengths(run.results)}
             for name, run in zip(short_names(runs), runs, strict=True)],
    "overview": overview(records, notes), "notes": notes,
    "panels": panels(), "buckets": BUCKETS, "scale": scale,
    "window": records.config.get("aepo", {}).get("entropy", {}).get("window", 0),
    "problems": problems, "images": images,
    "responses": [page_response(row) for row in rows],
    "logged": len(records.rollouts) + len(records.held_out),
    "scatter": statistics.length_against_count(rows),
    "difficulty": statistics.entropy_by_bucket(rows)}


def annotated_responses(records, notes, held_out=True):
  """The annotated responses of the page; what cannot be shown is noted."""
  held_out, metrics = records.held_out if held_out else [], records.metrics["aepo"]
  try:
    chosen = thin_lines(records.rollouts, LIMIT)
    unknown = sorted({line["step"] for line in chosen} - metrics.keys())
    if unknown and metrics:  # their lines of metrics.jsonl are damaged
      notes.append(f"responses of steps {unknown[:5]}, which metrics.jsonl lacks")
      chosen = [line for line in chosen if line["step"] in metrics]
    if not (chosen or held_out):
      return []
    config = records.aepo_config()
    return annotate(chosen, metrics, config) + annotate(held_out, metrics, config, held_out=True)
  except ValueError as error:
    notes.append(f"all responses: {error}")
    return []


def short_names(runs):
  """A name for each run: its folder, with as many parents as make the names differ."""
  paths = [absolute(str(run.workdir)).split("/") for run in runs]
  for depth in range(1, max(map(len, paths)) + 1):
    short = ["/".join(path[-depth:]) for path in paths]
    if len(set(short)) == len(short):
      break
  return short


def thin_lines(lines, limit):
  """Lines of evenly spaced iterations, with the first and the last, of at most `limit` bytes.

  Only the kept lines are in memory together.
  """
  indices, sizes = collections.defaultdict(list), collections.Counter()
  for index, line in enumerate(lines):
    indices[line["step"]].append(index)
    sizes[line["step"]] += _size(line)
  kept = steps = sorted(indices)
  while len(kept) > 1 and sum(sizes[step] for step in kept) > limit:
    count = len(kept) * 9 // 10
    kept = [steps[at] for at in np.linspace(0, len(steps) - 1, count).astype(int)]
  return [lines[index] for step in kept for index in indices[step]]


def _size(line):
  """Approximate bytes of a line on the page."""
  return 200 + sum(len(text) for text in line["tokens"]) + 8 * len(line["tokens"])


def page_problems(workdir, rows, notes):
  """({id: dict of question, answer and indices of images}, list of images as data URIs).

  The index of an image that cannot be read is null; it is noted.
  """
  lines = {}
  for row in rows:
    lines.setdefault(row.line["id"], row.line)
  indices, images, missing = {}, [], []
  for path in dict.fromkeys(path for line in lines.values() for path in line["images"]):
    try:
      with open(os.path.join(workdir, path), "rb") as file:
        jpeg = base64.b64encode(file.read()).decode("ascii")
    except OSError:
      missing.append(path)
    else:
      indices[path] = len(images)
      images.append(f"data:image/jpeg;base64,{jpeg}")
  if missing:
    notes.append(f"{len(missing)} images that cannot be read, for example {missing[0]}; copy them "
                 "from where the run was made")
  return {name: {"question": line["question"], "answer": line["answer"],
                 "images": [indices.get(path) for path in line["images"]]}
          for name, line in lines.items()}, images


def page_response(row):
  """One response. A token's marks are a digit, the sum of 1 flagged, 2 covered, 4 trigger."""
  line = row.line
  marks = row.flag + 2 * row.cover + 4 * row.trigger
  return {
    "held_out": row.held_out, "stage": line["stage"], "step": line["step"], "id": line["id"],
    "sample": line["sample"], "correct": line["correct"], "format_ok": line["format_ok"],
    "rate": line["pass_rate"], "bucket": row.bucket, "tau": row.threshold, "count": row.count,
    "reward": row.reward, "advantage": row.advantage, "tokens": line["tokens"],
    "entropy": _thousandths(row.entropy), "mean": _thousandths(row.mean),
    "marks": "".join(map(str, marks))}


def _thousandths(nats):
  return [round(1000 * float(value)) if np.isfinite(value) else None for value in nats]
