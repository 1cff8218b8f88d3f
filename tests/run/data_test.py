"""Bad rows: named by default, quarantined and counted when they are to be skipped."""

import collections
import json
import types

import data_files as files
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from ares_jax.data import digits
from ares_jax.data.bad_row import CODES, BadRow
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.grading import pool as pool_lib
from ares_jax.run import config as run_config
from ares_jax.run import data as data_lib

TOKENIZER = digits.tokenizer()
CHAT = Chat(TOKENIZER, "", TOKENIZER.convert_tokens_to_ids("<|image_pad|>"))
PROMPT = PromptConfig("", (40,), (4,), 28 * 28, 56 * 56)
ENCODER = Encoder(CHAT, PROMPT, window=28, patch=14, merge=2)
# What a record is made of, and the code of the fault that it has.
RECORDS = {
  "good": ({"question": "<image>Compute red, modulo 10", "answer": "3", "images": ["a.png"]}, None),
  "text": ({"question": "Compute red, modulo 10", "answer": ["3", "three"]}, None),
  "missing": ({"question": "q", "answer": "3", "images": ["b.png"]}, "image_missing"),
  "broken": ({"question": "q", "answer": "3", "images": ["broken.png"]}, "image"),
  "outside": ({"question": "q", "answer": "3", "images": ["../a.png"]}, "image"),
  "empty": ({"question": " ", "answer": "3"}, "question"),
  "no_answer": ({"question": "q"}, "answer"),
  "marks": ({"question": "<image><image>q", "answer": "3", "images": ["a.png"]}, "marks"),
  "long": ({"question": "red " * 60, "answer": "3"}, "length"),
  "truth": ({"question": "q", "answer": "\\frac{1}{2"}, "truth"),
  "no_json": (None, "record"),
}


def write(folder, kinds, name="d.jsonl"):
  (folder / "a.png").write_bytes(files.png(7, (28, 28)))
  (folder / "broken.png").write_bytes(files.png(7, (28, 28))[:60])
  (folder / name).write_text("".join(
    (json.dumps(RECORDS[kind][0]) if RECORDS[kind][0] else "{") + "\n" for kind in kinds))
  return dict(path=str(folder / name), schema="plain", split="", weight=1)


def data(folder, *sources, grader, how="skip", stage="rl", others=None, **changes):
  none = dict(warmup=(), sft=(), rl=(), eval=()) | (others or {})
  values = tiny.values(model__path=str(folder), data__digits=None, data__bad_rows=how,
                       data__files=none | {stage: list(sources)}, **changes)
  return data_lib.RunData(run_config.read_config(values), ENCODER, grader, str(folder / "run"))


@pytest.fixture(scope="module")
def grader():
  with pool_lib.GradingPool(workers=1) as pool:
    yield pool


def test_every_kind_of_bad_row_is_quarantined_and_counted(tmp_path, grader, capsys):
  run = data(tmp_path, write(tmp_path, RECORDS), grader=grader)
  source = run.source("rl")
  assert [row["question"][:7] for row in map(source.__getitem__, range(len(source)))] == [
    "<image>", "Compute"]
  head, *lines = map(json.loads, (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines())
  bad = {kind: code for kind, (_, code) in RECORDS.items() if code}
  assert [line["reason"] for line in lines] == list(bad.values())
  assert {line["reason"] for line in lines} == set(CODES) - {"response", "pass_rate", "unread",
                                                             "video"}
  assert [line["row"] for line in lines] == [f"d.jsonl:{number}" for number in range(2, 11)]
  assert all(line["message"] and line["data"] == "rl" for line in lines)
  assert head["counts"] == [{"source": "d", "rows": 11, "used": 2, "quarantined": 9,
                             "reasons": dict(collections.Counter(bad.values()))}]
  assert "2 of 11 rows used, 9 quarantined" in capsys.readouterr().err


def test_a_second_start_reads_the_list_and_looks_at_listed_rows_alone(tmp_path, grader,
                                                                      monkeypatch):
  config = write(tmp_path, ["good", "long", "text"])
  assert len(data(tmp_path, config, grader=grader).source("rl")) == 2
  looked_at = []
  encode = Encoder.encode
  monkeypatch.setattr(Encoder, "encode", lambda encoder, row: (
    looked_at.append(row["id"]), encode(encoder, row)))
  assert len(data(tmp_path, config, grader=grader).source("rl")) == 2
  assert looked_at == ["d.jsonl:1 (rl 0:1)"]


def test_the_list_of_an_older_run_is_read_under_the_names_of_today(tmp_path, grader, capsys):
  config = write(tmp_path, ["good", "long"])
  data(tmp_path, config, grader=grader).source("rl")
  path = tmp_path / "run" / "bad_rows.jsonl"
  older = path.read_text().replace('"data": "rl"', '"data": "prompts"')
  path.write_text(older)
  assert len(data(tmp_path, config, grader=grader).source("rl")) == 1
  assert path.read_text() == older and "looking at all rows" not in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"\0\0\xff\n", b"3\n", b"{}\n"])
