import json
import pathlib
import re
import subprocess
import sys
import time

import data_files as files
import numpy as np
import pytest
from public import public

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.schema import read_schemas
from ares_jax.data.sources import FileSource, Mixture, SourceConfig, epochs, open_sources, stream
from ares_jax.system.config import ConfigError, build

DATA_MD = pathlib.Path(__file__).parents[2] / "docs" / "data.md"


def config(path, schema="plain", weight=1.0, split="", **more):
  values = dict(path=str(path), schema=schema, split=split, weight=weight, **more)
  return build(SourceConfig, values, "config.data.files.rl[0]")


def examples():
  """(schema, record) of every example line of docs/data.md."""
  found, name, text = [], None, ""
  for line in DATA_MD.read_text(encoding="utf-8").splitlines():
    if named := re.match(r"(\w+) .*?({.*)$", line):
      name, text = named[1], named[2]
    elif name and line.startswith("  "):
      text += line
    else:
      name = None
    try:
      found.append((name, json.loads(text)))
      name, text = None, ""
    except ValueError:
      continue
  return found


EXAMPLES = examples()


def test_the_page_on_data_shows_every_schema():
  shown = {name for name, _ in EXAMPLES} | {"ares_hard_validation"}  # which says: as easyr1
  assert shown == set(read_schemas())


