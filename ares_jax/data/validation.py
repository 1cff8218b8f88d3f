"""Finds rows that cannot be used, before a run draws any; training and `inspect_data` ask here."""

import collections
import concurrent.futures
import dataclasses
import re

import numpy as np

from ares_jax.data.bad_row import BadRow, printable
from ares_jax.data.prompts import check_letters
from ares_jax.data.sources import Mixture, Subset
from ares_jax.data.traces import add_response, check_size
from ares_jax.system.heartbeat import heartbeat

_CHUNK = 1024  # rows checked together; of a good one only id, truths and measures are kept
_TAG = re.compile(r"</?(?:answer|think|thinking|solution|reasoning|result|response|output|box)\b"
                  r"[^<>]*>|</\w+>|<\|[^<>|]+\|>", re.I)
# A table or a program wrote it for no value, or it holds no letter, digit or sign.
_MISSING = re.compile(
  r"(?:nan|NaN|NAN|null|NULL|<NA>|#N/A|\\(?:boxed|text|mathrm)(?![a-z])|[\s${}.?])*")
_OPTION = re.compile(r"(?:option|choice) +\(?[a-z]\)?\.?", re.I)
_LABEL = re.compile(r"\W*(?:\\text\{)?(?:(?:so|thus|hence|therefore|then|finally)\b[,:]? *)?"
                    r"(?:(?:the|our|my|final|correct|right) +)*"
                    r"(?:(?:answer|solution|result) *(?:is\b|are\b|was\b|:|=)|答案)", re.I)
_CONCLUSION = re.compile(r"(?:so|thus|hence|therefore|finally)\b[^\\\d]*\d", re.I)
_STATEMENT = re.compile(r"(?:it|there|they|he|she|we|this|that)\b[^\\\d]*"
                        r"\b(?:is|are|was|were|has|have|had|equals?)\b[^\\\d]*\d", re.I)


def check_responses(encoder, row, responses, *, row_tokens, row_windows):
  """The EncodedPrompt of `row`; BadRow where a response is missing or does not fit a packed row."""
  if not all(isinstance(text, str) and text.strip() for text in responses):
    raise BadRow(row["id"], "response", "a response is missing or empty")
  check_letters(row, max(map(len, responses)), max(row_tokens))
  longest = max(responses, key=lambda text: len(encoder.chat.response(text)))
  prompt = encoder.encode(row)
  check_size(encoder, row, add_response(encoder, prompt, longest), row_tokens=row_tokens,
             row_windows=row_windows)
  return prompt


def no_answer(truth):
  """Why no answer in a box can be this truth, a text; None where one can."""
  truth = truth.strip()
  reasons = {
    "is how a missing value is written": _MISSING.fullmatch(truth),
    "has a tag": _TAG.search(truth),
    "has ####, which the schema gsm8k reads": "####" in truth,
    "has a box inside a text, which the schema math reads":
      "\\boxed" in truth and not truth.lstrip("$ ").startswith("\\boxed"),
    "has several lines": "\n" in truth and "\\begin" not in truth,
    "is a text that holds an object or a list": truth[:2] in ('{"', '["', "['", "{'"),
    "has signs around the value": truth[:1] in ("=", "`"),
    "names an option in words; give its letter": _OPTION.fullmatch(truth),
    "is a sentence around a value":
      any(pattern.match(truth) for pattern in (_LABEL, _CONCLUSION, _STATEMENT)),
  }
  return next((reason for reason, found in reasons.items() if found), None)


def bad_truths(rows, grader):
  """Yields (row, reason) of each row whose truth no answer can meet.

  `rows` are dicts with "answer", and `grader` a GradingPool; a user's grader decides alone what a
  truth looks like, and is called once a row.
  """
  users, others = ":" in grader.name, []
  for row in rows:
    truths = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    reasons = [None if users else no_answer(truth) for truth in truths]
    if all(reasons):
      yield row, f"the truth '{printable(truths[0])}' {reasons[0]}; give the value alone"
    else:
      others.append(row)
  for row in grader.bad_truths(others):
    truth = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    yield row, f"the truth '{printable(truth)}' counts as wrong when a model writes it"


@dataclasses.dataclass
class Examined:
  """What is known of one row."""

  number: int  # of the row in its source
  id: str | None = None  # None where it could not be read
  answer: object = None
  measured: object = None  # of a good row
  bad: BadRow | None = None


def examine(source, *, numbers, check, grader, threads, measure=None):
  """Yields Examined of the rows with these numbers, in their order.

  Args:
    source: random access to rows.
    numbers: of rows, a sequence.
    check: function of a row that returns its EncodedPrompt, or raises BadRow.
    grader: GradingPool; a row whose truth it grades as wrong is bad. None: truths are not needed.
    threads: number of threads that read and decode.
    measure: function of (row, EncodedPrompt) of a row that passes `check`.
  """
  def read(number):
    found = Examined(number)
    try:
      row = source[number]
      found.id, found.answer = row["id"], row["answer"]
      prompt = check(row)
      found.measured = measure and measure(row, prompt)
    except BadRow as error:
      found.bad = error
    return found

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(numbers), _CHUNK):
      chunk = []
      for found in pool.map(read, numbers[start : start + _CHUNK]):
        heartbeat()
        chunk.append(found)
      if grader is not None:
        good = [{"examined": found, "answer": found.answer} for found in chunk if not found.bad]
        for row, reason in bad_truths(good, grader):
          row["examined"].bad = BadRow(row["examined"].id, "truth", reason)
      yield from chunk


def find_bad_rows(source, **how):
  """The bad rows of a FileSource that `examine` finds with these arguments.

  Returns:
    list of {"number", "row", "id", "source", "reason" (a key of bad_row.CODES), "message"}, one for
    each bad row, in their order.
  """
  return [{"number": found.number, "row": source.location(found.number), "id": found.id,
           "source": source.name, "reason": found.bad.code, "message": found.bad.reason}
          for found in examine(source, **how) if found.bad]


def without_bad_rows(mixture, bad_rows):
  """The Mixture without the result of `find_bad_rows` for each of its parts.

  Raises:
    ValueError: all rows of a source are bad.
  """
  kept = []
  for part, bad in zip(mixture.parts, bad_rows, strict=True):
    rows = np.delete(np.arange(len(part), dtype=np.int64), [row["number"] for row in bad])
    if not len(rows):
      raise ValueError(f"none of the {len(part)} rows of {printable(part.name)} can be used: "
                       f"{printable(bad[0]['row'])}: {bad[0]['message']}")
    kept.append(Subset(part, rows))
  return Mixture(kept, mixture.weights)


def count_rows(mixture, bad_rows):
  """[{"source", "rows", "used", "quarantined", "reasons": {code: rows}}] of each part."""
  return [{"source": part.name, "rows": len(part), "used": len(part) - len(bad),
           "quarantined": len(bad),
           "reasons": dict(collections.Counter(row["reason"] for row in bad))}
          for part, bad in zip(mixture.parts, bad_rows, strict=True)]
