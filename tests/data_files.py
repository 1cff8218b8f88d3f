"""Small data files in every format that records.py reads, made by the tests."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from array_record.python import array_record_module
from PIL import Image


def png(shade=0, size=(4, 4)):
  file = io.BytesIO()
  Image.fromarray(np.full((*size, 3), shade, np.uint8)).save(file, "PNG")
  return file.getvalue()


def jsonl(path, records):
  path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
  return str(path)


def parquet(path, records, row_group_size=2):
  table = pa.Table.from_pylist(list(records))
  pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
  return str(path)


def saved_by_datasets(folder, records, files=2):
  """A folder as `Dataset.save_to_disk` writes it: Arrow streams and state.json."""
  folder.mkdir()
  names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
  schema = pa.Table.from_pylist(list(records)).schema
  for number, name in enumerate(names):
    part = records[number * len(records) // files : (number + 1) * len(records) // files]
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
      for record in part:
        writer.write_table(pa.Table.from_pylist([record], schema))
  (folder / "state.json").write_text(json.dumps(
    {"_data_files": [{"filename": name} for name in names], "_indices_files": None}))
  return str(folder)


def array_record(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(json.dumps(record).encode())
  writer.close()
  return str(path)
