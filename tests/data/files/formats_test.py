"""Text files as people write them: each is read, or refused with its name."""

import json

import pytest
from etils import epath

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.records import open_records

ROWS = [{"a": "1", "b": "x"}, {"a": "2", "b": "y\u2028z"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(folder, name, text):
  path = epath.Path(folder / name)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  opened = open_records(path)
  return [opened[number] for number in range(len(opened))]


@pytest.mark.parametrize("text", [
  LINES, LINES.encode("utf-8-sig"), "\n" + LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1),
  json.dumps(ROWS).encode("utf-8-sig"), json.dumps({"version": "1", "examples": ROWS})])
def test_json_is_a_list_or_an_object_a_line(tmp_path, text):
  assert read(tmp_path, "d.json", text) == ROWS
  if b"version" not in (text if isinstance(text, bytes) else text.encode()):
    assert read(tmp_path, "d.jsonl", text) == ROWS


def test_the_keys_of_an_object_of_records_become_a_column(tmp_path):
  for indent in (None, 1):
    assert read(tmp_path, "d.json", json.dumps({"7": ROWS[0], "9": ROWS[1]}, indent=indent)) == [
      {"_key": "7"} | ROWS[0], {"_key": "9"} | ROWS[1]]


@pytest.mark.parametrize("name, separator", [("d.csv", ","), ("d.tsv", "\t")])
def test_the_first_line_of_a_table_names_its_columns(tmp_path, name, separator):
  lines = [["question", " answer"], ['"a, \t""b""\nc"', "03"], ["q", ""]]
  text = "\r\n".join(separator.join(line) for line in lines).encode("utf-8-sig")
  assert read(tmp_path, name, text) == [
    {"question": 'a, \t"b"\nc', "answer": "03"}, {"question": "q", "answer": None}]


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
  (tmp_path / "d.jsonl").write_text(LINES)
  (tmp_path / "._d.jsonl").write_bytes(b"\0\5\x16")
  (tmp_path / ".d.jsonl").write_text(LINES)
  assert len(open_records(tmp_path)) == 2


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_infos.json"])
def test_what_hugging_face_writes_about_data_is_no_data(tmp_path, name):
  (tmp_path / name).write_text('{"default": {"description": ""}}')
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "d.jsonl").write_text(LINES)
  assert len(open_records(tmp_path)) == 2


def test_tables_count_in_a_folder_that_has_no_other_data(tmp_path):
  (tmp_path / "d.csv").write_text("a\n1\n")
  assert open_records(tmp_path)[0] == {"a": "1"}
  (tmp_path / "d.jsonl").write_text(LINES)
  assert len(open_records(tmp_path)) == 2


@pytest.mark.parametrize("name, text, words", [
  ("d.json", '{"a": 1', "cannot be read as JSON: .*line 1"),
  ("d.json", '{"a": "text"}', "does not hold a list of JSON objects"),
  ("d.json", "[1, 2]", "does not hold a list of JSON objects"),
  ("d.json", '{"1": {}, "1": {}}', "the key '1' occurs twice"),
  ("d.json", "[" * 200_000, "cannot be read as JSON: .*recursion"),
  ("d.json", "[]".encode("utf-16"), "cannot be read as JSON: .*utf-8"),
  ("d.csv", "a,b\n1,2,3\n", "record 0 has 3 cells, the first line names 2"),
  ("d.csv", "a,a\n1,2\n", "two columns have the same name"),
  ("d.csv", b"a,b\n\xff,2\n", "cannot be read as .csv: .*utf-8"),
])
def test_a_text_file_that_cannot_be_read_is_named(tmp_path, name, text, words):
  with pytest.raises(ValueError, match=f"(?s){name}.*{words}"):
    read(tmp_path, name, text)


def test_a_key_that_occurs_twice_is_a_bad_row(tmp_path):
  with pytest.raises(BadRow, match="row d.jsonl:0: .*the key 'answer' occurs twice"):
    read(tmp_path, "d.jsonl", '{"answer": "3", "answer": "4"}\n{}\n')