@pytest.mark.parametrize("write", [files.jsonl, files.parquet], ids=["jsonl", "parquet"])
@pytest.mark.parametrize("schema, record", [*EXAMPLES, ("ares_hard_validation", EXAMPLES[1][1])],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_reads_a_line_of_every_schema(tmp_path, schema, record, write):
  path = tmp_path / f"set.{write.__name__}"
  row = FileSource(config(write(path, [record]), schema))[0]
  assert "How many?" in row["question"] or "Find" in row["question"]
  assert row["answer"] == (["3", "three"] if schema == "plain" else ["3"])
  assert len(row["images"]) == row["question"].count("<image>")
  for image in row["images"]:
    inside = str(tmp_path / ("images/a.png" if schema == "virl39k" else "a.png"))
    assert image == inside or schema == "geometry3k" and image in (b"\x89PN", "base64,iVBO...")
  assert row.get("response", "<think>I count.</think> \\boxed{3}").endswith("\\boxed{3}")
  assert ("response" in row) == (schema in ("sharegpt", "ares_coldstart"))
  assert row["source"] == record.get("source", record.get("data_source", record.get("type", "set")))
  assert row["id"] == record.get("qid", f"{path.name}:0")


def test_a_source_names_its_columns(tmp_path):
  path = files.jsonl(tmp_path / "d.jsonl", [
    {"Body": "A bag has 3 cells.", "Question": "How many?", "Answer": 3.0, "A": "2", "B": "3",
     "meta": {"kind": "count", "seed": 7, "tags": ["easy", "new"]}, "pics": ["a.png"],
     "pic2": "b.png"},
    {"Body": None, "Question": "Why?", "Answer": "B", "A": "up", "B": "down",
     "pics": [], "meta": {}}])
  columns = dict(question=("Body", "Question"), answer="Answer", options=["A", "B"],
                 level="meta.tags.0", group="meta.seed", source=("meta.kind", "meta.tags.1"),
                 images=("pics", "pic2"))
  source = FileSource(config(path, columns=columns, images=str(tmp_path / "pictures")))
  assert source[0] == {
    "id": "d.jsonl:0", "source": "count/new", "level": "easy", "group": "7", "step": None,
    "question": "A bag has 3 cells.\nHow many?\nA. 2\nB. 3", "answer": ["3.0"],
    "options": ["2", "3"], "tolerance": 0.0,
    "images": [str(tmp_path / "pictures" / name) for name in ("a.png", "b.png")],
    "left_out": []}
  assert source[1]["question"] == "Why?\nA. up\nB. down" and source[1]["answer"] == ["B", "down"]
  assert source[1]["source"] == "d"


def test_a_gap_between_the_columns_of_options_is_a_bad_row(tmp_path):
  (tmp_path / "d.csv").write_text("question,A,B,C,answer\nq,up,down,,B\nq,,,,5\nq,up,,left,C\n")
  source = FileSource(config(str(tmp_path / "d.csv"), columns=dict(options=("A", "B", "C"))))
  assert source[0]["options"] == ["up", "down"] and source[0]["answer"] == ["B", "down"]
  assert source[1]["options"] == [] and source[1]["answer"] == ["5"]
  with pytest.raises(BadRow, match="the option is None"):
    source[2]


def test_a_row_names_the_group_of_its_variants(tmp_path):
  path = files.jsonl(tmp_path / "d.jsonl", [{"question": "q", "answer": "3", "group": "bags"}])
  row = FileSource(config(path))[0]
  assert row["group"] == "bags" and row["left_out"] == []


def test_a_column_that_no_record_has_is_an_error(tmp_path):
  path = files.jsonl(tmp_path / "d.jsonl", [{"question": "q", "answer": "3", "images": []}])
  with pytest.raises(ValueError, match="no column 'imgs', which columns names; did you mean 'imag"):
    FileSource(config(path, columns=dict(images="imgs")))
  with pytest.raises(ConfigError, match="columns.awnser is not a field.*did you mean 'answer'"):
    config(path, columns=dict(awnser="answer"))


def test_published_files_are_read_by_their_columns_and_joined_by_id():
  source = FileSource(config(public("svamp") / "SVAMP.json", columns=dict(
    id="ID", question=("Body", "Question"), answer="Answer", source="Type")))
  assert len(source) == 1000 and source[0]["answer"] == ["51.0"]
  assert source[0]["question"].startswith("Each pack of dvds costs 76 dollars. If there is a")
  assert source[0]["question"].endswith("\nHow much do you have to pay to buy each pack?")
  folder = public("mathvista")
  source = FileSource(config(
    folder / "testmini.json", join=[str(folder / "query_testmini.json")],
    columns=dict(id="pid", question="query_testmini")))
  assert len(source) == 1000
  assert all(source[number]["question"].startswith("Hint:") for number in range(1000))
  folder = public("charxiv")
  source = FileSource(config(
    folder / "reasoning_val.json", join=[str(folder / "image_metadata_val.json")],
    columns=dict(id="figure_id", question="query", images="figure_path", source="category")))
  assert len(source) == 1000 and source[0]["source"] == "cs"
  assert source[0]["images"][0].endswith("figures/overall3.jpg")


def test_images_may_be_named_by_number(tmp_path):
  (tmp_path / "7.png").write_bytes(files.png())
  path = files.jsonl(tmp_path / "d.jsonl", [
    {"question": "Which line?", "answer": "1", "figure_id": number} for number in (7, 8)])
  with pytest.raises(BadRow, match=r"the column 'figure_id' looks like images; name it: "):
    FileSource(config(path))[0]
  source = FileSource(config(path, columns=dict(images="figure_id")))
  assert source[0]["images"] == [str(tmp_path / "7.png")]
  with pytest.raises(BadRow, match="has no file 8.jpg, .png, .jpeg or .webp; name") as raised:
    source[1]
  assert raised.value.code == "image_missing"


def test_images_are_in_the_record_or_in_files(tmp_path):
  data = files.png()
  path = files.parquet(tmp_path / "d.parquet", [
    {"problem": "<image><image>", "answer": "1",
     "images": [{"bytes": data, "path": "x.png"}, {"bytes": None, "path": "y.png"}]}])
  assert FileSource(config(path, "easyr1"))[0]["images"] == [data, str(tmp_path / "y.png")]


@pytest.mark.parametrize("schema, record, code, words", [
  ("plain", {"answer": "3"}, "question", "has none of the columns"),
  ("plain", {"question": " ", "answer": "3"}, "question", "is empty"),
  ("plain", {"question": "q", "answer": " "}, "answer", "a truth is needed"),
  ("plain", {"question": "q", "answer": ["4", ""]}, "answer", "a truth is needed"),
  ("plain", {"question": "q", "answer": []}, "answer", "a truth is needed"),
  ("plain", {"question": "q", "answer": "1", "images": ["../x.png"]}, "image", "outside"),
  ("plain", {"question": "q", "answer": "1", "images": ["/etc/passwd"]}, "image", "outside"),
  ("plain", {"question": "q", "answer": "1", "images": [{"bytes": None, "path": None}]},
   "image_missing", "an image is {'bytes': None, 'path': None}"),
  ("plain", {"question": "q", "answer": "1", "options": "[1, "}, "question", "SyntaxError"),
  ("virl39k", {"question": "q", "answer": "\\boxed{3", "image": ["a.png"]}, "answer",
   "with matching braces"),
  ("math", {"problem": "q", "solution": "It is 3."}, "answer", "has no"),
  ("gsm8k", {"question": "q", "answer": "It is 3."}, None, ""),
])
def test_names_a_bad_row(tmp_path, schema, record, code, words):
  source = FileSource(config(files.jsonl(tmp_path / "d.jsonl", [record]), schema))
  if code is None:
    assert source[0]["answer"] == ["It is 3."]
    return
  with pytest.raises(BadRow, match=f"row d.jsonl:0: .*{words}") as error:
    source[0]
  assert error.value.code == code


@pytest.mark.parametrize("record", [
  '{"question": "half \\ud800", "answer": "3"}',
  '{"question": "whole", "answer": "3", "responses": ["half \\ud800"]}'])
def test_half_a_surrogate_pair_is_refused(tmp_path, record):
  (tmp_path / "d.jsonl").write_text(record + "\n")
  with pytest.raises(BadRow, match="row d.jsonl:0: .*UnicodeEncodeError"):
    FileSource(config(tmp_path / "d.jsonl"))[0]


def test_a_source_without_rows_is_named(tmp_path):
  (tmp_path / "d.jsonl").write_text("\n")
  with pytest.raises(ValueError, match="d.jsonl has no rows"):
    open_sources([config(tmp_path / "d.jsonl")], "rl")
  with pytest.raises(ValueError, match="no data source is given"):
    open_sources([], "rl")


class Numbers(list):
  """Rows that are their numbers."""

  def __init__(self, size, name="numbers"):
    super().__init__((name, number) for number in range(size))
    self.name = name


def take(count, source=None, *, start=0, threads=1, seed=0, size=10, batch=4, **kwargs):
  batches = stream(source or list(range(size)), batch=batch, seed=seed, start=start,
                   threads=threads, encode=lambda row: row, **kwargs)
  return [(start + number, tuple(next(batches))) for number in range(count)]


MIXED = Mixture([Numbers(7, "a"), Numbers(3, "b")], [3.0, 1.0])


def test_a_batch_is_a_function_of_seed_and_number():
  batches = take(5)
  assert [number for number, _ in batches] == list(range(5))
  assert take(2, start=3) == batches[3:]
  assert take(5, threads=3) == batches
  assert take(5, seed=1) != batches


def test_a_stream_resumes_exactly_at_any_batch():
  complete = take(30, MIXED, threads=2)  # 12 epochs of one source, 10 of the other
  for cut in np.random.default_rng(0).integers(0, 29, 20):
    assert take(2, MIXED, start=int(cut)) == complete[cut : cut + 2]


def test_every_row_comes_once_an_epoch_and_epochs_differ():
  rows = [row for _, batch in take(2, batch=10) for row in batch]
  assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
  assert rows[:10] != rows[10:]


def test_an_unshuffled_stream_keeps_the_order_of_the_source():
  assert [rows for _, rows in take(3, shuffle=False)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 0, 1)]


