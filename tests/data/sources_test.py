import json

import pytest

from ares_jax.data.sources import JsonlSource, stream


def write(path, records):
  path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
  return str(path)


def test_reads_rows_in_the_schema(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  path = write(tmp_path / "d.jsonl", [
    {"problem": "line\u2028break", "answer": "3", "images": ["a.png"]},
    {"id": "mine", "question": "q", "answer": ["4", "four"], "source": "s"}])
  source = JsonlSource.open(path)
  assert len(source) == 2
  assert source[0] == {"id": "d.jsonl:0", "source": "d", "question": "line\u2028break",
                       "answer": "3", "images": [str(tmp_path / "a.png")]}
  assert source[1]["answer"] == ["4", "four"]
  assert source[1]["id"] == "mine" and source[1]["images"] == []


@pytest.mark.parametrize("record, word", [
  ({"answer": "3"}, "question"), ({"question": "q", "answer": " "}, "answer"),
  ({"question": "q", "answer": ["4", ""]}, "answer"), ({"question": "q", "answer": []}, "answer"),
  ({"question": "q", "answer": "1", "images": ["../x.png"]}, "outside"),
  ({"question": "q", "answer": "1", "images": ["/etc/passwd"]}, "outside"),
])
def test_names_a_bad_row(tmp_path, record, word):
  source = JsonlSource.open(write(tmp_path / "d.jsonl", [record]))
  with pytest.raises(ValueError, match=f"d.jsonl:0.*{word}"):
    source[0]


def test_missing_file_is_named():
  with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
    JsonlSource.open("nowhere.jsonl")


def take(count, *, start=0, threads=1, seed=0, size=10, batch=4, shuffle=True):
  batches = stream(list(range(size)), batch=batch, seed=seed, start=start, threads=threads,
                   shuffle=shuffle, collate=lambda rows, number: (number, tuple(rows)))
  return [next(batches) for _ in range(count)]


def test_a_batch_is_a_function_of_seed_and_number():
  batches = take(8)
  assert [number for number, _ in batches] == list(range(8))
  assert take(3, start=5) == batches[5:]
  assert take(8, threads=3) == batches
  assert take(8, seed=1) != batches


def test_every_row_comes_once_an_epoch_and_epochs_differ():
  rows = [row for _, batch in take(10, batch=2) for row in batch]
  assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
  assert rows[:10] != rows[10:]


def test_unshuffled_keeps_the_sources_order():
  assert [rows for _, rows in take(3, shuffle=False)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 0, 1)]
