"""Turns a record of a file into a row, by a schema.

A schema is a dict, an entry of data/files/schemas.json (training data) or of
evaluation/benchmarks.json; their `about` explains the keys. data/sources.py describes a row.
"""

import ast
import base64
import dataclasses
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

_COPIED_FIELDS = ("response", "responses", "pass_rate")
_TEXT_FIELDS = ("level", "group", "step")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# The values of several columns of a field are a list, or a text with such joints.
_COLLECTED = ("images", "options", "answer", "responses")
_JOINTS = {"question": "\n", "response": "\n"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_row(schema, values, *, location, name, folder):
  """The row of a record; BadRow where a field is missing or cannot be used.

  Args:
    schema: which columns hold what.
    values: dict, the record as the file has it.
    location: of the record, "train.jsonl:17"; its id where it has none.
    name: of the data, for messages and for rows that name no source.
    folder: path or gs:// address of the images that the record names.
  """
  try:
    return _read_row(_Record(schema, values, location, name, folder))
  except BadRow:
    raise
  # A record can hold anything anywhere, so any exception means that it cannot be used.
  except Exception as error:
    raise BadRow(location, "record", f"cannot be read as {name!r}: {type(error).__name__}: "
                 f"{error}") from error


@dataclasses.dataclass(frozen=True)
class _Record:
  """A record and the arguments of `read_row`."""

  schema: dict
  values: dict
  location: str
  name: str
  folder: object

  def first(self, field, default=None):
    """The value of the first column for a field that the record has."""
    for column in self.schema["columns"].get(field, ()):
      value = self.value(field, column)
      if value is not None:
        return value
    return default

  def value(self, field, column):
    """The value of a column, or the values of a list of columns as one."""
    if isinstance(column, str):
      return _at(self.values, column)
    found = [value for name in column if (value := _at(self.values, name)) is not None]
    if field in _COLLECTED:
      return [item for value in found for item in (value if _is_list(value) else [value])] or None
    return _JOINTS.get(field, "/").join(_text(value).strip() for value in found) or None

  def bad(self, code, reason):
    return BadRow(self.location, code, reason)


def _read_row(record):
  question, response = _question(record)
  options = _options(record)
  answer = _accepted(record, options, response)
  text = _filled_template(record, question, options).strip()
  images = _images(record)
  if record.schema.get("marks") != "own":  # a user's own marks mean what they mean in training
    text, images = _match_marks(text, images)
  texts = {field: record.first(field) for field in _TEXT_FIELDS}
  row = {"id": _text(record.first("id", record.location)),
         "source": _text(record.first("source", record.name)),
         "question": text, "answer": answer, "images": images,
         **{field: None if value is None else _text(value) for field, value in texts.items()},
         "tolerance": _tolerance(record)}
  copied = {field: record.first(field) for field in _COPIED_FIELDS}
  if response:
    copied["response"] = response
  return row | {field: _plain(value) for field, value in copied.items() if value is not None}


def _question(record):
  """(question without options, response or None)."""
  schema, response = record.schema, None
  if "asks" in schema:
    question = _numbered_question(record)
  elif "question" in schema["columns"]:
    question = record.first("question")
  else:
    question = schema["prompt"]
  if isinstance(question, list):
    question, response = _dialogue(record, question)
  if not isinstance(question, str | bytes):
    raise record.bad("question", f"has none of the columns {schema['columns']['question']} for "
                     f"the question of {record.name!r}; it has {sorted(record.values)}")
  question = _text(question)
  if not question.strip():
    raise record.bad("question", "the question is empty")
  return question, response


def _numbered_question(record):
  """The question that the record's number stands for, about the part of the picture it names."""
  schema, number = record.schema, record.first("ask")
  try:
    question = schema["asks"][str(int(number))]
  except (KeyError, TypeError, ValueError) as error:
    raise record.bad("question", f"asks number {number!r}; there are "
                     f"{', '.join(schema['asks'])}") from error
  if "{about}" in question:
    place, row, column = (record.first(field) for field in ("place", "row", "column"))
    if place and isinstance(place, str | bytes):  # a list of two numbers is a row and a column
      about = schema["about"]["place"].replace("{place}", _text(place))
    else:
      about = schema["about"]["grid" if row else "whole"]
      about = about.replace("{row}", str(int(row or 0)))
      about = about.replace("{column}", str(int(column or 0)))
    question = question.replace("{about}", about)
  if "{digits}" in question:
    _, point, decimals = str(record.first("answer")).partition(".")
    digits = schema["digits"]["decimal" if point else "whole"]
    question = question.replace("{digits}", digits.replace("{count}", str(len(decimals))))
  # Last: the record's own question may hold any of the marks.
  return question.replace("{question}", str(record.first("question")))


def _filled_template(record, question, options):
  """The schema's prompt with the question and its options."""
  schema = record.schema
  template = schema["prompt"] if options else schema.get("prompt_open", schema["prompt"])
  shown = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))
  # Not str.format: questions are full of braces.
  template = template.replace("{options}", shown, 1)
  template = template.replace("{choices}", str(record.first("choices", "")), 1)
  return template.replace("{question}", question, 1)


