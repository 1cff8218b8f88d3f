"""Finds the rows that cannot be used before a run draws any: in = used + quarantined, exactly."""

import collections
import concurrent.futures

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.curation.pass_rates import candidate_responses, column_passes
from ares_jax.data.sources import Kept, Mixture
from ares_jax.data.traces import trace_batch
from ares_jax.system.heartbeat import heartbeat

_CHUNK = 1024  # rows looked at together; what is kept of one is its number, id and truths


def check_rl_row(encoder, row):
  """Raises BadRow where `row` cannot be a prompt."""
  encoder.encode(row)


def check_curation_row(encoder, row, *, samples, row_tokens, row_windows):
  """Raises BadRow where AdaCS cannot choose among the responses of `row`.

  Args:
    encoder, row_tokens, row_windows: as for `check_traces`.
    row: a row.
    samples: answers that its pass rate counts as; None where it needs none.
  """
  if samples is not None:
    column_passes(row, samples)
  check_responses(encoder, row, candidate_responses(row), row_tokens=row_tokens,
                  row_windows=row_windows)


def check_sft_row(encoder, row, *, row_tokens, row_windows):
  """Raises BadRow where the response of `row` cannot be learnt; arguments as for `check_traces`."""
  check_responses(encoder, row, [row.get("response")], row_tokens=row_tokens,
                  row_windows=row_windows)


def check_responses(encoder, row, responses, *, row_tokens, row_windows):
  """Raises BadRow where one of the responses cannot be learnt.

  Args:
    encoder: prompts.Encoder.
    row: a row.
    responses: texts.
    row_tokens, row_windows: what a packed row holds.
  """
  if not all(isinstance(text, str) and text.strip() for text in responses):
    raise BadRow(row["id"], "response", "has no response, a teacher's text, or an empty one")
  longest = max(responses, key=lambda text: len(encoder.chat.response(text)))
  trace_batch(encoder, [row | {"response": longest}], row_tokens=row_tokens,
              row_windows=row_windows, row_multiple=1)


def find_bad_rows(source, *, numbers, check, grader, threads):
  """Looks at rows of one source.

  Args:
    source: sources.FileSource.
    numbers: of the rows, ascending.
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
    for start in range(0, len(numbers), _CHUNK):
      chunk, seen = numbers[start : start + _CHUNK], {}
      for number, found in zip(chunk, pool.map(look, chunk), strict=True):
        heartbeat()
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


def without_bad_rows(mixture, faults):
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


def count_rows(mixture, faults):
  """[{"source", "rows", "used", "quarantined", "reasons": {code: rows}}] of each part."""
  return [{"source": part.name, "rows": len(part), "used": len(part) - len(bad),
           "quarantined": len(bad),
           "reasons": dict(collections.Counter(fault["reason"] for fault in bad))}
          for part, bad in zip(mixture.parts, faults, strict=True)]
