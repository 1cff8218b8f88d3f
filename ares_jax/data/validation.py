"""Finds rows that cannot be used, before a run draws any."""

import collections
import concurrent.futures

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.curation.pass_rates import candidate_responses, column_passes
from ares_jax.data.sources import Mixture, Subset
from ares_jax.data.traces import trace_batch
from ares_jax.system.heartbeat import heartbeat

_CHUNK = 1024  # rows checked together; of a good one only number, id and truths are kept


def check_rl_row(encoder, row):
  """Raises BadRow where `row` cannot be encoded as a prompt."""
  encoder.encode(row)


def check_curation_row(encoder, row, *, samples, row_tokens, row_windows):
  """Raises BadRow where AdaCS cannot choose among the responses of `row`.

  `samples` answers of the probe give its pass rate; None where it needs none.
  """
  if samples is not None:
    column_passes(row, samples)
  check_responses(encoder, row, candidate_responses(row), row_tokens=row_tokens,
                  row_windows=row_windows)


def check_sft_row(encoder, row, *, row_tokens, row_windows):
  """Raises BadRow where `row` cannot be trained on."""
  check_responses(encoder, row, [row.get("response")], row_tokens=row_tokens,
                  row_windows=row_windows)


def check_responses(encoder, row, responses, *, row_tokens, row_windows):
  """Raises BadRow where one of the responses of a row is missing or does not fit a packed row."""
  if not all(isinstance(text, str) and text.strip() for text in responses):
    raise BadRow(row["id"], "response", "a response is missing or empty")
  longest = max(responses, key=lambda text: len(encoder.chat.response(text)))
  trace_batch(encoder, [row | {"response": longest}], row_tokens=row_tokens,
              row_windows=row_windows, row_multiple=1)


def find_bad_rows(source, *, numbers, check, grader, threads):
  """Checks the rows of a FileSource with these numbers, which ascend.

  Args:
    check: function of a row that raises BadRow.
    grader: GradingPool; a row whose truth it grades as wrong is bad.
    threads: number of threads that read and decode.

  Returns:
    list of {"number", "row", "id", "source", "reason" (a key of bad_row.CODES), "message"}, one for
    each bad row, in their order.
  """
  def examine(number):
    row = {"id": None}
    try:
      row = source[number]
      check(row)
    except BadRow as error:
      return _bad_row(source, number, row["id"], error.code, error.reason)
    return {"id": row["id"], "answer": row["answer"]}

  bad_rows = []
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(numbers), _CHUNK):
      chunk = numbers[start : start + _CHUNK]
      seen = {}
      for number, found in zip(chunk, pool.map(examine, chunk), strict=True):
        heartbeat()
        seen[number] = found
      # By number: ids need not be unique.
      good = [{"id": number, "answer": found["answer"]} for number, found in seen.items()
              if "answer" in found]
      for number, truth in grader.bad_truths(good):
        seen[number] = _bad_row(source, number, seen[number]["id"], "truth",
                                f"the truth {truth!r} counts as wrong when a model writes it")
      bad_rows += [found for found in seen.values() if "reason" in found]
  return bad_rows


def _bad_row(source, number, row_id, code, message):
  return {"number": number, "row": source.location(number), "id": row_id, "source": source.name,
          "reason": code, "message": message}


def without_bad_rows(mixture, bad_rows):
  """The Mixture without the result of `find_bad_rows` for each of its parts.

  Raises:
    ValueError: all rows of a source are bad.
  """
  kept = []
  for part, bad in zip(mixture.parts, bad_rows, strict=True):
    rows = np.delete(np.arange(len(part), dtype=np.int64), [row["number"] for row in bad])
    if not len(rows):
      raise ValueError(f"none of the {len(part)} rows of {part.name} can be used: "
                       f"{bad[0]['row']}: {bad[0]['message']}")
    kept.append(Subset(part, rows))
  return Mixture(kept, mixture.weights)


def count_rows(mixture, bad_rows):
  """[{"source", "rows", "used", "quarantined", "reasons": {code: rows}}] of each part."""
  return [{"source": part.name, "rows": len(part), "used": len(part) - len(bad),
           "quarantined": len(bad),
           "reasons": dict(collections.Counter(row["reason"] for row in bad))}
          for part, bad in zip(mixture.parts, bad_rows, strict=True)]
