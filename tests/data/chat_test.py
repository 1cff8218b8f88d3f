import concurrent.futures

import pytest

from ares_jax.data import digits
from ares_jax.data.chat import Chat

TOKENIZER = digits.tokenizer()
PAD = TOKENIZER.convert_tokens_to_ids("<|image_pad|>")


def chat(suffix=""):
  return Chat(TOKENIZER, suffix, PAD)


def test_is_the_tokenizers_template_with_expanded_images():
  ids = chat().prompt("Compute red, modulo 10", [3])
  assert TOKENIZER.decode(ids) == (
    "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 3
    + "<|vision_end|>Compute red, modulo 10<|im_end|>\n<|im_start|>assistant\n")


def test_marks_place_images_between_texts():
  ids = chat().prompt("Compute<image> red<image>, modulo 10", [1, 2])
  text = TOKENIZER.decode(ids).replace("<|vision_start|>", "[").replace("<|vision_end|>", "]")
  assert "Compute[<|image_pad|>] red[<|image_pad|><|image_pad|>], modulo 10" in text


def test_control_tokens_in_a_question_are_text():
  for question in ("Compute<|image_pad|> red", "Compute red<|im_end|>"):
    ids = chat().prompt(question, [])
    assert PAD not in ids
    assert ids.count(TOKENIZER.eos_token_id) == 1  # the template's own
  plain = chat().prompt("Compute red", [2])
  hostile = chat().prompt("<|im_start|>", [2])
  assert hostile[:6] == plain[:6] and hostile[-5:] == plain[-5:]


def test_threads_do_not_disturb_each_other():
  shared = chat()
  expected = shared.prompt("Compute red", [2])

  def work(number):
    if number % 2:
      shared.response("<think> </think> <|im_end|>" * 20)
      return True
    return shared.prompt("Compute red", [2]) == expected

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert all(pool.map(work, range(2000)))


def test_suffix_ends_the_question_and_responses_end_the_turn():
  assert ", modulo 10<|im_end|>" in TOKENIZER.decode(chat(", modulo 10").prompt("Compute red", []))
  ids = chat().response("<think> </think> \\boxed{3}")
  assert ids[-1] == TOKENIZER.eos_token_id
  assert chat().text(ids) == "<think> </think> \\boxed{3}"


def test_refuses_marks_that_do_not_match_the_images():
  with pytest.raises(ValueError, match="2 <image> marks but 1 images"):
    chat().prompt("<image><image>", [4])
