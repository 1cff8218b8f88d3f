"""From a record of a file to a row, by a schema: an entry of benchmarks.json or schemas.json.

A schema is a dict; benchmarks.json and schemas.json say what its keys mean. A row is one of
data/sources.py.
"""

import ast
import base64
import functools
import hashlib
import importlib.resources
import json
import os
import re

import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.chat import IMAGE_MARK
from ares_jax.grading.response import extract_boxed

# Fields that a row has as they stand in the record.
_AS_THEY_ARE = ("response", "responses", "pass_rate")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TEXT = (str, bytes)


def read_row(schema, record, *, place, name, folder):
  """The row of a record.

  Args:
    schema: which columns hold what.
    record: dict, as the file has it.
    place: where it stands, "train.jsonl:17"; its id where it has none.
    name: of the data, for messages and for rows that name no source.
    folder: where the images it names are; a path or gs:// address.

  Raises:
    BadRow: a field is missing or cannot be used.
  """
  try:
    return _read_row(schema, record, place, name, folder)
  except BadRow:
    raise
  # A record can hold anything anywhere; whatever that breaks is the record's fault.
  except Exception as error:
    raise BadRow(place, "record", f"cannot be read as {name!r}: {type(error).__name__}: "
                 f"{error}") from error


def _read_row(schema, record, place, name, folder):
  columns = schema["columns"]

  def first(field, default=None):
    for column in columns.get(field, ()):
      value = _at(record, column)
      if value is not None:
        return value
    return default

  asked, response = first("question"), None
  if "asks" in schema:
    asked = _ask(schema, first, place)
  elif "question" not in columns:
    asked = schema["prompt"]
  if isinstance(asked, list):
    asked, response = _dialogue(asked, place)
  if not isinstance(asked, _TEXT):
    raise BadRow(place, "question", f"has none of the columns {columns['question']} that {name!r} "
                 f"asks from; it has {sorted(record)}")
  asked = _text(asked)
  if not asked.strip():
    raise BadRow(place, "question", "the question is empty")
  options = _options(schema, record, first)
  accepted = _accepted(schema, first, options, response, place)
  letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
  shown = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, options, strict=False))
  template = schema["prompt"] if options or "prompt_open" not in schema else schema["prompt_open"]
  # Not str.format: questions are full of braces.
  question = template
  for field, text in (("{options}", shown), ("{choices}", str(first("choices", ""))),
                      ("{question}", asked)):
    question = question.replace(field, text, 1)
  question, images = question.strip(), _images(columns, record, folder, place)
  if schema.get("marks") != "own":  # One's own marks mean what they mean in training.
    question, images = _place_images(question, images)
  row = {"id": _text(first("id", place)), "source": _text(first("source", name)),
         "question": question, "answer": accepted, "images": images,
         **{field: None if first(field) is None else _text(first(field))
            for field in ("level", "group", "step")},
         "tolerance": _tolerance(first, place)}
  found = {field: first(field) for field in _AS_THEY_ARE} | ({"response": response} if response
                                                             else {})
  return row | {field: _plain(value) for field, value in found.items() if value is not None}


def _ask(schema, first, place):
  """What the record's number asks, with its own question and the part of the picture it names."""
  number, row, column, name = (first(field) for field in ("ask", "row", "column", "place"))
  try:
    asked = schema["asks"][str(int(number))]
  except (KeyError, TypeError, ValueError) as error:
    raise BadRow(place, "question", f"asks number {number!r}; there are "
                 f"{', '.join(schema['asks'])}") from error
  if "{about}" in asked:
    kind = "place" if name else "grid" if row else "whole"
    about = schema["about"][kind]
    for field, value in (("{place}", name), ("{row}", row), ("{column}", column)):
      about = about.replace(field, str(value if kind == "place" else int(value or 0)))
    asked = asked.replace("{about}", about)
  if "{digits}" in asked:
    _, point, decimals = str(first("answer")).partition(".")
    digits = schema["digits"]["decimal" if point else "whole"]
    asked = asked.replace("{digits}", digits.replace("{count}", str(len(decimals))))
  # Last: a question may hold any of the marks.
  return asked.replace("{question}", str(first("question")))


def _at(record, column):
  """The value of a column; "a.b" is the field b of the column a."""
  for part in column.split("."):
    if not isinstance(record, dict):
      return None
    record = record.get(part)
  return record


def _text(value):
  text = value.decode() if isinstance(value, bytes) else str(value)
  text.encode()  # half a surrogate pair, which JSON may hold, is no text
  return text


def _plain(value):
  """Texts and numbers as Python has them: TFDS gives bytes and arrays."""
  if isinstance(value, list | tuple | np.ndarray):
    return [_plain(item) for item in value]
  if isinstance(value, _TEXT):
    return _text(value)
  return value.item() if isinstance(value, np.generic) else value


