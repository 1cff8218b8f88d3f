import data_files as files
import numpy as np
import pytest

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.records import open_records
from ares_jax.data.files.schema import read_row, read_schemas
from ares_jax.data.sources import FileSource, SourceConfig, stream
from ares_jax.data.write_tfds import build


def source(path, split=""):
  return FileSource(SourceConfig(str(path), "plain", split, 1.0))


def test_a_written_set_gives_the_same_rows_by_number(tmp_path):
  (tmp_path / "a.png").write_bytes(files.png(7))
  records = [{"question": f"<image> {number}", "answer": ["3", "drei"], "level": number,
              "group": f"g{number // 2}", "images": ["a.png"] * (number % 3),
              "pass_rate": number / 8,
              "responses": ["x", "y\u2028"][: 1 + number % 2]}
             for number in range(5)]
  before = source(files.jsonl(tmp_path / "d.jsonl", records))
  folder = build(before, str(tmp_path / "out"), "2.1.0")
  assert folder == str(tmp_path / "out" / "ares" / "2.1.0")
  after = source(folder)
  assert len(after) == 5 and after.location(3) == "all:3"
  for number in (4, 0, 3, 1, 2):
    assert after[number] == before[number] | {"images": [files.png(7)] * (number % 3)}
  batch = next(stream(after, batch=5, seed=0, start=0, threads=1, encode=lambda row: row))
  assert sorted(row["id"] for row in batch) == [f"d.jsonl:{number}" for number in range(5)]
  with pytest.raises(ValueError, match="has the splits train and cannot be read by number"):
    open_records(folder, "test")


def test_options_are_written_once(tmp_path):
  before = source(files.jsonl(tmp_path / "d.jsonl", [
    {"question": "q", "answer": "B", "options": ["one", "two"]}, {"question": "r", "answer": "3"}]))
  after = source(build(before, str(tmp_path / "out"), "1.0.0"))
  assert [after[number] for number in (0, 1)] == [before[number] for number in (0, 1)]
  assert after[0]["options"] == ["one", "two"] and after[0]["question"] == "q\nA. one\nB. two"


def test_turns_before_a_question_are_refused(tmp_path):
  config = SourceConfig(files.jsonl(tmp_path / "d.jsonl", [{"messages": [
    {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
    {"role": "assistant", "content": "\\boxed{3}"}]}]), "sharegpt", "", 1.0)
  with pytest.raises(ValueError, match="row d.jsonl:0 has turns before its question"):
    build(FileSource(config), str(tmp_path / "out"), "1.0.0")


def test_pixels_of_a_tfds_image_are_read_as_an_image(tmp_path):
  pixels = np.zeros((4, 4, 3), np.uint8)
  record = {"question": b"q", "answer": b"1", "image": pixels}
  row = read_row(read_schemas()["plain"], record, location="train:0", name="set",
                 folder=tmp_path)
  assert row["images"] == [pixels] and (row["question"], row["answer"]) == ("q", ["1"])


def test_a_bad_row_stops_the_build(tmp_path):
  records = [{"question": "q", "answer": "1"}, {"question": "q"}]
  with pytest.raises(BadRow, match="row d.jsonl:1: the answer is None"):
    build(source(files.jsonl(tmp_path / "d.jsonl", records)), str(tmp_path / "out"), "1.0.0")


def test_a_field_that_the_first_row_lacks_is_not_left_out(tmp_path):
  records = [{"question": "q", "answer": "1"}, {"question": "q", "answer": "1", "level": "2"}]
  with pytest.raises(ValueError, match="row d.jsonl:1 has level, which the first row lacks"):
    build(source(files.jsonl(tmp_path / "d.jsonl", records)), str(tmp_path / "out"), "1.0.0")
