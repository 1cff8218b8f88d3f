"""Reads records of data files by number, in constant memory.

`schema.py` turns a record into a row. Formats:
  .jsonl          one JSON object a line
  .json           a list of objects, or an object of them; held in memory
  .parquet        by row groups, read when one of their rows is asked for
  .arrow          saved by Hugging Face `datasets`; a local file is mapped into memory
  .array_record   one JSON object a record (.arrayrecord too)
  a TFDS folder   with features.json, its splits as ArrayRecord files
Files of a folder are read in the order of their names. Reading one row of Parquet reads its whole
row group, so writers that embed images should keep groups small (`row_group_size=100`).
"""

import bisect
import itertools
import json
import re
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files import group_cache

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".array_record", ".arrayrecord")
_SCAN_BYTES = 2**24


def open_records(path, split=""):
  """Records of a file or folder, local or on gs://; ValueError where nothing can be read.

  The `split` of a folder is "" for everything, else a name: of a TFDS split, of a folder of a saved
  `DatasetDict`, or with which file names begin (train-00000-of-00002.parquet).
  """
  root = path = epath.Path(path)
  try:
    if not path.exists():
      raise ValueError(f"data file {path} does not exist")
    if not path.is_dir():
      if path.suffix not in SUFFIXES:
        raise ValueError(f"data file {path} is not one of {', '.join(SUFFIXES)}")
      return Records([path], path.parent)
    if (path / "features.json").exists():
      return TfdsRecords(path, split)
    if (path / "dataset_dict.json").exists():
      splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
      if split not in splits:
        raise ValueError(f"{path} has the splits {', '.join(splits)}; split is {split!r}")
      path, split = path / split, ""
    return Records(_files(path, split), root)
  except ImportError as error:
    raise ValueError(f"{path} cannot be read: {error}; for gs:// pip install gcsfs") from error


def _files(path, split):
  """The data files of a folder, or of its folder data/ where it has none, as on the hub."""
  if (path / "state.json").exists():  # saved by Hugging Face `datasets`
    state = json.loads((path / "state.json").read_text())
    if state.get("_indices_files"):
      raise ValueError(f"{path} is a view of other rows; save it after flatten_indices()")
    return [path / file["filename"] for file in state["_data_files"]]
  for folder in (path, path / "data"):
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in found if file.suffix in SUFFIXES
             and (not split or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name))]
    if files:
      return files
  raise ValueError(f"{path} is neither a {', '.join(SUFFIXES)} file nor a folder of them"
                   + (f" with names that begin with {split!r}" if split else ""))


class Records:
  """Random access to the records of `files`; `folder` is that of the images that records name."""

  def __init__(self, files, folder):
    self.folder, self.files = folder, list(files)
    self._names = [file.name for file in files]
    self._files = [_open(file) for file in files]
    self._ends = list(itertools.accumulate(map(len, self._files)))

  def __len__(self):
    return self._ends[-1]

  def __getitem__(self, index):
    file, number = self._find(index)
    try:
      return self._files[file][number]
    except (ValueError, RecursionError) as error:  # not JSON, or nested too deep
      raise BadRow(self.location(index), "record", f"cannot be read: {error}") from error

  def location(self, index):
    """File and number of record `index`: "train.parquet:17"."""
    file, number = self._find(index)
    return f"{self._names[file]}:{number}"

  def _find(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    file = bisect.bisect_right(self._ends, index)
    return file, int(index) - (self._ends[file - 1] if file else 0)


class TfdsRecords:
  """Records of a prepared TFDS data set; both texts and images are bytes."""

  def __init__(self, folder, split):
    import tensorflow_datasets as tfds  # 0.4 s

    self.folder, self._split = folder, split or "all"
    self.files = sorted(path for path in folder.iterdir() if not path.is_dir())
    builder = tfds.builder_from_directory(folder)
    try:
      self._source = builder.as_data_source(self._split)
    except (KeyError, NotImplementedError, ValueError) as error:
      raise ValueError(f"{folder}, split {self._split!r}, has the splits "
                       f"{', '.join(builder.info.splits)} and cannot be read by number: {error}; "
                       "prepare it with file_format='array_record'") from error

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    return self._source[int(index)]

  def location(self, index):
    """Split and number of record `index`: "train:17"."""
    return f"{self._split}:{index}"


def _open(file):
  if file.suffix == ".parquet":
    return _Parquet(file)
  if file.suffix == ".arrow":
    return RemoteArrow(file) if "://" in str(file) else _Arrow(file)
  if file.suffix == ".json":
    return _json_list(file)
  return _Lines(file) if file.suffix == ".jsonl" else _ArrayRecord(file)


def _json_list(file):
  loaded = json.loads(file.read_text())
  if isinstance(loaded, dict):
    loaded = loaded.get("examples", list(loaded.values()))
  if not isinstance(loaded, list) or not all(isinstance(record, dict) for record in loaded):
    raise ValueError(f"{file} does not hold a list of JSON objects")
  return loaded


class _Lines:
  """JSONL; keeps 8 bytes a line in memory."""

  def __init__(self, path):
    self._path = path
    ends, size = [], 0
    # Split at \n alone: U+2028 inside a string does not end a line.
    with path.open("rb") as file:
      while chunk := file.read(_SCAN_BYTES):
        ends.append(size + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10))
        size += len(chunk)
      ends = np.concatenate([[0], *ends, [size]]).astype(np.int64)
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
  record = json.loads(data)
  if not isinstance(record, dict):
    raise ValueError(f"the record is {str(record)[:40]!r}, a JSON object is needed")
  return record


class _Groups:
  """Records that are read a group at a time: a row group of Parquet, a record batch of Arrow."""

  def __init__(self, path, rows):
    """`rows`: number of records in each group."""
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
      table = self._read(group)
    return table.slice(number - start, 1).to_pylist()[0]


class _Parquet(_Groups):

  def __init__(self, path):
    with path.open("rb") as file:
      metadata = pyarrow.parquet.read_metadata(file)
    super().__init__(path, [metadata.row_group(number).num_rows
                            for number in range(metadata.num_row_groups)])

  def _open(self):
    return pyarrow.parquet.ParquetFile(self._path.open("rb"))

  def _read(self, group):
    return group_cache.GROUPS.read(
      (self._file, group), self._file.metadata.row_group(group).total_byte_size,
      lambda: self._file.read_row_group(group, use_threads=False))


class _Arrow(_Groups):
  """A file mapped into memory: the system reads the pages that are asked for."""

  def __init__(self, path):
    super().__init__(path, [])
    self._file = self._open()
    self._ends = list(itertools.accumulate(batch.num_rows for batch in self._file))

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
    super().__init__(path, rows)

  def _open(self):
    return self._path.open("rb")

  def _read(self, group):
    def load():
      self._file.seek(start)
      return pa.ipc.read_record_batch(pa.ipc.read_message(self._file), self._schema)

    start, size = self._offsets[group]
    return group_cache.GROUPS.read((self._path, group), size, load)
