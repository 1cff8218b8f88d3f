"""Turns a record of a file into a row, by a schema.

A schema is a dict, an entry of data/files/schemas.json (training data) or of
evaluation/benchmarks.json; their `about` explains the keys. data/sources.py describes a row.
"""

import functools
import importlib.resources
import json
import re

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.dialogue import read_dialogue
from ares_jax.data.files.formats import KEY
from ares_jax.data.files.pictures import check_marks, match_marks, read_images
from ares_jax.data.files.record import Record, is_list, to_plain, to_text
from ares_jax.data.files.truths import (
  LETTERS,
  accepted_truths,
  list_in,
  read_options,
  read_tolerance,
)

_COPIED_FIELDS = ("responses", "pass_rate")
_LABELS = ("level", "step")
_MESSAGES = re.compile(r"""\s*\[\{['"](?:role|from|content|value)['"]:""")
_LONGEST_GROUP = 1000  # letters; groups that differ only beyond it would be one


def read_row(schema, values, *, location, name, folder, truth=True):
  """The row of a record; BadRow where a field is missing or cannot be used.

  Args:
    schema: which columns hold what.
    values: dict, the record as the file has it.
    location: of the record, "train.jsonl:17"; its id where it has none.
    name: of the data, for messages and for rows that name no source.
    folder: path or gs:// address of the images that the record names.
    truth: whether a row without a truth is bad; else its "answer" is [].
  """
  try:
    return _read_row(Record(schema, values, location, name, folder), truth)
  except BadRow:
    raise
  # A record can hold anything anywhere, so any exception means that it cannot be used.
  except Exception as error:
    raise BadRow(location, "record", f"cannot be read as {name!r}: {type(error).__name__}: "
                 f"{error}") from error


def _read_row(record, truth):
  question, response, history, images = _question(record)
  options = read_options(record)
  text = _filled_template(record, question, options).strip()
  images = read_images(record, images)
  response = record.scalar("response", response) if response else None
  check_marks(record, text, history, response, images)
  if record.schema.get("marks") != "own":  # a user's own marks mean what they mean in training
    text, images = match_marks(record, text, images)
  try:
    answer = accepted_truths(record, options, response)
  except BadRow as error:
    if truth or error.code != "answer":
      raise
    answer = []
  shown = record.first("shown_options")
  options = options or [record.scalar("option", text) for text in ([] if shown is None else shown)]
  row = {"id": record.label("id", record.values.get(KEY, record.location)),
         "source": record.label("source", record.name),
         "question": text, "answer": answer, "options": options, "images": images,
         **{field: record.label(field) for field in _LABELS},
         "group": record.label("group", limit=_LONGEST_GROUP),
         "tolerance": read_tolerance(record)}
  if history:
    row["history"] = history
  if response:
    row["response"] = response
  copied = {field: to_plain(record.first(field)) for field in _COPIED_FIELDS}
  return row | {field: value for field, value in copied.items() if value is not None} | {
    "left_out": record.left_out}


def _question(record):
  """(question without options, response or None, turns before the question, images in them)."""
  schema, response, history, images = record.schema, record.first("response"), [], []
  system = record.first("system")
  if "asks" in schema:
    question = _numbered_question(record)
  elif "question" in schema["columns"]:
    question = record.first("question")
  else:
    question = schema["prompt"]
  question = to_text(question) if isinstance(question, bytes) else question  # as TFDS gives it
  if isinstance(question, str) and question.lstrip().startswith("[{"):
    question = _messages_in(record, question)
  if is_list(question):
    dialogue = read_dialogue(record, question, system)
    question, history, images = dialogue.question, dialogue.history, dialogue.images
    response = dialogue.response or response
  elif system:
    history = [{"role": "system", "content": record.scalar("system", system)}]
  if question is None:
    raise record.bad("question", f"has none of the columns {schema['columns']['question']} for "
                     f"the question of {record.name!r}; it has {sorted(record.values)}")
  if not isinstance(question, str):
    raise record.bad("question", f"the question is {question!r} ({type(question).__name__}); a "
                     "text is needed")
  question = to_text(question)
  if not question.strip():
    raise record.bad("question", "the question is empty")
  return question, response, history, images


def _messages_in(record, text):
  """The messages that a text holds as JSON or as Python prints them, or the text itself.

  BadRow where it begins as messages do and cannot be read, as numpy prints two of them.
  """
  try:
    messages = json.loads(text)
  except (ValueError, RecursionError):
    if not (_MESSAGES.match(text) and text.rstrip().endswith("]")):
      return text
    try:
      messages = list_in(text)
    except ValueError as error:
      raise record.bad("question", f"its messages {text!r} {error}; give a list of objects, or "
                       "JSON") from error
  return messages if all(isinstance(message, dict) and ("role" in message or "from" in message)
                         for message in messages) else text


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
      about = schema["about"]["place"].replace("{place}", to_text(place))
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
  shown = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
  # Not str.format: questions are full of braces.
  template = template.replace("{options}", shown, 1)
  template = template.replace("{choices}", str(record.first("choices", "")), 1)
  return template.replace("{question}", question, 1)


def with_columns(schema, columns):
  """The schema with other columns: {field: names}; of several names the values are joined."""
  return schema | {"columns": schema["columns"] | {
    field: [names[0] if len(names) == 1 else list(names)] for field, names in columns.items()}}


@functools.cache
def read_schemas(file="data/files/schemas.json"):
  """{name: schema} of a JSON file of the package, which explains its own keys."""
  text = (importlib.resources.files("ares_jax") / file).read_text(encoding="utf-8")
  return {name: schema for name, schema in json.loads(text).items() if name != "about"}
