"""Reads the published files of benchmarks as rows, by the schemas of benchmarks.json.

A row is that of data/sources.py with these fields:
  answer     list of accepted truths, for example the letter and the text of an option
  level      str or None, difficulty
  group      str or None, the same for all variants of a problem
  step       str or None, WeMath's part of a problem
  tolerance  float, the largest difference of a right number to the truth, 0 if the data name none;
             or a list of them, one for each part of the truth
"""

import dataclasses
import os
import re

from etils import epath

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row, read_schemas, with_columns
from ares_jax.data.sources import ColumnsConfig, check_columns
from ares_jax.data.validation import examine
from ares_jax.evaluation.published import (
  accepted_truths,
  list_in,
  options_in,
  with_marked_images,
  with_marks_as_words,
)
from ares_jax.evaluation.scores import check_groups
from ares_jax.system.config import suggest
from ares_jax.system.heartbeat import heartbeat

METRICS = ("pass@1", "avg@n", "worst", "strict")
OWN = "generic"  # the schema of a file of one's own, whose rows must all be good


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Problems and how the answers to them are scored."""

  name: str
  rows: list
  metric: str  # one of METRICS, see scores.unit_values
  n: int  # samples a problem; a single one is greedy
  note: str = ""  # how the scoring of the benchmark's authors differs
  skipped: tuple = ()  # of texts: the rows that cannot be used, and why

  def summary(self):
    """Lines for people: what was read, what was not, and how the authors score."""
    images = sum(bool(row["images"]) for row in self.rows)
    lines = [f"{self.name}: {len(self.rows)} of {len(self.rows) + len(self.skipped)} problems, "
             f"{images} with images; {self.metric}"]
    lines += [f"skipped: {reason}" for reason in self.skipped[:5]]
    if len(self.skipped) > 5:
      lines.append(f"skipped: {len(self.skipped) - 5} more")
    return "\n".join(lines + ([f"note: {self.note}"] if self.note else []))


def benchmark_schemas():
  """{name: schema} of benchmarks.json, which explains its own keys."""
  return read_schemas("evaluation/benchmarks.json")


def open_benchmark(name, path, images="", columns=None):
  """Reads the Benchmark `name` of benchmarks.json; "generic" is for a file of one's own.

  Args:
    name: key of benchmarks.json.
    path: file or folder as published, of a format that data/files/records.py reads.
    images: folder of the images that rows name. "" looks beside the file, in its parent folder and
      in `images/` in both.
    columns: a ColumnsConfig, whose columns replace those of benchmarks.json; None replaces none.

  Raises:
    ValueError: there is no such benchmark or file; images are missing; most rows cannot be used, or
      one of a file of one's own; or groups are incomplete. Names the first row.
  """
  if name not in benchmark_schemas():
    raise ValueError(f"there is no benchmark {name!r}{suggest(name, list(benchmark_schemas()))}")
  columns = columns or ColumnsConfig()
  reader = _Reader(name, with_columns(benchmark_schemas()[name], columns.named()), images)
  for records in _open_files(reader.schema, path):
    check_columns(records, columns, path)
    reader.read(records)
  reader.check()
  schema = reader.schema
  if not reader.rows:
    raise ValueError(f"{path} has no rows of {name!r}"
                     + (f" where {schema['where']}" if "where" in schema else ""))
  benchmark = _without_groups(
    Benchmark(name, reader.rows, schema["metric"], schema["n"], schema.get("note", ""),
              tuple(map(str, reader.skipped))), reader.broken_groups)
  check_groups(benchmark.rows, benchmark.metric)
  return benchmark


def _without_groups(benchmark, groups):
  """The Benchmark without the rows of `groups`, a set, where its metric scores whole groups."""
  lost = [row["id"] for row in benchmark.rows if row["group"] in groups]
  if benchmark.metric in ("pass@1", "avg@n") or not lost:
    return benchmark
  return dataclasses.replace(
    benchmark, rows=[row for row in benchmark.rows if row["group"] not in groups],
    skipped=benchmark.skipped + tuple(f"row {name}: another row of its group is skipped"
                                      for name in lost))


def _open_files(schema, path):
  """Records of each file of a benchmark that is at `path`, or in a folder `path`."""
  path = epath.Path(path)
  if path.is_dir():
    for pattern in schema.get("files", ()):
      found = sorted(path.glob(pattern)) or sorted(path.glob(f"data/{pattern}"))
      if found:
        return [open_records(file, join=_joined_files(schema, file)) for file in found]
  return [open_records(path, join=_joined_files(schema, path))]


def _joined_files(schema, file):
  """The files beside a .json file that hold more columns of its rows."""
  if file.suffix != ".json":
    return []
  return [other for pattern in schema.get("join", ()) for other in sorted(file.parent.glob(pattern))
          if other != file]


class _Reader:
  """Collects the rows of a benchmark, file by file."""

  def __init__(self, name, schema, images):
    self.name, self.schema, self._images = name, schema, images
    self.rows, self.skipped = [], []  # `skipped` has the BadRow of each row that is left out
    self._ids, self.broken_groups = {}, set()
    # One record gives a row for each part.
    self._parts = [schema | {"columns": {
      field: [_in_part(column, number, each) for column in columns]
      for field, columns in schema["columns"].items()}}
      for number, each in enumerate(schema.get("each", [""]))]

  def read(self, records):
    """Adds the rows of one file."""
    for number in range(len(records)):
      heartbeat()
      for part in self._parts:
        self._read_part(part, records, number)

  def _read_part(self, part, records, number):
    record = {}
    try:
      record = self._prepare(records[number], records.files[0])
      if _has(record, self.schema.get("where", {})):
        self.rows.append(self._read_row(part, record, records, records.location(number)))
    except BadRow as error:
      if self.name == OWN:
        raise
      if error.code == "marks" and not any(record.get(column) for column in part["columns"].get(
          "images", ())):
        error = BadRow(records.location(number), "image_missing", error.reason)
      self.skipped.append(error)
      self.broken_groups |= {str(record[column]) for column in self.schema["columns"].get(
        "group", ()) if record.get(column) is not None}

  def check(self):
    """Raises ValueError where images are missing, or most rows cannot be used."""
    missing = [error for error in self.skipped if error.code == "image_missing"]
    if missing:
      raise ValueError(f"{self._count(missing)} lack an image; the first: {missing[0]}")
    if len(self.skipped) > len(self.rows):
      raise ValueError(f"{self._count(self.skipped)} cannot be used; the first: {self.skipped[0]}"
                       + "".join(f"; the published {name} belongs beside the file"
                                 for name in self.schema.get("join", ())))

  def _count(self, rows):
    return f"{len(rows)} of {len(self.rows) + len(self.skipped)} rows of {self.name!r}"

  def _prepare(self, record, file):
    """The record with the columns that the schema derives from others."""
    schema = self.schema
    if "_folder" in schema["columns"].get("source", ()):
      record = record | {"_folder": file.parent.name}
    for column in schema.get("lists", ()):
      record[column] = list_in(record.get(column))
    for column, template in schema.get("derive", {}).items():
      record[column] = re.sub(r"\{(\w+)\}", lambda name: str(record.get(name[1])), template)
    if "options_in" in schema:
      record["_options"] = options_in(str(record.get(schema["options_in"]) or ""))
    if "marked_images" in schema:
      record = with_marked_images(record, schema["marked_images"])
    return with_marks_as_words(record) if schema.get("merged_images") else record

  def _read_row(self, part, record, records, location):
    row = read_row(part, record, location=location, name=self.name, folder=records.folder)
    row["tolerance"] = row["tolerance"] or self.schema.get("tolerance", 0)
    if self.name != OWN:
      row["answer"] = list(dict.fromkeys(
        truth for text in row["answer"] for truth in accepted_truths(text)))
    # Variants of a problem, and several questions about one image, have the same id.
    self._ids[row["id"]] = self._ids.get(row["id"], 0) + 1
    if self._ids[row["id"]] > 1:
      row["id"] += f"#{self._ids[row['id']]}"
    row["images"] = [self._find(image, records.folder, location) for image in row["images"]]
    columns = part["columns"].get("images")
    is_text = "text_rows" in self.schema and _has(record, self.schema["text_rows"])
    if columns and not row["images"] and not is_text:
      raise BadRow(location, "image_missing", f"it has no image in the columns {columns}")
    return row

  def _find(self, image, folder, location):
    """The path of an image that a row names relative to `folder`; other images as they are."""
    if not isinstance(image, str):
      return image
    name, base = os.path.relpath(image, folder), epath.Path(self._images or folder)
    places = [base, base / "images", base.parent, base.parent / "images"]
    found = next((place for place in places if _is_file(place / name)), None)
    if found is None:
      raise BadRow(location, "image_missing", f"image {name!r} is in none of the folders "
                   f"{', '.join(map(str, places))}; give its folder as --images=FOLDER")
    return str(found / name)


def _has(record, values):
  """Whether a record has all `values`, {column: value}."""
  return all(record.get(column) == value for column, value in values.items())


def _in_part(column, number, each):
  if isinstance(column, list):
    return [_in_part(name, number, each) for name in column]
  return column.replace("{each}", each).replace("{number}", str(number))


def _is_file(path):
  return path.exists() if "://" in str(path) else os.path.isfile(path)


def check_prompts(benchmark, encoder, threads):
  """The Benchmark without the rows whose images cannot be decoded, which are then `skipped`.

  Raises:
    ValueError: a prompt is longer than the largest shape of `encoder`, or most rows cannot be used.
  """
  found = list(examine(benchmark.rows, numbers=range(len(benchmark.rows)), check=encoder.encode,
                       grader=None, threads=threads))
  bad = [seen.bad for seen in found if seen.bad]
  long = [error for error in bad if error.code == "length"]
  if long or len(bad) > len(found) / 2:
    raise ValueError(f"{len(long or bad)} of {len(found)} prompts of {benchmark.name!r} cannot be "
                     f"asked; the first: {(long or bad)[0]}")
  rows = [row for row, seen in zip(benchmark.rows, found, strict=True) if not seen.bad]
  broken = {row["group"] for row, seen in zip(benchmark.rows, found, strict=True) if seen.bad}
  return _without_groups(
    dataclasses.replace(benchmark, rows=rows, skipped=benchmark.skipped + tuple(map(str, bad))),
    broken - {None})
