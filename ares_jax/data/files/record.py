"""A record of a file, and the values of its columns by the fields of a row."""

import contextlib
import dataclasses
import decimal
import json
import math

import numpy as np

from ares_jax.data.bad_row import BadRow, printable
from ares_jax.data.files.formats import KEY

_DERIVED = (KEY, "_folder", "_options")  # columns that readers of files add
# The values of several columns of a field are a list, or a text with such joints.
_COLLECTED = ("images", "options", "answer", "responses")
_JOINTS = {"question": "\n", "response": "\n"}


@dataclasses.dataclass(frozen=True)
class Record:
  """A record, and how it is read."""

  schema: dict  # which columns hold what
  values: dict  # the record as the file has it
  location: str  # "train.jsonl:17"
  name: str  # of the data
  folder: object  # of the images that the record names
  left_out: list = dataclasses.field(default_factory=list)  # texts: what the row does not show

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
      return value_at(self.values, column)
    found = [value_at(self.values, name) for name in column]
    while found and found[-1] is None:
      found.pop()
    # A gap between options stays, and is refused: without it those behind it had other letters.
    found = [value for value in found if value is not None or field == "options"]
    if field in _COLLECTED:
      return [item for value in found for item in (value if is_list(value) else [value])] or None
    texts = [self.scalar(field, value).strip() for value in found]
    return _JOINTS.get(field, "/").join(filter(None, texts)) or None

  def label(self, field, default=None, limit=80):
    """The text of a field such as a level or a source, printable; a list of texts is joined."""
    value = self.first(field)
    if is_list(value):
      value = ", ".join(self.scalar(field, item) for item in value)
    if value is None or isinstance(value, float) and math.isnan(value):
      value = default
    if isinstance(value, bool):
      value = str(value)
    return None if value is None else printable(self.scalar(field, value), limit)

  def scalar(self, field, value):
    """The text of a text or a number; BadRow where the value is neither."""
    if isinstance(value, np.generic):  # 0.1 of 32 bits is no 0.10000000149011612
      value = float(str(value)) if isinstance(value, np.floating) else value.item()
    if isinstance(value, decimal.Decimal) and value.is_finite():
      value = str(value)
    if isinstance(value, bool) or not isinstance(value, str | bytes | int | float) or (
        isinstance(value, float) and not math.isfinite(value)):
      code = field if field in ("question", "answer", "response") else "record"
      raise self.bad(code, f"the {field} is {value!r} ({type(value).__name__}); a text or a number "
                     "is needed")
    return to_text(value)

  def unread(self):
    """{name: value} of the columns that hold something and that no field reads.

    A column of which only fields are read, "a.b", counts by its other fields.
    """
    read = set()
    for field, columns in self.schema["columns"].items():
      filled = [column for column in columns if not is_empty(self.value(field, column))]
      # Of other names for the same only the first is read; image_1, image_2 ... are different ones.
      some = [column for column in filled[1:] if field == "wrong" or
              field == "images" and column[-1].isdigit()]
      for column in (*filled[:1], *some):
        read |= {column} if isinstance(column, str) else set(column)
    known = {".".join(parts[:end]) for parts in (name.split(".") for name in read)
             for end in range(1, 1 + len(parts))} | read
    found = {}
    for name, value in self.values.items():
      inside = value if isinstance(value, dict) and name in known and name not in read else {}
      found |= {f"{name}.{key}": item for key, item in inside.items()}
      if name not in known and name not in _DERIVED:
        found[name] = value
    return {name: value for name, value in found.items()
            if name not in known and not is_empty(value)}

  def bad(self, code, reason):
    """The BadRow of this record."""
    return BadRow(self.location, code, reason)


def plain_columns(schema, record):
  """{name: value} of the columns of a record that hold texts, numbers, and lists or dicts of them.

  Columns of images, by the schema, are left out.
  """
  images = {name for column in schema["columns"].get("images", ())
            for name in ([column] if isinstance(column, str) else column)}
  found = {}
  for name, value in record.items():
    if name not in _DERIVED and name.partition(".")[0] not in images:
      with contextlib.suppress(TypeError, ValueError):  # bytes, dates: no JSON value
        found[name] = json.loads(json.dumps(to_plain(value)))
  return found


def value_at(record, column):
  """The value of a column; "a.b" is the field b of the column a, "a.0" the first item of a list."""
  if column in record:
    return record[column]
  for part in column.split("."):
    if is_list(record) and part.isdecimal():
      record = record[int(part)] if int(part) < len(record) else None
    else:
      record = record.get(part) if isinstance(record, dict) else None
  return record


def is_list(value):
  """Whether a value is a list, as JSON, Parquet and TFDS give them."""
  return isinstance(value, list | tuple) or isinstance(value, np.ndarray) and value.ndim > 0


def is_empty(value):
  """Whether a value is None, or an empty text, list or object."""
  return value is None or (
    isinstance(value, str | bytes | list | tuple | dict | np.ndarray) and not len(value))


def to_text(value):
  """The text of a text or number; UnicodeEncodeError for half a surrogate pair."""
  text = value.decode() if isinstance(value, bytes) else str(value)
  text.encode()
  return text


def to_plain(value):
  """The value with Python's strings, numbers and lists: TFDS gives bytes and arrays."""
  if is_list(value):
    return [to_plain(item) for item in value]
  if isinstance(value, str | bytes):
    return to_text(value)
  return value.item() if isinstance(value, np.generic) else value
