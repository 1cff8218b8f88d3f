"""Chat turns to tokens: the tokenizer's own template, image placeholders expanded to image tokens.

Text of a question is data: a control token written in it (`<|image_pad|>`) is encoded as text.
"""

import copy
import dataclasses
import functools

IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class Chat:
  """A tokenizer and the few things that a prompt adds to a question.

  Attributes:
    tokenizer: a `transformers` fast tokenizer with a chat template.
    suffix: text appended to the question, e.g. how to format the answer; "" for none.
    image_token: id of `<|image_pad|>`.
  """

  tokenizer: object
  suffix: str
  image_token: int

  def prompt(self, question, image_tokens):
    """Token ids of one user turn, ready for the assistant's answer.

    Args:
      question: text; `<image>` marks where an image goes. Without any mark, all images come first.
      image_tokens: for each image, how many tokens it takes (merged vision units).

    Returns:
      list of int.

    Raises:
      ValueError: the question has marks, but not one an image.
    """
    content = self._content(question + self.suffix, len(image_tokens))
    ids = self._encode(content)
    expanded, images = [], iter(image_tokens)
    for token in ids:
      expanded += [token] * (next(images) if token == self.image_token else 1)
    return expanded

  def response(self, text):
    """Token ids of a response, the end-of-turn token included."""
    return self._plain(text) + [self.tokenizer.eos_token_id]

  def text(self, tokens):
    """Text of response tokens, special tokens left out."""
    return self.tokenizer.decode(tokens, skip_special_tokens=True)

  def _content(self, text, images):
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
      return [{"type": "image"}] * images + [{"type": "text", "text": text}]
    if len(pieces) - 1 != images:
      raise ValueError(f"the question has {len(pieces) - 1} {IMAGE_MARK} marks but {images} "
                       "images; give one mark an image, or none")
    content = []
    for piece in pieces:
      content += [{"type": "text", "text": piece}] if piece else []
      content.append({"type": "image"})
    return content[:-1]

  def _encode(self, content):
    added = self.tokenizer.added_tokens_decoder.values()
    special = [str(token) for token in added if token.special]
    if not any(token in part.get("text", "") for part in content for token in special):
      return self._ids(self._render(content))
    # Rendered with stand-ins, so that only the template's own control tokens are read as such.
    marks = {f"\x00{index}\x00": part["text"] for index, part in enumerate(content)
             if part["type"] == "text"}
    stand_ins = [dict(part, text=f"\x00{index}\x00") if part["type"] == "text" else part
                 for index, part in enumerate(content)]
    rendered, ids = self._render(stand_ins), []
    for mark, text in marks.items():
      before, rendered = rendered.split(mark)
      ids += self._ids(before) + self._plain(text)
    return ids + self._ids(rendered)

  def _render(self, content):
    return self.tokenizer.apply_chat_template(
      [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)

  def _ids(self, text):
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def _plain(self, text):
    return self._text_only.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def _text_only(self):
    """A second tokenizer that reads control tokens as text: reading threads share both."""
    backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    return backend
