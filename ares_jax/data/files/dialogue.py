"""Reads a dialogue: a list of messages as OpenAI, ShareGPT, LLaMA-Factory and Qwen write them."""

import dataclasses

from ares_jax.data.files.record import is_empty, is_list, to_text

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
          "gpt": "assistant", "model": "assistant"}
_MEDIA = ("image", "image_url", "input_image")  # kinds of parts, and keys that hold their image
_TEXTS = ("text", "input_text", "output_text")
_UNSUPPORTED = ("video", "video_url", "input_video", "audio", "audio_url", "input_audio")
_TOOLS = ("tool_calls", "function_call")


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A question, the turns before it, and the answer to it."""

  question: str  # `<image>` where an image part stood
  response: str | None
  history: list  # of {"role": "system" | "user" | "assistant", "content": text}
  images: list  # those that parts of messages hold


def read_dialogue(record, messages, system=None):
  """The Dialogue of a list of messages; BadRow where a turn or a part of one cannot be read.

  `system` is the system turn, where a column of its own holds it.
  """
  images = []
  turns = []
  for message in messages:
    role, content = _role(record, message), _content(record, message, found := [])
    if found and role != "user":
      raise record.bad("marks", f"a turn of the role {role!r} holds an image; only questions can")
    turns.append((role, content))
    images += found
  if system:
    turns.insert(0, ("system", system))
  roles = [role for role, _ in turns]
  dialogue = roles[1:] if roles[:1] == ["system"] else roles
  expected = ["user", "assistant"] * len(dialogue)
  if not dialogue or dialogue != expected[: len(dialogue)]:
    raise record.bad("question", f"its turns are {', '.join(roles) or 'none'}; a system turn or "
                     "none, then questions and answers by turns are needed")
  response = turns.pop()[1] if roles[-1] == "assistant" else None
  *before, (_, question) = turns
  history = [{"role": role, "content": text} for role, text in before if text or role != "system"]
  if not all(turn["content"].strip() for turn in history):
    raise record.bad("question", "a turn before the last question is empty")
  return Dialogue(question, response, history, images)


def _role(record, message):
  if not isinstance(message, dict):
    raise record.bad("question", f"a message is {message!r} ({type(message).__name__}); an object "
                     "with a role and a content is needed")
  role = message.get("role") or message.get("from")
  if not isinstance(role, str) or role not in _ROLES:
    raise record.bad("question", f"a turn of the role {role!r} is not read; the roles are "
                     f"{', '.join(_ROLES)}")
  read = ("role" if message.get("role") else "from", "content" if "content" in message else "value")
  for key, value in message.items():
    if key in _TOOLS and not is_empty(value):
      raise record.bad("question", f"a turn has {key!r}; calls of tools are not read")
    if key not in (*read, *_TOOLS) and not is_empty(value):
      record.left_out.append(f"{key!r} of messages")
  return _ROLES[role]


def _content(record, message, images):
  content = message.get("content", message.get("value"))
  if isinstance(content, dict):
    content = [content]
  if not is_list(content):
    if not isinstance(content, str | bytes):
      raise record.bad("question", f"the content of a turn is {content!r}; a text or a list of "
                       "parts is needed")
    return to_text(content)
  return "".join(_part(record, part, images) for part in content)


def _part(record, part, images):
  """The text of a part of a message; an image it holds is added to `images`."""
  if isinstance(part, str):
    return to_text(part)
  part = {key: value for key, value in part.items() if value is not None}
  kind = part.pop("type", None) or next(iter(part), None)
  if kind in _UNSUPPORTED:
    raise record.bad("video", f"a message has a part of the type {kind!r}; video and sound are not "
                     "supported")
  names = _TEXTS if kind in _TEXTS else _MEDIA if kind in _MEDIA else None
  if names is None:
    raise record.bad("question", f"a message has a part of the type {kind!r}; text and image are "
                     "read")
  found = [part.pop(name) for name in (*names, "value", "content", "url", "path", "bytes")
           if name in part]
  record.left_out.extend(f"{key!r} of parts of messages" for key in part)
  if names is _TEXTS:
    if len(found) != 1 or not isinstance(found[0], str | bytes):
      raise record.bad("question", f"a part of a message holds {found!r}; one text is needed")
    return to_text(found[0])
  images += found
  return "<image>"