def test_a_damaged_list_is_named_with_the_remedy(tmp_path, grader, line):
  config = write(tmp_path, ["good", "long"])
  data(tmp_path, config, grader=grader).source("rl")
  with open(tmp_path / "run" / "bad_rows.jsonl", "ab") as file:
    file.write(line)
  with pytest.raises(ValueError, match="run/bad_rows.jsonl is damaged .*; remove it: the same"):
    data(tmp_path, config, grader=grader).source("rl")


@pytest.mark.parametrize("kinds, how, used", [
  (["good", "long", "text", "text"], "longer", 3),
  (["long", "long", "text"], "of as many rows", 1),
  (["good", "broken", "text"], "an image of it", 3)])
def test_the_list_is_renewed_when_data_change_in_place(tmp_path, grader, capsys, kinds, how, used):
  config = write(tmp_path, ["good", "broken" if how == "an image of it" else "long", "text"])
  assert len(data(tmp_path, config, grader=grader).source("rl")) == 2
  if how == "an image of it":
    (tmp_path / "broken.png").write_bytes(files.png(7, (28, 28)))
  else:
    write(tmp_path, kinds)
  source = data(tmp_path, config, grader=grader).source("rl")
  assert len(source) == used and "looking at all rows again" in capsys.readouterr().err
  bad = [number for number, kind in enumerate(kinds) if kind == "long"]
  lines = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").open()][1:]
  assert [line["number"] for line in lines] == bad
  first = min(set(range(3)) - set(bad))
  assert source[0]["id"] == f"d.jsonl:{first} (rl 0:{first})"


def test_by_default_a_bad_row_is_an_error_with_its_name(tmp_path, grader):
  run = data(tmp_path, write(tmp_path, ["good", "broken"]), grader=grader, how="error")
  source = run.source("rl")
  assert len(source) == 2 and not (tmp_path / "run").exists()
  with pytest.raises(BadRow, match="row d.jsonl:1 .rl 0:1.: .*broken.png: cannot use this image"):
    ENCODER.encode(source[1])
  truths = data(tmp_path, write(tmp_path, ["good", "truth"]), grader=grader, how="error")
  with pytest.raises(ValueError, match="1 of 2 truths of the 'rl' data cannot be met"):
    truths.check_truths("rl")


def test_no_two_rows_of_a_run_have_the_same_id(tmp_path, grader):
  sources = []
  for name, ids in (("train", ["7", "7"]), ("test", ["7", None]), ("more", [None, None])):
    (tmp_path / name).mkdir()
    path = files.jsonl(tmp_path / name / "data.jsonl", [
      {"question": "q", "answer": "3", "id": row} for row in ids])
    sources.append(dict(path=path, schema="plain", split="", weight=1))
  run = data(tmp_path, *sources, grader=grader, how="error", others={"eval": sources})
  found = [run.source(kind)[number]["id"] for kind in ("rl", "eval") for number in range(6)]
  assert len(set(found)) == 12 and found[:4] == [
    "7 (rl 0:0)", "7 (rl 0:1)", "7 (rl 1:0)", "data.jsonl:1 (rl 1:1)"]


