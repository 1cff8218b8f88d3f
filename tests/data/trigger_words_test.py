import numpy as np

from ares_jax.data import digits
from ares_jax.data.trigger_words import trigger_table, trigger_words, triggers_in


def test_table_marks_trigger_words_whatever_their_space_and_case():
  class Tokenizer:
    texts = ("wait", " Wait", "waiting", " but", "3", " HOWEVER ")

    def __len__(self):
      return len(self.texts)

    def batch_decode(self, ids):
      return [self.texts[index] for (index,) in ids]

  np.testing.assert_array_equal(trigger_table(Tokenizer(), 8), [1, 1, 0, 1, 0, 1, 0, 0])


def test_words_are_those_of_the_release_in_lower_case():
  words = trigger_words()
  assert len(words) == 174 and {"wait", "because", "alternatively"} <= words
  assert all(word == word.lower() for word in words)


def test_digits_tokenizer_has_one_trigger_word():
  tokenizer = digits.tokenizer()
  table = trigger_table(tokenizer, 64)
  assert tokenizer.convert_tokens_to_ids(" wait") in np.flatnonzero(table)


def test_the_name_of_a_tag_is_no_trigger_of_a_response():
  texts = ["<", "think", ">", " I", " think", ">", "2", "\n</", "think", ">\n", "think"]
  assert np.flatnonzero(triggers_in(texts)).tolist() == [4, 10]
  assert triggers_in([]) == []
