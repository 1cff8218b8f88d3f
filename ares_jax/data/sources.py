"""Reads rows from files of several schemas, mixes sources, and streams batches with Grain.

A row is a dict:
  id        str, stable across runs; the record's file and number if it has none. `Named` makes it
            unique in a run
  source    str, the data set it belongs to (AdaCS draws its length targets per source)
  question  str; `<image>` marks where the next image goes, `<image 2>` where the second one does;
            without any mark all images come first
  answer    list of accepted truths, such as an option's letter and text (a str in digits.py)
  options   list of the texts of a multiple-choice question's options, in the order of their letters
  images    list of uint8 arrays [H, W, 3], encoded bytes, or file names
  history   list of {"role": "system", "user" or "assistant", "content": text}, the turns before the
            question, whose answers fine-tuning learns too; only where there are any
  response  str, only for supervised examples; `responses`, a list, for AdaCS to choose from
  pass_rate float, share of a probe's answers that were right, where the data have it, for AdaCS
  left_out  list of texts: columns, images and keys of messages that the record has and no field
            shows; `inspect_data` counts them
  columns   dict of the record's columns as the file has them, without its images; for reward
            functions of a user, and only where a run has one
  level, group, step, tolerance   as in evaluation/benchmarks.py; None, and 0, where not given

files/records.py reads JSONL, JSON, Parquet, Hugging Face folders (saved by `datasets`, or as on the
hub), ArrayRecord and TFDS; local or on gs://. Images are part of the record
({"bytes": ..., "path": ...}; in JSON {"bytes": "base64,..."}), or are named relative to the folder.

A source's `schema` is a key of schemas.json; docs/data.md shows a line of each.
"""

import dataclasses
import itertools

import grain
import numpy as np

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.formats import SUFFIXES, TABLES
from ares_jax.data.files.record import plain_columns
from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row, read_schemas, with_columns
from ares_jax.system.config import optional, suggest

_SEARCHED = 100  # records that are searched for a column that a source names