def _at(record, column):
  """The value of a column; "a.b" is the field b of the column a, "a.0" the first item of a list."""
  if column in record:
    return record[column]
  for part in column.split("."):
    if _is_list(record) and part.isdecimal():
      record = record[int(part)] if int(part) < len(record) else None
    else:
      record = record.get(part) if isinstance(record, dict) else None
  return record


def has_column(record, column):
  """Whether a record has a column, be it empty; of "a.b" it is asked for a."""
  return column in record or column.partition(".")[0] in record


def _is_list(value):
  return isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0


def _text(value):
  text = value.decode() if isinstance(value, bytes) else str(value)
  text.encode()  # refuses half a surrogate pair, which JSON may hold
  return text


def _plain(value):
  """The value with Python's strings, numbers and lists: TFDS gives bytes and arrays."""
  if isinstance(value, list | tuple | np.ndarray):
    return [_plain(item) for item in value]
  if isinstance(value, str | bytes):
    return _text(value)
  return value.item() if isinstance(value, np.generic) else value


def _dialogue(record, messages):
  """(question, response or None) of messages in OpenAI's or ShareGPT's format."""
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
    raise record.bad("question", f"its dialogue has {len(turns['user'])} questions and "
                     f"{len(turns['assistant'])} answers; one question and at most one answer are "
                     "read")
  return turns["user"][0], (turns["assistant"] or [None])[0]


def _options(record):
  """Texts of the options in the order they are shown; [] where the question has none."""
  if record.schema.get("answer") == "gpqa":
    columns = record.schema["columns"]
    texts = [record.values[column].strip() for column in columns["right"] + columns["wrong"]]
    # The question is the seed, so that the order does not depend on the location of the row.
    seed = hashlib.sha256(record.first("question").encode()).digest()[:8]
    order = np.random.default_rng(int.from_bytes(seed)).permutation(len(texts))
    return [texts[index] for index in order]
  options = record.first("options", [])
  if isinstance(options, str):
    options = ast.literal_eval(options) if options.strip() else []  # literals only, nothing runs
  return [_text(option).strip() for option in options]


def _accepted(record, options, response):
  """The list of accepted truths."""
  kind = record.schema.get("answer")
  answer = record.first("right") if kind == "gpqa" else record.first("answer", response)
  if kind == "gsm8k" and answer:
    answer = _text(answer).rpartition("####")[2]
  if kind == "boxed" and answer:
    boxed = extract_boxed(_text(answer))
    if boxed is None:
      raise record.bad("answer", f"the answer {_text(answer)[-80:]!r} has no \\boxed{{...}} with "
                       "matching braces; correct it")
    answer = boxed
  several = isinstance(answer, list | np.ndarray)
  answers = [_text(text).strip() for text in (answer if several else [answer])]
  if answer is None or not all(answers) or not answers:
    raise record.bad("answer", f"the answer is {answer!r}; a truth is needed")
  accepted = []
  for text in answers:
    letter = text.strip("().").upper()
    is_letter = re.fullmatch("[A-Z]", letter) and _LETTERS.index(letter) < len(options)
    if is_letter and not (kind == "text" and text in options):
      accepted += _letter_and_text(options, _LETTERS.index(letter))
    elif text in options:
      for index in (index for index, option in enumerate(options) if option == text):
        accepted += _letter_and_text(options, index)
    else:
      accepted.append(text)
  return accepted


