"""Words that mark a turn in reasoning (V_sem, paper appendix H), as a table over a vocabulary.

trigger_words.json holds the words and names their source and licence.
"""

import functools
import importlib.resources
import json

import numpy as np


@functools.cache
def trigger_words():
  """The 174 trigger words, a frozenset of lower-case str."""
  file = importlib.resources.files("ares_jax.data") / "trigger_words.json"
  return frozenset(json.loads(file.read_text("utf-8"))["words"])


def are_triggers(texts):
  """list of bool: whether the text of each token, stripped and in lower case, is a trigger word."""
  words = trigger_words()
  return [text.strip().lower() in words for text in texts]


def triggers_in(texts):
  """list of bool: the trigger words among a response's tokens, without those that name a tag.

  Where <think> is no token of its own, a model writes it as "<", "think", ">".
  """
  before, after = ["", *texts][:-1], [*texts, ""][1:]
  return [is_trigger and not (left.rstrip("/").endswith("<") and right.startswith(">"))
          for is_trigger, left, right in zip(are_triggers(texts), before, after, strict=True)]


def trigger_table(tokenizer, vocab):
  """bool [vocab]: tokens that are trigger words; `vocab` is at least the fast tokenizer's size."""
  texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
  table = np.zeros(vocab, bool)
  table[: len(texts)] = are_triggers(texts)
  return table
