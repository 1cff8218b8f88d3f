"""Every format holds the same records, whatever its files, groups and batches."""

import concurrent.futures
import io
import json
import math
import os
import pickle
import threading
import time
import types
from unittest import mock

import data_files as files
import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files import formats, group_cache
from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row
from ares_jax.data.files.schema import read_schemas as schemas
from ares_jax.data.images import load_image

RECORDS = [{"problem": f"line\u2028break {number}", "answer": str(number),
            "images": [f"{number}.png"] * (number % 3)} for number in range(7)]


def in_parts(folder, write, suffix):
  folder.mkdir()
  for number, part in enumerate((RECORDS[:4], RECORDS[4:])):
    write(folder / f"train-{number:05d}-of-00002{suffix}", part)
  return str(folder)


FORMATS = {
  ".jsonl": lambda folder: in_parts(folder, files.jsonl, ".jsonl"),
  ".json": lambda folder: in_parts(folder, lambda path, part: path.write_text(json.dumps(part)),
                                   ".json"),
  ".parquet": lambda folder: in_parts(folder, files.parquet, ".parquet"),
  ".arrow": lambda folder: files.saved_by_datasets(folder, RECORDS),
  ".array_record": lambda folder: in_parts(folder, files.array_record, ".array_record"),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_records_come_by_number_and_again_after_pickling(tmp_path, suffix):
  opened = open_records(FORMATS[suffix](tmp_path / "set"))
  assert len(opened) == 7
  order = [6, 0, 3, 4, 1, 5, 2, 3]
  assert [opened[number] for number in order] == [RECORDS[number] for number in order]
  again = pickle.loads(pickle.dumps(opened))
  assert [again[number] for number in order] == [RECORDS[number] for number in order]
  assert opened.location(0).endswith(f"{suffix}:0") and opened.location(6).endswith((":2", ":3"))
  assert str(opened.folder) == str(tmp_path / "set")
  with pytest.raises(IndexError):
    opened[7]


def test_blank_lines_are_skipped(tmp_path):
  (tmp_path / "d.jsonl").write_text('\n{"a": 1}\n   \n\t\r\n{"a":2}\n\n{}\n{"a": 3}')
  opened = open_records(tmp_path / "d.jsonl")
  assert [opened[number] for number in range(len(opened))] == [{"a": 1}, {"a": 2}, {}, {"a": 3}]


def test_a_file_longer_than_one_scan_is_read_completely(tmp_path, monkeypatch):
  path = files.jsonl(tmp_path / "d.jsonl", RECORDS)
  monkeypatch.setattr(formats, "_SCAN_BYTES", 7)
  opened = open_records(path)
  assert [opened[number] for number in range(len(opened))] == RECORDS


def test_row_groups_beyond_the_capacity_are_dropped(tmp_path, monkeypatch):
  held = group_cache.Groups(capacity=3000)
  monkeypatch.setattr(group_cache, "GROUPS", held)
  many = [{"text": f"{number}" * 1000} for number in range(8)]
  opened = open_records(files.parquet(tmp_path / "d.parquet", many, row_group_size=1))
  assert [opened[number] for number in range(8)] == many
  assert 1 <= len(held._tables) <= 3 and opened[0] == many[0]


def test_threads_that_read_groups_stay_within_the_capacity():
  held, most, begin = group_cache.Groups(capacity=100), [], threading.Barrier(4)

  def load():
    kept = sum(table.nbytes for table in held._tables.values())
    most.append(kept + held._reading)
    time.sleep(0.01)  # the others come while this one reads
    return types.SimpleNamespace(nbytes=40)

  def read(number):
    begin.wait()
    return held.read(number, 40, load)

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    assert [table.nbytes for table in threads.map(read, range(4))] == [40] * 4
  assert len(most) == 4 and max(most) <= 100 and len(held._tables) == 2
  with pytest.raises(OSError, match="gone"):
    held.read("x", 1000, mock.Mock(side_effect=OSError("gone")))
  assert held.read("y", 1000, lambda: types.SimpleNamespace(nbytes=1000)).nbytes == 1000
  assert list(held._tables) == ["y"]


def test_a_split_is_a_folder_or_the_beginning_of_names(tmp_path):
  for name in ("train-0.parquet", "test-0.parquet", "training.parquet"):
    files.parquet(tmp_path / name, [{"name": name}])
  (tmp_path / "README.md").write_text("no data")
  assert [open_records(tmp_path, "train")[0], len(open_records(tmp_path))] == [
    {"name": "train-0.parquet"}, 3]
  hub = tmp_path / "hub"
  (hub / "data").mkdir(parents=True)
  files.parquet(hub / "data" / "test-0.parquet", [{"name": "hub"}])
  assert open_records(hub, "test")[0] == {"name": "hub"}
  saved = tmp_path / "saved"
  saved.mkdir()
  (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
  files.saved_by_datasets(saved / "train", RECORDS)
  assert len(open_records(saved, "train")) == 7
  with pytest.raises(ValueError, match="has the splits train; split is 'test'"):
    open_records(saved, "test")
  files.parquet(tmp_path / "geo_train.parquet", [{"name": "one"}])
  for name in ("train-0", "geo_train"):
    assert len(open_records(tmp_path / f"{name}.parquet", "train")) == 1
  assert len(open_records(saved / "train", "train")) == 7  # its state names no split
  state = saved / "train" / "state.json"
  state.write_text(json.dumps(json.loads(state.read_text()) | {"_split": "test"}))
  for whole in (tmp_path / "test-0.parquet", saved / "train"):
    with pytest.raises(ValueError, match="is not divided into splits, and its name has no 'train'"):
      open_records(whole, "train")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
    open_records("nowhere.jsonl")
  with pytest.raises(ValueError, match="neither a .jsonl, .* nor a folder of them.*'train'"):
    open_records(tmp_path, "train")
  (tmp_path / "d.txt").write_text("a,b")
  with pytest.raises(ValueError, match="d.txt is not one of .jsonl"):
    open_records(tmp_path / "d.txt")
  (tmp_path / "d.jsonl").write_text('{"a": 1}\n{"a": \n[1, 2]\n' + "[" * 200_000 + "\n")
  opened = open_records(tmp_path / "d.jsonl")
  for number, word in ((1, "Expecting value"), (2, "a JSON object is needed"), (3, "recursion")):
    with pytest.raises(BadRow, match=f"row d.jsonl:{number}: .*{word}"):
      opened[number]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "d.jsonl")
  for path in (tmp_path, tmp_path / "d.jsonl"):
    with pytest.raises(ValueError, match="d.jsonl is no regular file"):
      open_records(path)


def test_files_are_joined_by_the_keys_of_their_objects(tmp_path):
  (tmp_path / "a.json").write_text('{"1": {"answer": "x"}, "2": {"answer": "y"}}')
  (tmp_path / "query.json").write_text('{"2": "Why?", "1": "How?", "3": "Who?"}')
  opened = open_records(tmp_path / "a.json", join=[tmp_path / "query.json"])
  assert [opened[number] for number in range(len(opened))] == [
    {"_key": "1", "answer": "x", "query": "How?"}, {"_key": "2", "answer": "y", "query": "Why?"}]
  assert [file.name for file in opened.files] == ["a.json", "query.json"]
  assert opened.location(1) == "a.json:1" and opened.folder == epath.Path(tmp_path)


def test_files_are_joined_by_a_column(tmp_path):
  files.jsonl(tmp_path / "a.jsonl", [{"id": 2, "q": "Why?"}, {"id": 1, "q": "How?"}, {"id": 9},
                                     {"id": 3, "q": "Who?"}])
  files.parquet(tmp_path / "b.parquet", [
    {"id": "1", "image": "x", "q": None}, {"id": "2", "image": "y", "q": "Why?"},
    {"id": "3", "image": "z", "q": "Where?"}])
  opened = open_records(tmp_path / "a.jsonl", join=[tmp_path / "b.parquet"], key="id", images="/i")
  assert [opened[0]["image"], opened[0]["q"], opened[1]["image"]] == ["y", "Why?", "x"]
  assert str(opened.folder) == "/i"
  with pytest.raises(BadRow, match="row a.jsonl:2: b.parquet has no record whose 'id' is 9"):
    opened[2]
  with pytest.raises(BadRow, match="row a.jsonl:3: its column 'q' is 'Who.' here and 'Where.'"):
    opened[3]
  for text, word in (('{"id": 1}\n{"id": 1}\n', "record 1: 'id' is 1, twice"),
                     ('{"q": 1}\n', "record 0: 'id' is None, missing")):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"c.jsonl, {word}"):
      open_records(tmp_path / "a.jsonl", join=[tmp_path / "c.jsonl"], key="id")