def _letter_and_text(options, index):
  """An option's letter and text; the letter alone where the text could mean another option."""
  letter, text = chr(ord("A") + index), options[index]
  # A text that is a letter (A. C), or the text of two options, would make a wrong letter right.
  if not text or re.fullmatch(r"[(\[]?[A-Za-z][)\].:]?", text) or options.count(text) > 1:
    return [letter]
  return [letter, text]


def _images(record):
  found = []
  for column in record.schema["columns"].get("images", ()):
    value = record.value("images", column)
    if _is_blank(value) or (found and not column[-1].isdigit()):
      continue  # columns without a number are other names of the first image
    # TFDS gives one image as uint8 [H, W, 3], several as an array of bytes.
    several = isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object)
    found += list(value) if several else [value]
  return [_image(record, value) for value in found if not _is_blank(value)]


def _is_blank(value):
  """Whether there is no image: MathVerse writes "" for none."""
  return value is None or (isinstance(value, str) and not value.strip())


def _image(record, value):
  """Pixels, encoded bytes, or the path of a file inside the folder."""
  if isinstance(value, dict):
    value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("base64,"):
      return base64.b64decode(value[7:])
  if isinstance(value, bytes | np.ndarray):
    return value
  if not isinstance(value, str):
    raise record.bad("image_missing", f"an image is {value!r}; bytes or a file name are needed")
  # Compares names, not resolved links: folders of the hub are made of links to other folders.
  scheme, mark, folder = str(record.folder).rpartition("://")
  path = os.path.normpath(os.path.join(folder, value))
  if os.path.relpath(path, folder or ".").split(os.sep)[0] == os.pardir:
    raise record.bad("image", f"image {value!r} is outside the folder {folder}")
  return f"{scheme}{mark}{path}"


def _match_marks(question, images):
  """(question, images) with one `<image>` in the question for each image, in the same order.

  A published question may name only some of its images, or one image twice: the others are left
  out. Where marks and images do not match, the marks are removed, so that the images come first.
  """
  marks = [mark or "" for mark in IMAGE_MARK.findall(question)]
  numbers = [int(number) for number in marks if number]
  if numbers and len(numbers) == len(marks) and 1 <= min(numbers) <= max(numbers) <= len(images):
    return IMAGE_MARK.sub("<image>", question), [images[number - 1] for number in numbers]
  if not numbers and len(marks) == len(images):
    return IMAGE_MARK.sub("<image>", question), images
  return IMAGE_MARK.sub("", question), images


def _tolerance(record):
  digits, tolerance = record.first("digits"), record.first("tolerance", 0)
  try:
    if digits is not None:  # number of decimals: 0.57 means 0.565 to 0.575
      return 0.5 * 10.0 ** -int(float(digits))
    parts = [float(part or 0) for part in str(tolerance or 0).split(",")]
    return parts if len(parts) > 1 else parts[0]
  except (TypeError, ValueError) as error:
    raise record.bad("answer", f"the tolerance {tolerance!r} (decimals {digits!r}) is not a "
                     "number") from error


def with_columns(schema, columns):
  """The schema with other columns: {field: names}; of several names the values are joined."""
  return schema | {"columns": schema["columns"] | {
    field: [names[0] if len(names) == 1 else list(names)] for field, names in columns.items()}}


@functools.cache
def read_schemas(file="data/files/schemas.json"):
  """{name: schema} of a JSON file of the package, which explains its own keys."""
  text = (importlib.resources.files("ares_jax") / file).read_text(encoding="utf-8")
  return {name: schema for name, schema in json.loads(text).items() if name != "about"}
