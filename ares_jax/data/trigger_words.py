"""V_sem: words that mark a turn in reasoning (paper appendix H), as a table over a vocabulary.

The words are in trigger_words.json, which names their source and licence.
"""

import functools
import importlib.resources
import json

import numpy as np


@functools.cache
def trigger_words():
  """The 174 trigger words, a frozenset of lower-case str."""
  file = importlib.resources.files("ares_jax.data") / "trigger_words.json"
  text = file.read_text("utf-8")
  return frozenset(json.loads(text)["words"])


def triggers(texts):
  """list of bool: whether each token's text, stripped and lower-cased, is a trigger word."""
  words = trigger_words()
  return [text.strip().lower() in words for text in texts]


def semantic_table(tokenizer, vocab):
  """bool [vocab]: tokens that are trigger words.

  Args:
    tokenizer: a `transformers` fast tokenizer.
    vocab: rows of the embedding, at least the tokenizer's size.
  """
  texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
  table = np.zeros(vocab, bool)
  table[: len(texts)] = triggers(texts)
  return table