def test_cloud_paths_are_read_through_epath(tmp_path):
  files.parquet(tmp_path / "d.parquet", RECORDS)
  files.jsonl(tmp_path / "d.jsonl", RECORDS)
  write_arrow(tmp_path / "d.arrow", pa.Table.from_pylist(RECORDS), "new_stream", rows=7)

  def local(path):
    return str(path).replace("gs://bucket", str(tmp_path)).replace("/gs/bucket", str(tmp_path))

  with epath.testing.mock_epath(
      exists=lambda original, path: original(local(path)),
      isdir=lambda original, path: original(local(path)),
      open=lambda original, path, mode: original(local(path), mode)):
    for name in ("d.parquet", "d.jsonl", "d.arrow"):
      opened = open_records(f"gs://bucket/{name}")
      assert opened[5] == RECORDS[5] and str(opened.folder) == "gs://bucket"
    row = read_row(schemas()["easyr1"], RECORDS[1], location="", name="",
                   folder=opened.folder)
    assert row["images"] == ["gs://bucket/1.png"]
    (tmp_path / "1.png").write_bytes(files.png(7, (28, 56)))
    pixels = load_image(row["images"][0], min_pixels=1, max_pixels=10**6)
    assert pixels.shape == (28, 56, 3) and (pixels == 7).all()


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_remote_arrow_is_read_batch_by_batch(tmp_path, monkeypatch, form):
  path = write_arrow(tmp_path / "d.arrow", pa.Table.from_pylist(RECORDS), form, rows=3)
  monkeypatch.setattr(group_cache, "GROUPS", group_cache.Groups(capacity=1))  # holds the last alone
  opened = formats.RemoteArrow(path)
  for reader in (opened, pickle.loads(pickle.dumps(opened))):
    assert len(reader) == 7
    assert [reader[number] for number in (6, 0, 3, 5, 2)] == [
      RECORDS[number] for number in (6, 0, 3, 5, 2)]
  assert len(group_cache.GROUPS._tables) == 1


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_opening_remote_arrow_holds_one_batch_at_a_time(tmp_path, form):
  table = pa.table({"text": ["x" * 10_000] * 400})
  path = write_arrow(tmp_path / "d.arrow", table, form, rows=10)
  before = pa.total_allocated_bytes()
  most = []

  class File(io.FileIO):
    def read(self, size=-1):
      most.append(pa.total_allocated_bytes() - before)
      assert size < 200_000
      return super().read(size)

  opened = formats.RemoteArrow(mock.Mock(open=lambda mode: File(path, mode)))
  assert len(opened) == 400 and opened[399] == {"text": "x" * 10_000}
  assert max(most) < 500_000


