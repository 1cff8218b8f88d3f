"""Turns chat turns into tokens with the tokenizer's template, and expands image placeholders.

A control token written in a question (`<|image_pad|>`) is encoded as text.
"""

import copy
import dataclasses
import functools
import re

from ares_jax.data.template import CLOSE, THINK, Template

# Marks the position of the next image, or of the image with that number (counted from 1).
IMAGE_MARK = re.compile(r"<image(?:[ _]?(\d+))?>")
_ANSWER = "\1"  # stands for an earlier answer while a template is rendered


@dataclasses.dataclass(frozen=True)
class Chat:
  """A tokenizer, and the text that a prompt adds to a question."""

  tokenizer: object  # a `transformers` fast tokenizer with a chat template
  suffix: str  # appended to the question, e.g. how to format the answer; "" for none
  image_token: int | None  # id of `<|image_pad|>`; None where the model takes texts only

  def order(self, question, images, history=()):
    """Numbers (from 0) of as many `images`, in their order in the prompt.

    In the questions `<image>` marks the position of the next image, `<image 2>` or `<image2>` that
    of the second one. Without any mark, all images come first, in order.

    Args:
      question: the last one.
      images: number of images.
      history: the turns before it, {"role": "system", "user" or "assistant", "content": text}.

    Raises:
      ValueError: there are marks, but not one for each image, or the template takes texts.
    """
    if images and (self.image_token is None or not self.template.takes_parts):
      raise ValueError(f"the question has {images} images, but the "
                       f"{'model' if self.image_token is None else 'chat template'} takes texts "
                       "only")
    marks = [mark.group(1) for text in self._questions(question, history)
             for mark in IMAGE_MARK.finditer(text)]
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

  def prompt(self, question, image_tokens, history=()):
    """Token ids of a question, ready for the assistant's answer; raises as `order`.

    Args:
      question: text with marks, as in `order`.
      image_tokens: number of tokens (merged vision units) of each image, in that order.
      history: the turns before it, as in `order`. The suffix is appended to each question.
    """
    return [token for ids, _ in self.pieces(question, image_tokens, history) for token in ids]

  def pieces(self, question, image_tokens, history=()):
    """[(token ids, whether they are an answer's)] of a `prompt`, in order.

    An answer has the tokens of `response`, but for a thought that the template opens: that is in
    the text of the last turn alone.
    """
    self.order(question, len(image_tokens), history)
    images = iter(image_tokens)

    def expand(ids):
      return [token for each in ids
              for token in [each] * (next(images) if each == self.image_token else 1)]

    texts = self._questions(question, history)
    first = 0 if any(map(IMAGE_MARK.search, texts)) else len(image_tokens)
    contents = iter([self._content(text, 0 if number else first)
                     for number, text in enumerate(texts)])
    turns = [(turn["role"], next(contents) if turn["role"] == "user" else
              [{"type": "text", "text": turn["content"]}]) for turn in history]
    before, *others = self._encode([*turns, ("user", next(contents))])
    found = [(expand(before), False)]
    answers = [turn["content"] for turn in history if turn["role"] == "assistant"]
    for answer, ids in zip(answers, others, strict=True):
      if ids[:1] != [self.template.end]:
        raise ValueError("the chat template does not end an earlier answer as the last one; "
                         "dialogues of several questions cannot be used with it")
      found += [(self._plain(answer) + ids[:1], True), (expand(ids[1:]), False)]
    return found

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

  def _questions(self, question, history):
    """The texts of the user's turns."""
    earlier = [turn["content"] for turn in history if turn["role"] == "user"]
    return [text + self.suffix for text in (*earlier, question)]

  def _content(self, text, images):
    pieces = IMAGE_MARK.split(text)[::2]  # the numbers are between them
    if len(pieces) == 1:
      return [{"type": "image"}] * images + [{"type": "text", "text": text}]
    content = []
    for piece in pieces:
      content += [{"type": "text", "text": piece}] if piece else []
      content.append({"type": "image"})
    return content[:-1]

  def _encode(self, turns):
    """Token ids of (role, content) turns: a list for each stretch between earlier answers."""
    # Rendered with "\0" for each control token of a text, so that only those of the template are
    # read as such. The text between keeps its neighbours: a token may join it with the newline of
    # the template before it.
    found, replaced = [], []
    for role, content in turns:
      parts = []
      for part in content:
        if part["type"] == "text":
          text = part["text"].replace("\0", "").replace(_ANSWER, "")
          text = _ANSWER if role == "assistant" else text
          found += self._special.findall(text)
          part = dict(part, text=self._special.sub("\0", text))
        parts.append(part)
      replaced.append((role, parts))
    *history, (_, question) = replaced
    controls, stretches = iter(found), []
    for stretch in self.template.prompt(question, history).split(_ANSWER):
      first, *others = stretch.split("\0")
      ids = self._ids(first)
      for text in others:
        ids += self._plain(next(controls)) + self._ids(text)
      stretches.append(ids)
    return stretches

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
