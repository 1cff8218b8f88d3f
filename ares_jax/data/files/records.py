"""Reads records of data files by number, in constant memory.

`schema.py` turns a record into a row. Formats:
  .jsonl, .json   one JSON object a line; or a list of objects, or an object of them whose keys
                  become the column "_key", held in memory
  .csv, .tsv      the first line names the columns; held in memory
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

from etils import epath

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.formats import KEY, SUFFIXES, TABLES, open_file


def open_records(path, split="", *, join=(), key="", images=""):
  """Records of a file or folder, local or on gs://; ValueError where nothing can be read.

  Args:
    path: of the file or folder.
    split: of a folder: "" for everything, else a name: of a TFDS split, of a folder of a saved
      `DatasetDict`, or with which file names begin (train-00000-of-00002.parquet).
    join: files with more columns of the same rows.
    key: the column that these and the records have in common; "" where each file is a JSON object
      whose keys are the ids of the rows.
    images: folder of the images that records name; "" is that of the file.
  """
  records = _open(epath.Path(path), split)
  if join:
    records = Joined(records, [_open(epath.Path(other), "", values=True) for other in join],
                     key or KEY)
  if images:
    records.folder = epath.Path(images)
  return records


def _open(path, split, values=False):
  root = path
  try:
    if not path.exists():
      raise ValueError(f"data file {path} does not exist")
    if not path.is_dir():
      if path.suffix not in SUFFIXES + TABLES:
        raise ValueError(f"data file {path} is not one of {', '.join(SUFFIXES + TABLES)}")
      _check_split(path, split, path.name)
      return Records([path], path.parent, values)
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
    _check_split(path, split, state.get("_split") or split)
    return [path / file["filename"] for file in state["_data_files"]]
  for folder in (path, path / "data"):
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    # Backups, macOS's "._name", and what Hugging Face writes about data.
    found = [file for file in found if not file.name.startswith(".")
             and file.name not in ("dataset_info.json", "dataset_infos.json")]
    for suffixes in (SUFFIXES, TABLES):
      files = [file for file in found if file.suffix in suffixes
               and (not split or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name))]
      if files:
        return files
  raise ValueError(f"{path} is neither a {', '.join(SUFFIXES)} file nor a folder of them"
                   + (f" with names that begin with {split!r}" if split else ""))


def _check_split(path, split, name):
  """ValueError where all rows would be read as those of a split that `name` is not of."""
  if split and not re.search(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])", name):
    raise ValueError(f"{path} is not divided into splits, and its name has no {split!r}; leave "
                     "split empty to read all of it, or name a file of that split")


class Records:
  """Random access to the records of `files`; `folder` is that of the images that records name."""

  def __init__(self, files, folder, values=False):
    self.folder, self.files = folder, list(files)
    self._names = [file.name for file in files]
    self._files = [open_file(file, values) for file in files]
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


class Joined:
  """Records with the columns that `others`, more Records, have for the same value of a column."""

  def __init__(self, records, others, key):
    """Reads all of `others` once; ValueError where one lacks `key`, or has a value of it twice."""
    self.folder, self._records, self._others, self._key = records.folder, records, others, key
    self.files = [file for part in (records, *others) for file in part.files]
    self._numbers = [self._by_key(part) for part in others]

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    key = record.get(self._key)
    for part, numbers in zip(self._others, self._numbers, strict=True):
      if key is None or str(key) not in numbers:
        raise BadRow(self.location(index), "record", f"{part.files[0].name} has no record whose "
                     f"{self._key!r} is {key!r}")
      other = part[numbers[str(key)]]
      filled = {column: value for column, value in record.items() if value is not None}
      for column in filled.keys() & other.keys() - {self._key}:
        if other[column] is not None and str(other[column]) != str(filled[column]):
          raise BadRow(self.location(index), "record", f"its column {column!r} is "
                       f"{record[column]!r} here and {other[column]!r} in {part.files[0].name}")
      record = record | other | filled
    return record

  def location(self, index):
    """File and number of record `index` in the first file."""
    return self._records.location(index)

  def _by_key(self, records):
    numbers = {}
    for number in range(len(records)):
      key = records[number].get(self._key)
      if key is None or str(key) in numbers:
        raise ValueError(f"{records.files[0]}, record {number}: {self._key!r} is {key!r}, "
                         f"{'twice' if key is not None else 'missing'}; records are joined by it")
      numbers[str(key)] = number
    return numbers
