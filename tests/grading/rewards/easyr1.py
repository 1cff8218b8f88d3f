"""Reward functions as EasyR1 calls them: a list of dicts, or one dict."""

import re

REWARD_NAME = "boxed"
REWARD_TYPE = "batch"


def format_score(response):
  return 1.0 if re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", response, re.DOTALL) else 0.0


def accuracy_score(response, ground_truth):
  found = re.search(r"\\boxed\{(.*?)\}", response)
  return 1.0 if found and found.group(1) == ground_truth.strip() else 0.0


def compute_score(reward_inputs, format_weight=0.1):
  if not isinstance(reward_inputs, list):
    raise ValueError("this function takes a batch")
  scores = []
  for reward_input in reward_inputs:
    right = accuracy_score(reward_input["response"], reward_input["ground_truth"])
    formed = format_score(reward_input["response"])
    scores.append({"overall": (1 - format_weight) * right + format_weight * formed,
                   "format": formed, "accuracy": right})
  return scores


def compute_one(reward_input):
  return {"overall": 1.0 if reward_input["response_length"] < 4 else -1.0, "accuracy": 0.5}


def signed(reward_inputs, max_response_length):
  """Accuracy in -1 and 1, as some have it, with a number that is one beside it."""
  right = [accuracy_score(one["response"], one["ground_truth"]) for one in reward_inputs]
  return [{"overall": 2 * x - 1 - one["response_length"] / max_response_length,
           "accuracy": 2 * x - 1, "share": x} for x, one in zip(right, reward_inputs, strict=True)]
