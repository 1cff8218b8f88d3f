"""Finds the rows that cannot be used before a run draws any: in = used + quarantined, exactly."""

import collections
import concurrent.futures

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.sources import Kept, Mixture
from ares_jax.data.traces import trace_batch
from ares_jax.pulse import beat  # the module by its name would load jax, see ares_jax/__init__.py

_CHUNK = 1024  # rows looked at together; what is kept of one is its number, id and truths


def check_prompt(encoder, row):
  """Raises BadRow where `row` cannot be a prompt."""
  encoder.encode(row)


def check_traces(encoder, row, *, field, row_tokens, row_windows):
  """Raises BadRow where a response of `row` cannot be learnt.

  Args:
    encoder: prompts.Encoder.
    row: a row.
    field: "response", or "responses" for a list of them.
    row_tokens, row_windows: what a packed row holds.
  """
  responses = row.get(field) or []
  responses = responses if isinstance(responses, list) else [responses]
  if not responses or not all(isinstance(text, str) and text.strip() for text in responses):
    raise BadRow(row["id"], "response", f"has no {field!r}, a teacher's text that it is there for")
  longest = max(responses, key=lambda text: len(encoder.chat.response(text)))
  trace_batch(encoder, [row | {"response": longest}], row_tokens=row_tokens,
              row_windows=row_windows, row_multiple=1)


def scan(source, check, *, grader, threads):
  """Looks at every row of one source.

  Args:
    source: sources.FileSource.
    check: function of a row that raises BadRow.
    grader: grade.GradingPool; a truth that it does not take for right is a fault.
    threads: that read and decode.

  Returns:
    A fault for every row that cannot be used, in their order: {"number", "row", "id", "source",
    "reason" (a key of bad_row.CODES), "message"}.
  """
  def look(number):
    row = {"id": None}
    try:
      row = source[number]
      check(row)
    except BadRow as error:
      return _fault(source, number, row["id"], error.code, error.reason)
    return {"id": row["id"], "answer": row["answer"]}

  faults = []
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(source), _CHUNK):
      seen = {}
      for number, found in enumerate(pool.map(look, range(
          start, min(start + _CHUNK, len(source)))), start):
        beat()
        seen[number] = found
      # By number: ids of one's own may come twice.
      good = [{"id": number, "answer": found["answer"]} for number, found in seen.items()
              if "answer" in found]
      for number, truth in grader.bad_truths(good):
        seen[number] = _fault(source, number, seen[number]["id"], "truth",
                              f"the truth {truth!r} counts as wrong when a model writes it")
      faults += [found for found in seen.values() if "reason" in found]
  return faults


def _fault(source, number, name, code, message):
  return {"number": number, "row": source.place(number), "id": name, "source": source.name,
          "reason": code, "message": message}


def without(mixture, faults):
  """The Mixture without its faulty rows.

  Args:
    mixture: sources.Mixture.
    faults: for each of its parts what `scan` returns.

  Raises:
    ValueError: a source has no other rows.
  """
  kept = []
  for part, bad in zip(mixture.parts, faults, strict=True):
    rows = np.delete(np.arange(len(part), dtype=np.int64), [fault["number"] for fault in bad])
    if not len(rows):
      raise ValueError(f"none of the {len(part)} rows of {part.name} can be used: "
                       f"{bad[0]['row']}: {bad[0]['message']}")
    kept.append(Kept(part, rows))
  return Mixture(kept, mixture.weights)


def count(mixture, faults):
  """[{"source", "rows", "used", "quarantined", "reasons": {code: rows}}] of each part."""
  return [{"source": part.name, "rows": len(part), "used": len(part) - len(bad),
           "quarantined": len(bad),
           "reasons": dict(collections.Counter(fault["reason"] for fault in bad))}
          for part, bad in zip(mixture.parts, faults, strict=True)]
