"""Benchmarks as rows: their published files, read by the schemas of benchmarks.json.

A row is one of data/sources.py, and has besides:
  answer     list of accepted truths: an option's letter and its text
  level, group, step   str or None: difficulty, variants of one problem, WeMath's part of a problem
  tolerance  float, largest difference to a number that counts as right; 0 where the data name none
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import pathlib
import re

import numpy as np
import pyarrow.parquet

from ares_jax.config import suggest

METRICS = ("pass@1", "avg@n", "worst", "strict")
_MARK = re.compile(r"<image ?([0-9]*)>")
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Rows to answer and how the answers are scored."""

  name: str
  rows: list
  metric: str  # one of METRICS
  n: int  # samples a problem; 1 is greedy


@functools.cache
def schemas():
  """{name: schema} of benchmarks.json, which explains its own keys."""
  file = importlib.resources.files("ares_jax.data") / "benchmarks.json"
  table = json.loads(file.read_text(encoding="utf-8"))
  return {name: schema for name, schema in table.items() if name != "about"}


def open_benchmark(name, path):
  """Reads a benchmark.

  Args:
    name: a key of benchmarks.json; "generic" for files of one's own.
    path: a .jsonl, .json or .parquet file, or a folder of them, read in the order of their names.

  Raises:
    ValueError: no such benchmark or file, or a row lacks a column; names the row and the columns.
  """
  if name not in schemas():
    raise ValueError(f"there is no benchmark {name!r}{suggest(name, list(schemas()))}")
  schema, rows, seen = schemas()[name], [], {}
  for file in _files(path):
    for number, record in enumerate(_records(file)):
      if all(record.get(key) == value for key, value in schema.get("where", {}).items()):
        row = _row(schema, record, f"{file.name}:{number}", name, file.parent)
        # Variants of a problem, a file each, have the same id.
        seen[row["id"]] = seen.get(row["id"], 0) + 1
        if seen[row["id"]] > 1:
          row["id"] += f"#{seen[row['id']]}"
        rows.append(row)
  if not rows:
    raise ValueError(f"{path} has no rows of {name!r}"
                     + (f" where {schema['where']}" if "where" in schema else ""))
  return Benchmark(name, rows, schema["metric"], schema["n"])


def _files(path):
  path = pathlib.Path(path)
  files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
  files = [file for file in files if file.suffix in _SUFFIXES]
  if not files:
    raise ValueError(f"{path} is neither a {', '.join(_SUFFIXES)} file nor a folder of them; "
                     "download the benchmark and pass --data=FILE")
  return files


def _records(file):
  if file.suffix == ".parquet":
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
      yield from batch.to_pylist()
  elif file.suffix == ".json":
    loaded = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(loaded, dict):
      loaded = loaded.get("examples", list(loaded.values()))
    yield from loaded
  else:
    with open(file, "rb") as lines:
      yield from (json.loads(line) for line in lines if line.strip())


def _row(schema, record, place, name, folder):
  columns = schema["columns"]

  def first(field, default=None):
    for column in columns.get(field, ()):
      if record.get(column) is not None:
        return record[column]
    return default

  if not isinstance(first("question"), str):
    raise ValueError(f"row {place} has none of the columns {columns['question']} that {name!r} "
                     f"asks from; it has {sorted(record)}")
  options = _options(schema, record, first)
  accepted = _accepted(schema, record, first, options, place)
  letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
  shown = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, options, strict=False))
  template = schema["prompt"] if options or "prompt_open" not in schema else schema["prompt_open"]
  # Not str.format: questions are full of braces.
  question = template
  for field, text in (("{options}", shown), ("{choices}", str(first("choices", ""))),
                      ("{question}", first("question"))):
    question = question.replace(field, text, 1)
  question, images = question.strip(), _images(columns, record, folder, place)
  if name != "generic":  # One's own marks mean what they mean in training, mistakes included.
    question, images = _place_images(question, images)
  return {"id": str(first("id", place)), "source": str(first("source", name)),
          "question": question, "answer": accepted, "images": images,
          **{field: None if first(field) is None else str(first(field))
             for field in ("level", "group", "step")},
          "tolerance": _tolerance(first, place)}


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
  return [str(option).strip() for option in options]


def _accepted(schema, record, first, options, place):
  answer = first("right") if schema.get("answer") == "gpqa" else first("answer")
  if schema.get("answer") == "gsm8k" and answer:
    answer = str(answer).rpartition("####")[2]
  answers = [str(text).strip() for text in (answer if isinstance(answer, list) else [answer])]
  if answer is None or not all(answers) or not answers:
    raise ValueError(f"row {place}: the answer is {answer!r}; a truth is needed")
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
    value = record.get(column)
    if value is None or (found and not column[-1].isdigit()):
      continue  # the next name of the same image, where the first was there
    found += value if isinstance(value, list) else [value]
  return [_image(value, folder, place) for value in found if value is not None]


def _image(value, folder, place):
  """Encoded bytes, or the path of a file inside the benchmark's folder."""
  if isinstance(value, dict):
    value = value.get("bytes") or value.get("path")
  if isinstance(value, bytes):
    return value
  path = (folder / str(value)).resolve()
  if not path.is_relative_to(folder.resolve()):
    raise ValueError(f"row {place}: image {value!r} lies outside the folder {folder}")
  return str(path)


def _place_images(question, images):
  """A published question with one `<image>` an image, in their order.

  It may name some of its images, and one more than once: the others are left out. Where its marks
  and its images do not fit, the images come first.
  """
  marks = _MARK.findall(question)
  numbers = [int(number) for number in marks if number]
  if numbers and len(numbers) == len(marks) and 1 <= min(numbers) <= max(numbers) <= len(images):
    return _MARK.sub("<image>", question), [images[number - 1] for number in numbers]
  if not numbers and len(marks) == len(images):
    return _MARK.sub("<image>", question), images
  return _MARK.sub("", question), images


def _tolerance(first, place):
  digits, tolerance = first("digits"), first("tolerance", 0)
  try:
    if digits is not None:  # decimals: 0.57 stands for 0.565 to 0.575
      return 0.5 * 10.0 ** -int(float(digits))
    return float(tolerance or 0)
  except (TypeError, ValueError) as error:
    raise ValueError(f"row {place}: the tolerance {tolerance!r} (decimals {digits!r}) is no "
                     "number") from error
