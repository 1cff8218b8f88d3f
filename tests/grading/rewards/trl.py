"""Reward functions as TRL's GRPOTrainer calls them: keywords, lists, None for "not mine"."""

import re


def accuracy_reward(completions, solution, **kwargs):
  contents = [completion[0]["content"] for completion in completions]
  boxes = [re.search(r"\\boxed\{(.*?)\}", content) for content in contents]
  return [float(bool(box) and box.group(1) == truth)
          for box, truth in zip(boxes, solution, strict=True)]


def short_reward(prompts, completions, completion_ids, trainer_state, log_metric=None, **kwargs):
  assert all(prompt[-1]["role"] == "user" for prompt in prompts)
  assert trainer_state.global_step >= 0
  log_metric("short", 1.0)
  return [1.0 - len(ids) / 10 for ids in completion_ids]


def task_reward(completions: list[str], solution, task, **kwargs):
  """Texts, as for data that are no dialogues; only for rows of one task."""
  return [float(truth in completion) if kind == "math" else None
          for completion, truth, kind in zip(completions, solution, task, strict=True)]


def task_of_texts(completions, **kwargs):
  return [float(bool(re.search("7", completion))) for completion in completions]


async def slow_reward(completions, **kwargs):
  return [0.5 for _ in completions]
