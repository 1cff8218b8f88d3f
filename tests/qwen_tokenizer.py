"""A byte-level tokenizer in the manner of Qwen2.5's: its control tokens, its turns, 300 merges."""

import functools

import tokenizers
import transformers

CONTROL = (
  "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
  "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# A turn a message, a first system turn where there is none, images between marks.
TEMPLATE = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@functools.cache
def tokenizer():
  """The one that all tests share: do not change it."""
  return fresh()


def fresh():
  """One of its own, to be changed."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  # Numbers digit by digit, a newline with those behind it, a word with the space before it.
  pieces = tokenizers.Regex(r"\s*[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
  model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
    tokenizers.pre_tokenizers.Split(pieces, behavior="isolated"),
    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  model.decoder = tokenizers.decoders.ByteLevel()
  text = [TEMPLATE, "What is shown in the image? How many sides has the triangle?\n\nThink first."]
  model.train_from_iterator(8 * text, tokenizers.trainers.BpeTrainer(
    vocab_size=556, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
  model.add_special_tokens(list(CONTROL))
  model.add_tokens(["<tool_call>"])  # added, but no control token
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
  fast.chat_template = TEMPLATE
  return fast