def test_a_remote_file_that_is_not_arrow_is_named(tmp_path):
  path = epath.Path(tmp_path / "d.arrow")
  path.write_bytes(b"0123456789abcdef")
  with pytest.raises(ValueError, match="d.arrow is not an Arrow stream or file"):
    formats.RemoteArrow(path)
  path.write_bytes(b"")
  with pytest.raises(ValueError, match="d.arrow is not .*: it is empty"):
    formats.RemoteArrow(path)
  write_arrow(path, pa.Table.from_pylist(RECORDS), "new_stream", rows=3)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match="d.arrow is not .*: Expected"):
    formats.RemoteArrow(path)
  write_arrow(path, pa.table({"a": pa.array(["a", "b"]).dictionary_encode()}), "new_stream", rows=2)
  with pytest.raises(ValueError, match="has dictionary columns; save it as parquet"):
    formats.RemoteArrow(path)


def write(path, table):
  """Writes a file of the format that its name says; returns an epath.Path."""
  if path.suffix == ".parquet":
    pyarrow.parquet.write_table(table, path)
    return epath.Path(path)
  return write_arrow(path, table, "new_stream", rows=7)


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_floats_of_few_bits_are_read_with_the_digits_that_they_tell(tmp_path, name):
  short, half = pa.float32(), pa.float16()
  opened = open_records(write(tmp_path / name, pa.table({
    "a": pa.array([0.1, None], short), "b": pa.array([0.1, math.inf], half),
    "c": pa.array([[3.3, None], []], pa.list_(short)),
    "d": pa.array([{"x": 0.7, "y": b"\xff"}, None], pa.struct([("x", short), ("y", pa.binary())])),
    "e": [1 / 3, 2.5], "f": pa.array([{"x": 0.1}, None], pa.map_(pa.string(), short))})))
  assert opened[0] == {"a": 0.1, "b": 0.1, "c": [3.3, None], "d": {"x": 0.7, "y": b"\xff"},
                       "e": 1 / 3, "f": [("x", 0.1)]}
  assert opened[1] == {"a": None, "b": math.inf, "c": [], "d": None, "e": 2.5,
                       "f": None}


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_a_damaged_or_ambiguous_file_is_named(tmp_path, name):
  twice = pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"])], ["answer", "answer"])
  path = write(tmp_path / name, twice)
  for content in (path.read_bytes(), b"", b"a,b\n1,2\n"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}(: two columns have the same|.* cannot be read)"):
      open_records(path)


def test_damage_inside_of_a_file_names_it(tmp_path):
  path = write(tmp_path / "d.parquet", pa.table({"a": [f"{n} {'x' * 50}" for n in range(3000)]}))
  damaged = bytearray(path.read_bytes())
  damaged[200:400] = b"\xff" * 200
  path.write_bytes(bytes(damaged))
  with pytest.raises(OSError, match="d.parquet, group 0 of records cannot be read: Corrupt"):
    open_records(path)[0]


def write_arrow(path, table, form, *, rows):
  """Writes record batches of `rows` rows; returns an epath.Path."""
  with pa.OSFile(str(path), "wb") as file, getattr(pa.ipc, form)(file, table.schema) as writer:
    writer.write_table(table, max_chunksize=rows)
  return epath.Path(path)
