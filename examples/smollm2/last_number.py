"""A judge for `python -m ares_jax.evaluate`: an answer is right if the last number in it is.

The model as it is published writes no box, so that the built-in grader would find no answer.
"""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def verdicts(items):
  """True or False for each: dicts with response and truths, a list of texts."""
  return [said(item["response"]) in {float(truth) for truth in item["truths"]} for item in items]


def said(response):
  """The last number of a text, or None."""
  found = NUMBER.findall(response)
  return float(found[-1].replace(",", "")) if found else None
