"""A reader for each format of data files: records by number, in constant memory where it can be.

JSON lists, JSON objects, .csv and .tsv are held in memory.
"""

import bisect
import collections
import csv
import io
import itertools
import json
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ares_jax.data.files import group_cache

# A folder's files have a suffix of SUFFIXES; tables count only where it has none of these.
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".array_record", ".arrayrecord")
TABLES = (".csv", ".tsv")
KEY = "_key"  # column for the key of a record in a JSON object of records
_SCAN_BYTES = 2**24
_BOM = b"\xef\xbb\xbf"  # written by Windows at the beginning of UTF-8 text


def open_file(file, values=False):
  """Random access to the records of one file; ValueError names a file that cannot be read.

  `values` allows a JSON object of texts or numbers, {"1": "Which?"}: records with the column KEY
  and one that is named as the file.
  """
  if not ("://" in str(file) or os.path.isfile(file)):  # to read a pipe would wait for ever
    raise ValueError(f"data file {file} is no regular file")
  if file.suffix in (".parquet", ".arrow"):
    kind = _Parquet if file.suffix == ".parquet" else RemoteArrow if "://" in str(file) else _Arrow
    try:
      return kind(file)
    except (pa.ArrowInvalid, OSError) as error:  # empty, damaged, of another format
      raise ValueError(f"{file} cannot be read as {file.suffix}: {error}") from error
  if file.suffix in TABLES:
    return _read_table(file)
  if file.suffix in (".json", ".jsonl"):
    return _Lines(file) if _has_lines(file) else _read_json(file, values)
  return _ArrayRecord(file)


def _has_lines(file):
  """Whether a .json or .jsonl file holds an object a line, and is not one JSON value."""
  with file.open("rb") as opened:
    first = b""
    while not first.strip():
      first = opened.readline().removeprefix(_BOM)
      if not first:
        return True
    more = opened.read(_SCAN_BYTES).strip()
  if file.suffix == ".jsonl":
    return not first.lstrip().startswith(b"[") or _is_json(first) and bool(more)
  return bool(more) and first.lstrip().startswith(b"{") and _is_json(first)


def _is_json(text):
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def _read_json(file, values):
  """The records of a JSON list, or of an object of them, whose keys are in the column KEY."""
  try:
    loaded = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} cannot be read as JSON: {error}") from error
  if isinstance(loaded, dict):
    lists = [value for value in loaded.values() if _are_objects(value)]
    if len(lists) == 1 and not any(isinstance(value, dict) for value in loaded.values()):
      loaded = lists[0]  # {"canary": "...", "examples": [{...}, ...]}
    elif all(isinstance(value, dict) for value in loaded.values()):
      loaded = [{KEY: key} | value for key, value in loaded.items()]
    elif values and not any(isinstance(value, dict | list) for value in loaded.values()):
      loaded = [{KEY: key, file.stem: value} for key, value in loaded.items()]
  if loaded != [] and not _are_objects(loaded):
    raise ValueError(f"{file} does not hold a list of JSON objects, an object of them, or one a "
                     "line")
  return loaded


def _are_objects(value):
  return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _object(pairs):
  """The dict of a JSON object; json.loads alone would keep the last of two values of a key."""
  found = dict(pairs)
  if len(found) < len(pairs):
    twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
    raise ValueError(f"the key {twice!r} occurs twice in an object")
  return found


def _read_table(file):
  """The rows of a .csv or .tsv whose first line names the columns; an empty cell is None."""
  csv.field_size_limit(2**31 - 1)  # a cell may hold an image
  try:
    text = io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")
    rows = list(csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True))
  except (ValueError, csv.Error) as error:
    raise ValueError(f"{file} cannot be read as {file.suffix}: {error}") from error
  names, *rows = rows or [[]]
  names = [name.strip() for name in names]
  _check_names(file, names)
  for number, row in enumerate(rows):
    if row and len(row) != len(names):
      raise ValueError(f"{file}: record {number} has {len(row)} cells, the first line names "
                       f"{len(names)} columns; quote cells that hold a separator")
  return [{name: cell or None for name, cell in zip(names, row, strict=True)}
          for row in rows if row]


def _check_names(file, names):
  """ValueError where two columns have one name: a record would hold the last one alone."""
  if len(set(names)) < len(names):
    raise ValueError(f"{file}: two columns have the same name: {names}")


class _Lines:
  """JSONL; keeps 8 bytes a line in memory."""

  def __init__(self, path):
    self._path = path
    # Split at \n alone: U+2028 inside a string does not end a line.
    with path.open("rb") as file:
      first = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
      file.seek(first)
      ends, size = [], first
      while chunk := file.read(_SCAN_BYTES):
        ends.append(size + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10))
        size += len(chunk)
      ends = np.concatenate([[first], *ends, [size]]).astype(np.int64)
      starts, lengths = ends[:-1], np.diff(ends)
      filled = lengths > 1
      # Blank lines are short; all longer ones are taken for records.
      for number in np.flatnonzero(filled & (lengths < 16)):
        file.seek(int(starts[number]))
        filled[number] = bool(file.read(int(lengths[number])).strip())
    self._starts = starts[filled]

  def __len__(self):
    return len(self._starts)

  def __getitem__(self, number):
    with self._path.open("rb") as file:
      file.seek(int(self._starts[number]))
      return _json_object(file.readline())


