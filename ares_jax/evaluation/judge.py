"""Answers judged by a function of the user's that may ask a model, a batch at a time."""

from ares_jax.grading import sandbox
from ares_jax.grading.pool import GraderError
from ares_jax.system import heartbeat


def verdicts(name, items):
  """What the user's judge says of answers to a benchmark.

  Unlike a grader it sees the questions, has no time limit (nor does `pulse.watch` end it) and runs
  in this process, with its environment and network: it is the user's code, and often asks a service
  that wants a key.

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
  function = sandbox.load_grader(name, "judge")
  try:
    with heartbeat.without_watchdog():
      said = list(function(items))
  except Exception as error:
    raise GraderError(f"judge {name!r} raises {type(error).__name__}: {error}"[:300]
                      + f" on {len(items)} answers from {items[0]['id']!r} on; those before are "
                      "kept") from error
  if len(said) != len(items):
    raise GraderError(f"judge {name!r} returns {len(said)} verdicts for {len(items)} answers")
  found = [sandbox.zero_or_one(verdict) for verdict in said]
  if None in found:
    place = found.index(None)
    raise GraderError(f"judge {name!r} returns {said[place]!r} for {items[place]['id']!r}, neither "
                      "0 nor 1")
  return found
