"""Answers judged by a function of the user's that may ask a model, a batch at a time."""

from ares_jax.data import sandbox
from ares_jax.data.grade import GraderError


def verdicts(name, items):
  """What the user's judge says of answers to a benchmark.

  Unlike a grader it sees the questions, has no time limit and runs in this process, with its
  environment and network: it is the user's code, and often asks a service that wants a key.

  Args:
    name: "package.module:function", a function of `items`.
    items: list of dicts with "id", "question", "truths" (list), "response" (all that was written)
      and "answer" (what stands in its box, or None).

  Returns:
    list of 0.0 or 1.0, one an item.

  Raises:
    ValueError: there is no such function.
    GraderError: it raises, or says something else than True or False, 1 or 0, for each item.
  """
  function = sandbox.load(name)
  try:
    said = list(function(items))
  except Exception as error:
    raise GraderError(f"judge {name!r} raises {type(error).__name__}: {error}"[:300]
                      + f" on {len(items)} answers from {items[0]['id']!r} on; those before are "
                      "kept") from error
  if len(said) != len(items):
    raise GraderError(f"judge {name!r} returns {len(said)} verdicts for {len(items)} answers")
  for verdict, item in zip(said, items, strict=True):
    if not isinstance(verdict, bool | int | float) or verdict not in (0, 1):
      raise GraderError(f"judge {name!r} returns {verdict!r} for {item['id']!r}, neither 0 nor 1")
  return [float(verdict) for verdict in said]