class _ArrayRecord:

  def __init__(self, path):
    import grain

    self._source = grain.sources.ArrayRecordDataSource([str(path)])

  def __len__(self):
    return len(self._source)

  def __getitem__(self, number):
    return _json_object(self._source[number])


def _json_object(data):
  record = json.loads(data, object_pairs_hook=_object)
  if not isinstance(record, dict):
    raise ValueError(f"the record is {str(record)[:40]!r}, a JSON object is needed")
  return record


class _Groups:
  """Records that are read a group at a time: a row group of Parquet, a record batch of Arrow."""

  def __init__(self, path, names, rows):
    """`names`: of the columns; `rows`: number of records in each group."""
    _check_names(path, names)
    self._path, self._ends = path, list(itertools.accumulate(rows))
    self._lock, self._file = threading.Lock(), None

  def __getstate__(self):
    return self.__dict__ | {"_lock": None, "_file": None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())

  def __len__(self):
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, number):
    group = bisect.bisect_right(self._ends, number)
    start = self._ends[group - 1] if group else 0
    with self._lock:  # a second thread waits for the group that the first one reads
      self._file = self._file or self._open()
      try:
        table = self._read(group)
      except OSError as error:  # pyarrow's words for damage name no file
        raise OSError(f"{self._path}, group {group} of records cannot be read: {error}") from error
    record = table.slice(number - start, 1).to_pylist()[0]
    return {field.name: _shortest(record[field.name], field.type) for field in table.schema}


def _shortest(value, kind):
  """A value of an Arrow type with the digits that its floats tell: 0.1, not 0.10000000149011612."""
  if value is None or "float" not in str(kind):  # "float" and "halffloat" have less than 64 bits
    return value
  if pa.types.is_floating(kind) and kind != pa.float64():
    return float(str(kind.to_pandas_dtype()(value)))
  if pa.types.is_map(kind):
    return [(_shortest(key, kind.key_type), _shortest(item, kind.item_type)) for key, item in value]
  if pa.types.is_struct(kind):
    return {field.name: _shortest(value[field.name], field.type) for field in kind}
  return [_shortest(item, kind.value_type) for item in value] if isinstance(value, list) else value


class _Parquet(_Groups):

  def __init__(self, path):
    with path.open("rb") as file:
      metadata = pyarrow.parquet.read_metadata(file)
    super().__init__(path, metadata.schema.to_arrow_schema().names, [
      metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)])

  def _open(self):
    return pyarrow.parquet.ParquetFile(self._path.open("rb"))

  def _read(self, group):
    return group_cache.GROUPS.read(
      (self._file, group), self._file.metadata.row_group(group).total_byte_size,
      lambda: self._file.read_row_group(group, use_threads=False))


class _Arrow(_Groups):
  """A file mapped into memory: the system reads the pages that are asked for."""

  def __init__(self, path):
    self._path = path
    batches = self._open()
    super().__init__(path, batches[0].schema.names if batches else [],
                     [batch.num_rows for batch in batches])
    self._file = batches

  def _open(self):
    mapped = pa.memory_map(str(self._path))
    try:
      return list(pa.ipc.open_stream(mapped))
    except pa.ArrowInvalid:  # Hugging Face writes streams, others files
      reader = pa.ipc.open_file(mapped)
      return [reader.get_batch(number) for number in range(reader.num_record_batches)]

  def _read(self, group):
    return self._file[group]


class RemoteArrow(_Groups):
  """A file that cannot be mapped, on gs:// for example.

  Opening reads the file once from front to end, holding one record batch at a time: a stream has
  no index of its batches. A record is then read with its batch alone.
  """

  def __init__(self, path):
    self._offsets, rows = [], []  # (start, bytes) of each batch
    with path.open("rb") as file:
      # A file is a stream behind eight bytes.
      if file.read(8) != b"ARROW1\0\0":
        file.seek(0)
      try:
        messages = pa.ipc.MessageReader.open_stream(file)
        self._schema = pa.ipc.read_schema(messages.read_next_message())
        start = file.tell()
        for message in messages:
          if message.type == "dictionary":
            raise ValueError(f"{path} has dictionary columns; save it as parquet")
          rows.append(pa.ipc.read_record_batch(message, self._schema).num_rows)
          self._offsets.append((start, file.tell() - start))
          start = file.tell()
      except (pa.ArrowInvalid, OSError, StopIteration) as error:
        raise ValueError(f"{path} is not an Arrow stream or file of version 0.15 or later: "
                         f"{str(error) or 'it is empty'}") from error
    super().__init__(path, self._schema.names, rows)

  def _open(self):
    return self._path.open("rb")

  def _read(self, group):
    def load():
      self._file.seek(start)
      return pa.ipc.read_record_batch(pa.ipc.read_message(self._file), self._schema)

    start, size = self._offsets[group]
    return group_cache.GROUPS.read((self._path, group), size, load)