def test_sources_are_mixed_by_weight_and_each_has_complete_epochs():
  rows = [row for _, batch in take(3, MIXED, batch=28) for row in batch]
  by_name = {name: [number for source, number in rows if source == name] for name in "ab"}
  assert [len(by_name[name]) for name in "ab"] == [63, 21]
  for name, size in (("a", 7), ("b", 3)):
    for start in range(0, len(by_name[name]), size):
      assert sorted(by_name[name][start : start + size]) == list(range(size))
  # No run of one source is longer than its weight says.
  assert "bb" not in "".join(source for source, _ in rows)
  assert epochs(MIXED, 84) == {"data/epoch/0_a": 9.0, "data/epoch/1_b": 7.0}
  assert epochs(range(10), 25) == {"data/epoch": 2.5}
  assert [MIXED[number] for number in (0, 6, 7, 9)] == [("a", 0), ("a", 6), ("b", 0), ("b", 2)]


@pytest.mark.parametrize("source", [None, MIXED], ids=["one", "mixed"])
def test_shares_together_are_the_batch_of_one_process(source):
  complete = [row for _, batch in take(2, source, batch=20) for row in batch]
  for held in ([range(10), range(10, 20)], [[0, 3, 7], [1, 2, 4, 5, 6], range(8, 20)]):
    for share in held:
      found = [row for _, batch in take(2, source, batch=20, held=share) for row in batch]
      assert found == [complete[start + row] for start in (0, 20) for row in share]
      assert take(1, source, batch=20, held=share, start=1)[0][1] == tuple(found[len(share):])
  assert take(2, source, batch=20, held=[]) == [(0, ()), (1, ())]
  if source is None:
    assert sorted(complete[:10]) == sorted(complete[10:20]) == list(range(10))
  # Saved with two hosts, resumed with one.
  assert take(1, source, start=1, batch=20)[0][1] == tuple(complete[20:])


