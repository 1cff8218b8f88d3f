"""Reads the published files of benchmarks as rows, by the schemas of benchmarks.json.

A row is that of data/sources.py with these fields:
  answer     list of accepted truths, for example the letter and the text of an option
  level      str or None, difficulty
  group      str or None, the same for all variants of a problem
  step       str or None, WeMath's part of a problem
  tolerance  float, the largest difference of a right number to the truth; 0 if the data name none
"""

import dataclasses

from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row, read_schemas
from ares_jax.system.config import suggest

METRICS = ("pass@1", "avg@n", "worst", "strict")


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Problems and how the answers to them are scored."""

  name: str
  rows: list
  metric: str  # one of METRICS, see scores.unit_values
  n: int  # samples a problem; a single one is greedy


def benchmark_schemas():
  """{name: schema} of benchmarks.json, which explains its own keys."""
  return read_schemas("evaluation/benchmarks.json")


def open_benchmark(name, path):
  """Reads the Benchmark `name` of benchmarks.json; "generic" is for a file of one's own.

  `path` is a file or folder that data/files/records.py reads, for example of .jsonl or .parquet.

  Raises:
    ValueError: no such benchmark or file, or a row lacks a column; names the row and the columns.
  """
  if name not in benchmark_schemas():
    raise ValueError(f"there is no benchmark {name!r}{suggest(name, list(benchmark_schemas()))}")
  schema, parts = benchmark_schemas()[name], []
  for each in schema.get("each", [""]):
    parts.append(schema | {"columns": {
      field: [column.replace("{each}", each) for column in columns]
      for field, columns in schema["columns"].items()}})
  records, rows, seen = open_records(path), [], {}
  for number in range(len(records)):
    record = records[number]
    if all(record.get(key) == value for key, value in schema.get("where", {}).items()):
      for part in parts:
        row = read_row(part, record, location=records.location(number), name=name,
                       folder=records.folder)
        # Variants of a problem, and several questions about one image, have the same id.
        seen[row["id"]] = seen.get(row["id"], 0) + 1
        if seen[row["id"]] > 1:
          row["id"] += f"#{seen[row['id']]}"
        rows.append(row)
  if not rows:
    raise ValueError(f"{path} has no rows of {name!r}"
                     + (f" where {schema['where']}" if "where" in schema else ""))
  return Benchmark(name, rows, schema["metric"], schema["n"])
