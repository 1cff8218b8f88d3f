import numpy as np
import pytest
from tiny import trace_batch

from ares_jax.data import digits, digits_teacher
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.traces import encode_example

TOKENIZER = digits.tokenizer()
LIMITS = dict(row_tokens=(160,), row_windows=24)


def encoder(max_tokens=26):
  chat = Chat(TOKENIZER, "", TOKENIZER.convert_tokens_to_ids("<|image_pad|>"))
  config = PromptConfig("", (max_tokens,), (4,), 784, 12544)
  return Encoder(chat, config, window=28, patch=14, merge=2)


def rows(count):
  config = digits.DigitsConfig(rows=2, columns=2, levels=5, operators=("+",), noise=0.0)
  shares = (0.3, 0.4, 0.3)
  teacher = digits_teacher.TeacherConfig(0.1, 1, (1, 0, 0), (0, 1, 0), shares, shares,
                                         (0.2, 0.2), (0.2, 0.2))
  warmup = digits_teacher.WarmupSource(digits.DigitsSource(config, "train", 0, count), teacher)
  return [warmup[index] for index in range(count)]


def test_every_example_is_packed_once_and_unpacks_to_itself():
  examples = rows(30)
  batch = trace_batch(encoder(), examples, row_tokens=(160,), row_windows=24, row_multiple=4)
  assert len(batch.tokens) % 4 == 0
  expected = sorted(tuple(encode_example(encoder(), row, **LIMITS).tokens) for row in examples)
  unpacked = [tuple(tokens[segments == segment])
              for tokens, segments in zip(batch.tokens, batch.segment, strict=True)
              for segment in range(1, segments.max() + 1)]
  assert sorted(unpacked) == expected
  assert (batch.segment > 0).mean() > 0.6


def test_packed_rows_have_the_length_that_pads_least():
  examples = rows(30)
  tokens = sum(len(encode_example(encoder(), row, **LIMITS).tokens) for row in examples)
  shared = dict(row_windows=24, row_multiple=4)
  sizes = (160, 100, 120, 1000, 5)  # 5 holds no example, 1000 all of them in one of four rows
  alone = {size: trace_batch(encoder(), examples, row_tokens=(size,), **shared).tokens.shape
           for size in sizes[:4]}
  batch = trace_batch(encoder(), examples, row_tokens=sizes, **shared)
  best = min(sizes[:4], key=lambda size: np.prod(alone[size]))
  assert batch.tokens.shape == alone[best] and best != 1000
  assert (batch.segment > 0).sum() == tokens


def test_loss_covers_the_response_and_its_end_only():
  row = rows(3)[2]
  batch = trace_batch(encoder(), [row], row_tokens=(160,), row_windows=4, row_multiple=1)
  covered = batch.tokens[0][batch.loss_mask[0]]
  assert TOKENIZER.decode(covered) == row["response"] + "<|im_end|>"


def test_positions_restart_and_image_tokens_are_fed_in_order():
  examples = rows(6)
  batch = trace_batch(encoder(), examples, row_tokens=(400,), row_windows=24, row_multiple=1)
  for segment in range(1, 7):
    inside = batch.segment[0] == segment
    assert batch.positions[0, 0][inside].min() == 0
  image = batch.tokens[0] == encoder().chat.image_token
  np.testing.assert_array_equal(batch.unit[0][image], np.arange(24))
  assert (batch.unit[0][~image] == -1).all()
  assert (np.unique(batch.vision["image"][0]) == np.arange(1, 7)).all()


def test_a_row_that_is_too_long_is_refused_and_named():
  with pytest.raises(ValueError, match="digits-train-0-0.*row_tokens"):
    trace_batch(encoder(), rows(1), row_tokens=(20,), row_windows=4, row_multiple=1)
  with pytest.raises(ValueError, match="digits-train-0-0.*max_tokens"):
    trace_batch(encoder(max_tokens=5), rows(1), row_tokens=(90,), row_windows=4, row_multiple=1)


def test_every_answer_of_a_dialogue_is_learnt_and_nothing_else():
  row = {"id": "a", "images": [], "question": "Compute red", "response": "<think> </think> red",
         "history": [{"role": "system", "content": "red"}, {"role": "user", "content": "Compute"},
                     {"role": "assistant", "content": " red red"}]}
  batch = trace_batch(encoder(90), [*rows(2), row], row_tokens=(160,), row_windows=4,
                      row_multiple=1)
  learnt = [TOKENIZER.decode(tokens[mask & (segments == segment)])
            for tokens, mask, segments in zip(
              batch.tokens, batch.loss_mask, batch.segment, strict=True)
            for segment in range(1, 1 + segments.max())]
  assert sorted(learnt) == sorted([" red red<|im_end|><think> </think> red<|im_end|>",
                                   *(each["response"] + "<|im_end|>" for each in rows(2))])
