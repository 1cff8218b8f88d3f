"""Turns chat turns into tokens with the tokenizer's template, and expands image placeholders.

A control token written in a question (`<|image_pad|>`) is encoded as text.
"""

import copy
import dataclasses
import functools
import re

from ares_jax.data.template import CLOSE, THINK, Template

# Marks the position of the next image, or of the image with that number (counted from 1).
IMAGE_MARK = re.compile(r"<image(?: ?(\d+))?>")


@dataclasses.dataclass(frozen=True)
class Chat:
  """A tokenizer, and the text that a prompt adds to a question."""

  tokenizer: object  # a `transformers` fast tokenizer with a chat template
  suffix: str  # appended to the question, e.g. how to format the answer; "" for none
  image_token: int  # id of `<|image_pad|>`

  def order(self, question, images):
    """Numbers (from 0) of as many `images`, in their order in the prompt.

    In the question `<image>` marks the position of the next image, `<image 2>` or `<image2>` that
    of the second one. Without any mark, all images come first, in order.

    Raises:
      ValueError: the question has marks, but not one for each image, or the template takes texts.
    """
    if images and not self.template.takes_parts:
      raise ValueError(f"the question has {images} images, but the chat template takes texts only")
    marks = [mark.group(1) for mark in IMAGE_MARK.finditer(question + self.suffix)]
    if not marks:
      return list(range(images))
    if len(marks) != images:
      raise ValueError(f"the question has {len(marks)} image marks but {images} images; give one "
                       "mark (<image> or <image 1>) for each image, or none")
    if all(number is None for number in marks):
      return list(range(images))
    if sorted(map(str, marks)) != sorted(str(1 + index) for index in range(images)):
      raise ValueError(f"the question's image marks have the numbers {', '.join(map(str, marks))}; "
                       f"each of 1..{images} must occur once, or none")
    return [int(number) - 1 for number in marks]

  def prompt(self, question, image_tokens):
    """Token ids of one user turn, ready for the assistant's answer; raises as `order`.

    Args:
      question: text with marks, as in `order`.
      image_tokens: number of tokens (merged vision units) of each image, in that order.
    """
    self.order(question, len(image_tokens))
    images = iter(image_tokens)
    expanded = []
    for token in self._encode(self._content(question + self.suffix, len(image_tokens))):
      expanded += [token] * (next(images) if token == self.image_token else 1)
    return expanded

  def response(self, text):
    """Token ids of a response, the end-of-turn token included.

    Where the template opens the thought, `<think>` is in the prompt already; a response without a
    thought then closes it first.
    """
    opening = self.template.opening
    if opening and (begun := text.lstrip()).startswith(THINK):
      text = begun.removeprefix(opening if begun.startswith(opening) else THINK)
    elif opening:
      text = f"{CLOSE}\n\n{text}"
    return self._plain(text) + [self.template.end]

  def text(self, tokens):
    """Text of response tokens, special tokens left out, from a `<think>` of the template on."""
    return self.template.opening + self.tokenizer.decode(tokens, skip_special_tokens=True)

  def _content(self, text, images):
    pieces = IMAGE_MARK.split(text)[::2]  # the numbers are between them
    if len(pieces) == 1:
      return [{"type": "image"}] * images + [{"type": "text", "text": text}]
    content = []
    for piece in pieces:
      content += [{"type": "text", "text": piece}] if piece else []
      content.append({"type": "image"})
    return content[:-1]

  def _encode(self, content):
    if not any(self._special.search(part.get("text", "")) for part in content):
      return self._ids(self.template.prompt(content))
    # Rendered with "\0" for each control token of the question, so that only those of the template
    # are read as such. The text between keeps its neighbours: a token may join it with the newline
    # of the template before it.
    content = [dict(part, text=part["text"].replace("\0", "")) if part["type"] == "text" else part
               for part in content]
    found = [token for part in content for token in self._special.findall(part.get("text", ""))]
    replaced = [dict(part, text=self._special.sub("\0", part["text"])) if part["type"] == "text"
                 else part for part in content]
    first, *others = self.template.prompt(replaced).split("\0")
    ids = self._ids(first)
    for token, text in zip(found, others, strict=True):
      ids += self._plain(token) + self._ids(text)
    return ids

  def _ids(self, text):
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def _plain(self, text):
    return self._text_only.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def template(self):
    """The Template of the tokenizer."""
    return Template(self.tokenizer)

  @functools.cached_property
  def _special(self):
    """A pattern of control tokens, the longest first where one begins with another."""
    added = self.tokenizer.added_tokens_decoder.values()
    special = sorted((str(token) for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special)) or "(?!)")

  @functools.cached_property
  def _text_only(self):
    """A tokenizer that reads control tokens as text. A copy: reading threads share both."""
    backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    return backend