def test_two_processes_split_every_epoch_of_files_mixed_by_weight(tmp_path):
  text, pictures = (str(tmp_path / name) for name in ("d.jsonl", "d.parquet"))
  files.jsonl(tmp_path / "d.jsonl", [
    {"question": f"How many? {number}", "answer": "#### 3"} for number in range(12)])
  files.parquet(tmp_path / "d.parquet", [
    {"problem": f"<image>Find {number}.", "answer": "3",
     "images": [{"bytes": files.png(number), "path": None}]} for number in range(4)])
  program = f"""if True:
    import json, sys
    from ares_jax.data.sources import SourceConfig, open_sources, stream
    mixture = open_sources([SourceConfig({text!r}, "gsm8k", "", 3.0),
                            SourceConfig({pictures!r}, "geometry3k", "", 1.0)], "rl")
    batches = stream(mixture, batch=8, seed=0, start=0, threads=2,
                     held=range(int(sys.argv[1]), 8, 2),
                     encode=lambda row: row["id"].partition(" ")[0])
    print(json.dumps([next(batches) for _ in range(4)]))
  """
  processes = [subprocess.Popen(
    [sys.executable, "-c", program, str(host)], cwd=pathlib.Path(__file__).parents[2],
    stdout=subprocess.PIPE, text=True) for host in range(2)]
  found = [json.loads(process.communicate()[0]) for process in processes]
  assert all(len(batch) == 4 for batches in found for batch in batches)
  every = sorted([f"d.jsonl:{number}" for number in range(12)]
                 + [f"d.parquet:{number}" for number in range(4)])
  epochs_of_rows = [sorted(row for host in found for batch in host[start : start + 2]
                           for row in batch) for start in (0, 2)]
  assert epochs_of_rows == [every, every]
  assert not set(sum(found[0][:2], [])) & set(sum(found[1][:2], []))


@pytest.mark.parametrize("held", [[4], [0, -1]])
def test_rows_that_no_batch_has_are_refused(held):
  with pytest.raises(ValueError, match=re.escape(f"held = {held}") + ".*batch = 4"):
    take(1, held=held)


def test_no_more_than_the_next_batch_is_read_ahead():
  read = []
  batches = stream(range(1000), batch=50, seed=0, start=0, threads=1, encode=read.append)
  next(batches)
  time.sleep(0.1)
  assert 50 <= len(read) <= 102
