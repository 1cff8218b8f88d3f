"""Lets a function of the user grade answers; it may ask a model."""

from ares_jax.grading import sandbox
from ares_jax.grading.pool import GraderError
from ares_jax.grading.response import extract_boxed
from ares_jax.system import heartbeat


def verdicts(name, answered):
  """Grades of a user's judge for answers to a benchmark.

  Unlike a grader, a judge sees the questions and has no time limit; the watchdog does not end it.
  It runs in this process, with its environment and network, because it often asks a service that
  needs a key. It is called with a list of dicts: "id", "question", "truths" (list), "response" (the
  whole text) and "answer" (the content of its box, or None).

  Args:
    name: "package.module:function", the judge.
    answered: list of (row, text of the response).

  Returns:
    list of 0.0 or 1.0, one for each answer.

  Raises:
    ValueError: there is no such function.
    GraderError: the judge raises, or does not return True or False, 1 or 0, for each answer.
  """
  items = [{"id": row["id"], "question": row["question"],
            "truths": [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"]),
            "response": text, "answer": extract_boxed(text)} for row, text in answered]
  function = sandbox.load_grader(name, "judge")
  try:
    with heartbeat.without_watchdog():
      returned = list(function(items))
  except Exception as error:
    raise GraderError(f"judge {name!r} raises {type(error).__name__}: {error}"[:300]
                      + f" on {len(items)} answers from {items[0]['id']!r} on; those before are "
                      "kept") from error
  if len(returned) != len(items):
    raise GraderError(f"judge {name!r} returns {len(returned)} verdicts for {len(items)} answers")
  grades = [sandbox.zero_or_one(verdict) for verdict in returned]
  for item, verdict, grade in zip(items, returned, grades, strict=True):
    if grade is None:
      raise GraderError(f"judge {name!r} returns {verdict!r} for {item['id']!r}, neither 0 nor 1")
  return grades