Names = tuple[str, ...] | str  # of columns; "" or () leaves it to the schema


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
  """Columns that hold the fields of a row, in place of those of the schema.

  A name may be "a.b", the field b of the column a, or "a.0", the first item of a list. The texts of
  several columns are joined: by a newline in a question or a response, by "/" in an id, a source or
  a level. Several columns of images, options, answers or responses make a list.
  """

  id: Names = optional(())
  source: Names = optional(())
  question: Names = optional(())
  system: Names = optional(())  # the system turn before the question
  answer: Names = optional(())
  images: Names = optional(())
  options: Names = optional(())
  level: Names = optional(())
  group: Names = optional(())  # variants of one problem, which intervals count as one
  response: Names = optional(())
  responses: Names = optional(())
  pass_rate: Names = optional(())

  @staticmethod
  def from_text(text):
    """The fields that a command line names: "question=Body+Question, answer=Answer"."""
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    return {field.strip(): tuple(map(str.strip, names.split("+"))) for field, _, names in parts}

  def named(self):
    """{field: names of its columns} of the fields that name any."""
    fields = {field: (names,) if isinstance(names, str) else names
              for field, names in vars(self).items()}
    return {field: names for field, names in fields.items() if any(names)}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One data set."""

  path: str  # a file or a folder, relative to the current folder, or at gs://
  schema: str  # key of schemas.json
  split: str  # of a folder; "" = all of it
  weight: float  # rows drawn from it, relative to the weights of the other sources
  columns: ColumnsConfig = optional(ColumnsConfig())
  # Files with more columns of the same rows, and the column by which they are matched; "" where
  # all are JSON objects whose keys are the rows' ids.
  join: tuple[str, ...] = optional(())
  key: str = optional("")
  images: str = optional("")  # folder of the images that records name; "" = that of the file

  @staticmethod
  def from_text(text):
    """The fields of a source that a config or a command line names by "PATH" or "SCHEMA:PATH"."""
    schema, colon, path = text.partition(":")
    if not colon or schema not in read_schemas():
      schema, path = "plain", text
    return dict(path=path, schema=schema, split="", weight=1.0)

  def __post_init__(self):
    known = list(read_schemas())
    if self.schema not in known:
      raise ValueError(f"schema is {self.schema!r}{suggest(self.schema, known)}")
    if not 0 < self.weight < float("inf"):
      raise ValueError(f"weight = {self.weight} must be > 0; leave the source out instead")


class FileSource:
  """The rows of one data set by number; `name` is that of rows that name no source."""

  def __init__(self, config, truths=True, columns=False):
    """Opens the files of a SourceConfig; ValueError where there are none or they have no rows.

    `truths` and `columns` are as for `open_sources`.
    """
    self._truths, self._columns = truths, columns
    self._records = open_records(config.path, config.split, join=config.join, key=config.key,
                                 images=config.images)
    self.files = self._records.files
    self._schema = with_columns(read_schemas()[config.schema], config.columns.named())
    last = config.path.rstrip("/").rpartition("/")[2]
    ends = SUFFIXES + TABLES
    self.name = next((last.removesuffix(end) for end in ends if last.endswith(end)), last)
    if not len(self._records):
      raise ValueError(f"data file {config.path} has no rows")
    check_columns(self._records, config.columns, config.path)

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    record = self._records[index]
    row = read_row(self._schema, record, location=self.location(index), name=self.name,
                   folder=self._records.folder, truth=self._truths)
    return row | {"columns": plain_columns(self._schema, record)} if self._columns else row

  def location(self, index):
    """File and number of row `index`: "train.parquet:17"."""
    return self._records.location(index)


def check_columns(records, columns, path):
  """Raises ValueError where none of the records has a column that a ColumnsConfig names."""
  missing = [name for names in columns.named().values() for name in names]
  known = set()
  for index in range(min(_SEARCHED, len(records)) if missing else 0):
    try:
      record = records[index]
    except BadRow:
      continue
    known |= record.keys()
    missing = [name for name in missing if record.keys().isdisjoint((name, name.partition(".")[0]))]
  if missing:
    raise ValueError(f"{path} has no column {missing[0]!r}, which columns names"
                     f"{suggest(missing[0], sorted(known))}")


class Named:
  """The rows of a source with ids that no other row of a run has: "g-7 (rl 0:17)".

  `kind` and `part` say which of the run's sources it is; records need not have ids of their own,
  and those of two files, or of two records, may be the same.
  """

  def __init__(self, source, kind, part):
    self._source, self._where = source, f"{kind} {part}"
    self.name, self.files, self.location = source.name, source.files, source.location

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    row = self._source[index]
    return row | {"id": f"{row['id']} ({self._where}:{index})"}


class Subset:
  """The rows of a source whose numbers are in `rows`, an ascending int64 array."""

  def __init__(self, source, rows):
    self._source, self._rows = source, rows
    self.name, self.files = source.name, source.files

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._source[int(self._rows[index])]


class Mixture:
  """Several sources: concatenated by number, mixed by weight in `stream`."""

  def __init__(self, parts, weights):
    """`parts` random access to rows with a `name`; `weights` of the same number."""
    self.parts, self.weights = tuple(parts), tuple(weights)
    self._ends = list(itertools.accumulate(map(len, self.parts)))

  def __len__(self):
    return self._ends[-1]

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    part = int(np.searchsorted(self._ends, index, side="right"))
    return self.parts[part][int(index) - (self._ends[part - 1] if part else 0)]


def open_sources(configs, kind, truths=True, columns=False):
  """Mixture of a list of SourceConfig; ValueError where it is empty or a file cannot be read.

  `kind`, of data, is part of every row's id. `truths` says whether a row without a truth is bad;
  else its "answer" is []. `columns` says whether a row keeps its record's columns.
  """
  if not configs:
    raise ValueError("no data source is given; name files in config.data.files")
  return Mixture([Named(FileSource(config, truths, columns), kind, part)
                  for part, config in enumerate(configs)],
                 [config.weight for config in configs])


def stream(source, *, batch, seed, encode, start, threads, shuffle=True, held=None):
  """Endless batches; batch number n depends on (source, seed, n) alone.

  Each source of a mixture has its own epochs, with every row once an epoch; the order of the
  sources depends on the weights alone. A host reads the rows of each batch that it holds, and all
  hosts together the batch that one host would have. So a run may resume with another number of
  hosts. While a batch is used, the rows of the next one are read.

  Args:
    source: random access to rows (`__len__`, `__getitem__`), or a Mixture.
    batch: rows in a batch, of all hosts together.
    seed: of the shuffle; every epoch has another order.
    encode: function of a row, called in the reading threads; the iterator yields lists of its
      results.
    start: number of the first batch: 0, or the step a run resumes at.
    threads: number of reading threads. Worker processes would change the order, threads do not.
    shuffle: False keeps the order of the sources.
    held: the rows of a batch that are read, numbers from 0 to batch - 1; None is all.
  """
  held = range(batch) if held is None else [int(number) for number in held]
  if batch < 1 or not set(held) <= set(range(batch)):
    raise ValueError(f"held = {list(held)}: the numbers of rows must be between 0 and batch = "
                     f"{batch}, exclusive")
  parts, weights = ((source.parts, source.weights) if isinstance(source, Mixture)
                    else ((source,), (1.0,)))
  if any(len(part) < 1 for part in parts):
    raise ValueError("the data source is empty")
  orders = []
  for number, part in enumerate(parts):
    order = grain.MapDataset.source(part).seed(seed + number)
    orders.append((order.shuffle() if shuffle else order).repeat())
  rows = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)
  if not held:
    return itertools.repeat([])
  options = grain.ReadOptions(num_threads=threads,
                              prefetch_buffer_size=max(2 * threads, len(held)))

  def read(index):
    number, place = divmod(index, len(held))
    return encode(rows[number * batch + held[place]])

  reads = grain.MapDataset.range(len(rows) // batch * len(held)).map(read)
  iterator = iter(reads.to_iter_dataset(options, allow_nones=True))
  iterator.set_state({"next_index": start * len(held)})
  return ([next(iterator) for _ in held] for _ in itertools.count())


def epochs(source, rows):
  """{"data/epoch": epochs} that the first `rows` rows of a stream make, for the metrics.

  Of several sources it is {"data/epoch/0_NAME": epochs}, correct to 1%.
  """
  if not isinstance(source, Mixture) or len(source.parts) == 1:
    return {"data/epoch": rows / len(source)}
  return {f"data/epoch/{number}_{part.name}": rows * weight / sum(source.weights) / len(part)
          for number, (part, weight) in enumerate(zip(source.parts, source.weights, strict=True))}