def _dialogue(messages, place):
  """(question, response or None) of messages, in OpenAI's words or ShareGPT's."""
  turns = {"user": [], "assistant": []}
  for message in messages:
    role = _ROLES.get(message.get("role") or message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
      content = "".join("<image>" if part.get("type") == "image" else part.get("text") or ""
                        for part in content)
    if role is not None:
      turns[role].append(content)
  if len(turns["user"]) != 1 or len(turns["assistant"]) > 1:
    raise BadRow(place, "question", f"its dialogue has {len(turns['user'])} questions and "
                 f"{len(turns['assistant'])} answers; one question and at most one answer are read")
  return turns["user"][0], (turns["assistant"] or [None])[0]


def _options(schema, record, first):
  """Texts of the options in the order they are shown; [] where the row is open."""
  if schema.get("answer") == "gpqa":
    texts = [record[column].strip()
             for column in schema["columns"]["right"] + schema["columns"]["wrong"]]
    # By the question, so that the same order comes again wherever the row stands.
    seed = hashlib.sha256(first("question").encode()).digest()[:8]
    order = np.random.default_rng(int.from_bytes(seed)).permutation(len(texts))
    return [texts[index] for index in order]
  options = first("options", [])
  if isinstance(options, str):
    options = ast.literal_eval(options) if options.strip() else []  # literals only, nothing runs
  return [_text(option).strip() for option in options]


def _accepted(schema, first, options, response, place):
  kind = schema.get("answer")
  answer = first("right") if kind == "gpqa" else first("answer", response)
  if kind == "gsm8k" and answer:
    answer = _text(answer).rpartition("####")[2]
  if kind == "boxed" and answer:
    boxed = extract_boxed(_text(answer))
    if boxed is None:
      raise BadRow(place, "answer", f"the answer {_text(answer)[-80:]!r} has no \\boxed{{...}} "
                   "whose braces match; mend it")
    answer = boxed
  several = isinstance(answer, list | np.ndarray)
  answers = [_text(text).strip() for text in (answer if several else [answer])]
  if answer is None or not all(answers) or not answers:
    raise BadRow(place, "answer", f"the answer is {answer!r}; a truth is needed")
  accepted = []
  for text in answers:
    letter = text.strip("().").upper()
    if re.fullmatch("[A-Z]", letter) and ord(letter) - 65 < len(options):
      accepted += _letter_and_text(options, ord(letter) - 65)
    elif text in options:
      accepted += _letter_and_text(options, options.index(text))
    else:
      accepted.append(text)
  return accepted


def _letter_and_text(options, index):
  """An option's letter and text; the letter alone where the text could be taken for another one."""
  letter, text = chr(65 + index), options[index]
  # A text that is a letter (A. C) or another's text too would make a wrong letter right.
  if not text or re.fullmatch("[A-Za-z]", text) or options.count(text) > 1:
    return [letter]
  return [letter, text]


def _images(columns, record, folder, place):
  found = []
  for column in columns.get("images", ()):
    value = _at(record, column)
    if value is None or (found and not column[-1].isdigit()):
      continue  # the next name of the same image, where the first was there
    # TFDS has one image as uint8 [H, W, 3], several as an array of bytes.
    several = isinstance(value, list) or isinstance(value, np.ndarray) and value.dtype == object
    found += list(value) if several else [value]
  return [_image(value, folder, place) for value in found if value is not None]


def _image(value, folder, place):
  """Pixels, encoded bytes, or the path of a file inside the folder."""
  if isinstance(value, dict):
    value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("base64,"):
      return base64.b64decode(value[7:])
  if isinstance(value, bytes | np.ndarray):
    return value
  if not isinstance(value, str):
    raise BadRow(place, "image_missing", f"an image is {value!r}; bytes or a file name are needed")
  # By name, not by file: the hub's own folders are made of links to elsewhere.
  scheme, mark, folder = str(folder).rpartition("://")
  path = os.path.normpath(os.path.join(folder, value))
  if os.path.relpath(path, folder or ".").split(os.sep)[0] == os.pardir:
    raise BadRow(place, "image", f"image {value!r} lies outside the folder {folder}")
  return f"{scheme}{mark}{path}"


def _place_images(question, images):
  """A published question with one `<image>` an image, in their order.

  It may name some of its images, and one more than once: the others are left out. Where its marks
  and its images do not fit, the images come first.
  """
  marks = [mark or "" for mark in IMAGE_MARK.findall(question)]
  numbers = [int(number) for number in marks if number]
  if numbers and len(numbers) == len(marks) and 1 <= min(numbers) <= max(numbers) <= len(images):
    return IMAGE_MARK.sub("<image>", question), [images[number - 1] for number in numbers]
  if not numbers and len(marks) == len(images):
    return IMAGE_MARK.sub("<image>", question), images
  return IMAGE_MARK.sub("", question), images


def _tolerance(first, place):
  digits, tolerance = first("digits"), first("tolerance", 0)
  try:
    if digits is not None:  # decimals: 0.57 stands for 0.565 to 0.575
      return 0.5 * 10.0 ** -int(float(digits))
    return float(tolerance or 0)
  except (TypeError, ValueError) as error:
    raise BadRow(place, "answer", f"the tolerance {tolerance!r} (decimals {digits!r}) is no "
                 "number") from error


@functools.cache
def read_schemas(file="data/files/schemas.json"):
  """{name: schema} of a JSON file of the package, which explains its own keys."""
  text = (importlib.resources.files("ares_jax") / file).read_text(encoding="utf-8")
  return {name: schema for name, schema in json.loads(text).items() if name != "about"}
