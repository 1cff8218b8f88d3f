"""Reward functions of the form of this repository, one answer or a batch a call."""


def same(response, truth):
  """Whether the box holds the truth."""
  return response.rpartition("\\boxed{")[2].rstrip("}") == truth[0]


def parts(response, truth, question, level, entropies, grade_level):
  """Several numbers of an answer, from the row, the file's own column and the entropies."""
  return {"accuracy": 0.25 + 0.5 * same(response, truth), "asks": len(question),
          "level": float(level), "sure": -sum(entropies), "grade": grade_level}


def ranks(responses, truths, id):
  """Each answer's share of the longest answer to its problem."""
  longest = {one: max(len(text) for text, of in zip(responses, id, strict=True) if of == one)
             for one in id}
  return [len(text) / longest[one] for text, one in zip(responses, id, strict=True)]


def keywords(*, response, truth, level, scale=1.0):
  """Takes nothing by position."""
  return scale * same(response, truth) * (level in ("1", "2"))


def anything(**kwargs):
  """Takes every field and column by name."""
  return same(kwargs["response"], kwargs["truth"]) * (kwargs["task"] in ("math", "code"))


def lacking(response, truth, solutoin):
  """Asks for a column that is misspelled."""
  return 1.0


def odd(responses, truths):
  """Fails in the way that the first response names."""
  import os
  import time
  how = responses[0]
  if how == "raises":
    return {}["x"]
  if how == "exits":
    raise SystemExit(0)
  if how == "dies":
    os._exit(1)
  if how == "hangs":
    time.sleep(60)
  value = {"None": None, "nan": float("nan"), "text": "1.0", "empty": {}}.get(how, 1.0)
  return [value] * (len(responses) + (how == "length"))