def test_names_from_data_are_printable(tmp_path, grader, capsys):
  evil = "\x1b]0;owned\x07\x1b[2J\n\u202e" + "x" * 5000
  files.jsonl(tmp_path / "d.jsonl", [
    {"question": "q", "answer": "3", "id": evil, "source": evil, "images": [evil]}])
  config = dict(path=str(tmp_path / "d.jsonl"), schema="plain", split="", weight=1)
  source = data(tmp_path, config, grader=grader, how="error").source("rl")
  with pytest.raises(BadRow) as error:
    source[0]
  assert str(error.value).isprintable() and len(str(error.value)) < 900
  files.jsonl(tmp_path / "d.jsonl", [
    {"question": "q", "answer": "3", "id": evil, "source": evil, "level": evil}])
  row = data(tmp_path, config, grader=grader, how="error").source("rl")[0]
  for field in ("id", "source", "level"):
    assert row[field].isprintable() and len(row[field]) < 200


def test_a_stage_without_files_is_named(tmp_path, grader):
  run = data(tmp_path, write(tmp_path, ["good"]), grader=grader)
  with pytest.raises(ValueError, match="data.files.sft is empty; .* or set adacs.steps = 0$"):
    run.source("sft")
  with pytest.raises(ValueError, match="data.files.eval is empty; name files there$"):
    run.source("eval")


def test_a_source_of_bad_rows_alone_is_an_error(tmp_path, grader):
  with pytest.raises(ValueError, match="none of the 2 rows of d can be used: d.jsonl:0: "):
    data(tmp_path, write(tmp_path, ["long", "empty"]), grader=grader).source("rl")


@pytest.mark.parametrize("stage, field, text", [("warmup", "response", "<think> </think>"),
                                                ("sft", "responses", ["red ", "blue "])])
def test_rows_to_learn_from_need_responses_that_fit(tmp_path, grader, stage, field, text):
  longer = "red " * 200
  rows = [{"question": "q", "answer": "3"} | more for more in (
    {field: text}, {}, {field: longer if stage == "warmup" else [text[0], longer]})]
  files.jsonl(tmp_path / "d.jsonl", rows)
  config = dict(path=str(tmp_path / "d.jsonl"), schema="plain", split="", weight=1)
  assert len(data(tmp_path, config, grader=grader, stage=stage).source(stage)) == 1
  lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
  assert [json.loads(line)["reason"] for line in lines[1:]] == ["response", "length"]


def test_rows_to_curate_by_column_need_a_pass_rate(tmp_path, grader):
  rows = [{"question": "q", "answer": "3", "response": "red"} | more for more in (
    {"pass_rate": 0.5}, {}, {"pass_rate": -1}, {"pass_rate": 50.0}, {"pass_rate": "half"})]
  files.jsonl(tmp_path / "d.jsonl", rows)
  config = dict(path=str(tmp_path / "d.jsonl"), schema="plain", split="", weight=1)
  source = data(tmp_path, config, grader=grader, stage="sft",
                curate__pass_rates="column").source("sft")
  assert [source[number]["pass_rate"] for number in range(len(source))] == [0.5]
  lines = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").open()][1:]
  assert [line["reason"] for line in lines] == ["pass_rate"] * 4


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.sampled_from(sorted(set(RECORDS) - {"truth"})), min_size=1, max_size=8),
                min_size=1, max_size=3))
def test_rows_in_are_rows_used_and_quarantined(tmp_path_factory, parts):
  folder = tmp_path_factory.mktemp("parts")
  grader = types.SimpleNamespace(name="layered", bad_truths=lambda rows: [])
  sources = [write(folder, ["good", *part], f"{number}.jsonl") for number, part in enumerate(parts)]
  source = data(folder, *sources, grader=grader).source("rl")
  used = [source[number]["id"].partition(" ")[0] for number in range(len(source))]
  lines = [json.loads(line) for line in (folder / "run" / "bad_rows.jsonl").open()]
  bad = [line["row"] for line in lines[1:]]
  every = {f"{number}.jsonl:{row}": kind for number, part in enumerate(parts)
           for row, kind in enumerate(["good", *part])}
  assert sorted(used + bad) == sorted(every)
  assert all((RECORDS[every[row]][1] is None) == (row in used) for row in every)
  assert sum(count["used"] for count in lines[0]["counts"]) == len(used)


def test_smudged_cells_in_the_warmup_need_a_problem_that_has_some():
  changes = {"data__digits__teacher__warmup_smudge": 0.5}
  with pytest.raises(ValueError, match="teacher.warmup_smudge needs problem.smudge > 0"):
    tiny.read(**changes)
  tiny.read(**changes, data__digits__problem__smudge=0.3)
