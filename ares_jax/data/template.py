"""How a tokenizer's chat template writes a conversation: its turns, and where an answer ends."""

import dataclasses
import datetime
import functools
import re

THINK = "<think>"  # opens the reasoning of an answer
CLOSE = "</think>"
# For templates that write the day: prompts of a run are the same whenever it resumes. The day is
# that which Llama's templates write where they are told none; transformers takes no function.
_DAY = datetime.datetime(2024, 7, 26)
_TELLS_DAY = "{%- macro strftime_now(format) -%}{{ format" + "".join(
  f" | replace('%{code}', '{_DAY:%{code}}')" for code in "aAbBdHIjmMpSyY") + " }}{%- endmacro -%}"
# Stand for texts of a conversation. No template holds these words.
_QUESTION, _ANSWER = "qWx7", "aWx7"


@dataclasses.dataclass(frozen=True)
class Template:
  """The chat template of a tokenizer."""

  tokenizer: object  # a `transformers` fast tokenizer

  def prompt(self, content, history=()):
    """Text of a user's turn, after the turns of `history`, up to where the answer begins.

    `content` is a list of parts {"type": "text", "text": ...} or {"type": "image"}; a template that
    takes a text gets those of the parts. `history` has (role, content) of each turn.

    Raises:
      ValueError: the template does not take these turns, for example no system turn.
    """
    messages = [{"role": role, "content": self._content(parts)}
                for role, parts in (*history, ("user", content))]
    if not history:
      return self._render(messages, prompt=True)
    try:
      return self._render(messages, prompt=True)
    except Exception as error:  # of any kind: a template is a program
      raise ValueError(f"the chat template does not take the turns "
                       f"{', '.join(message['role'] for message in messages)}: {error}") from error

  @functools.cached_property
  def takes_parts(self):
    """Whether the template reads lists of parts; the others, of text models, read texts.

    Raises:
      ValueError: there is no template, or it prints neither.
    """
    content, failure = self._first_written(_QUESTION, [], "user")
    if content is None:
      raise ValueError(f"the chat template does not write a question: {failure}")
    return isinstance(content, list)

  @functools.cached_property
  def opening(self):
    """The end of every prompt from `<think>` on, where the template opens the thought; else ""."""
    text = self.prompt(_parts(_QUESTION)).rpartition(_QUESTION)[2]
    opening = text[text.rfind(THINK):] if THINK in text else ""
    return "" if CLOSE in opening else opening

  @functools.cached_property
  def end(self):
    """Id of the token that ends an answer: the template's, or else the tokenizer's end of text.

    Raises:
      ValueError: there is neither, or the template ends answers with a text that is no token.
    """
    question = {"role": "user", "content": self._content(_parts(_QUESTION))}
    content, text = self._first_written(_ANSWER, [question], "assistant")
    rest = "" if content is None else text.rpartition(_ANSWER)[2]
    known = self.tokenizer.added_tokens_decoder
    for token in self.tokenizer(rest, add_special_tokens=False)["input_ids"]:
      if token == self.tokenizer.eos_token_id or token in known and known[token].special:
        return token
    if rest.strip():
      raise ValueError(f"the chat template ends an answer with {rest!r}, which holds no control "
                       "token of the tokenizer; take both from one model")
    if self.tokenizer.eos_token_id is None:
      raise ValueError("neither the chat template nor eos_token of the tokenizer ends an answer; "
                       "set eos_token in tokenizer_config.json")
    return self.tokenizer.eos_token_id

  def _first_written(self, word, before, role):
    """(content, text) of the first form of `word` that the template writes, or (None, a reason)."""
    for content in (_parts(word), word):
      try:
        text = self._render([*before, {"role": role, "content": content}], prompt=role == "user")
      except Exception as error:  # of any kind: a template is a program
        reason = f"{type(error).__name__}: {error}"
      else:
        # A template that takes any content for a text prints the part's key before its text.
        if word in text and not re.search(rf"text\W+{word}", text):
          return content, text
        reason = f"it prints {text[:200]!r}"
    return None, reason

  def _content(self, parts):
    return parts if self.takes_parts else "".join(part["text"] for part in parts)

  def _render(self, messages, *, prompt):
    template = self.tokenizer.get_chat_template()
    if "strftime_now" in template:
      template = _TELLS_DAY + template
    return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                              add_generation_prompt=prompt)


def _parts(text):
  return [{"type": "text", "text": text}]
