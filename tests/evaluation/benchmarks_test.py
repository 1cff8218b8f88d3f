"""Every schema on a small file made after its published columns; no published file is read."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from ares_jax.evaluation.benchmarks import METRICS, benchmark_schemas, open_benchmark
from ares_jax.grading import answer


def png(shade=0):
  file = io.BytesIO()
  Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(file, "PNG")
  return file.getvalue()


IMAGE = {"bytes": png(), "path": None}
OPEN = {
  "mathverse": {"sample_index": "7", "problem_version": "Text Lite", "question": "<image>x?",
                "query_cot": "Reason first.\nQuestion: <image>x?\nChoices:\nA:1",
                "answer": "A", "image": IMAGE, "question_type": "multi-choice"},
  "charxiv": {"figure_id": 3, "reasoning_q": "Which?", "reasoning_a": "blue", "image": IMAGE,
              "reasoning_a_type": 1},
  "mmstar": {"index": 3, "question": "Which?\nOptions: A: 1, B: 2", "answer": "B",
             "image": png(), "category": "math"},
  "aime24": {"ID": "2024-I-1", "Problem": "Find x.", "Answer": 204},
  "aime25": {"problem_idx": 1, "problem": "Find x.", "answer": 73},
  "math500": {"unique_id": "test/1.json", "problem": "Find $x$.", "answer": "\\frac{1}{2}",
              "level": 2, "subject": "Algebra"},
  "gsm8k": {"question": "How many?", "answer": "She has 70 + 2.\n#### 72"},
  "bbeh": {"input": "Is it?", "target": "yes", "task": "boardgame"},
  "logicvista": {"question_id": "1", "question": "Which? A, B, C", "answer": "A, C",
                 "image": IMAGE, "skill": "inductive"},
  "olympiadbench": {"id": 5, "question": "Find r.", "final_answer": ["3.14"], "error": "1e-2",
                    "image_1": IMAGE, "image_2": None, "subfield": "Geometry"},
  "dynamath": {"id": "9", "question": "f?", "ground_truth": "1.5", "decoded_image": IMAGE,
               "image": "images/9.png", "level": "high school", "subject": "algebra"},
  "wemath": {"ID": "4", "problem_id": "4-1", "question": "x?", "answer": "C", "image_path": IMAGE,
             "option": "A. 1; B. 2; C. 3", "key": "2steps_1"},
}
ACCEPTED = {"mathverse": ["A"], "charxiv": ["blue"], "mmstar": ["B"], "aime24": ["204"],
            "aime25": ["73"], "math500": ["\\frac{1}{2}"], "gsm8k": ["72"], "bbeh": ["yes"],
            "logicvista": ["A, C"], "olympiadbench": ["3.14"], "dynamath": ["1.5"],
            "wemath": ["C"]}
CHOICES = {
  "mathvision": {"id": "1", "question": "Which? <image1>", "options": ["3", "4"], "answer": "B",
                 "image": "images/1.jpg", "decoded_image": IMAGE, "level": 2, "subject": "algebra"},
  "mathvista": {"pid": "1", "question": "Which?", "query":
                "Hint: give the letter.\nQuestion: Which?\nChoices:\n(A) 3\n(B) 4",
                "choices": ["3", "4"], "answer": "4",
                "precision": None, "decoded_image": IMAGE, "image": "images/1.jpg"},
  "mmmu": {"id": "dev_1", "question": "Which? <image 1>", "options": "['3', \"4\"]", "answer": "B",
           "image_1": IMAGE, **{f"image_{n}": None for n in range(2, 8)},
           "topic_difficulty": "Easy", "subfield": "Finance"},
  "mmmu_pro": {"id": "test_1", "question": "Which? <image 1>", "options": "['3', '4', '5']",
               "answer": "B", "image_1": IMAGE, "topic_difficulty": "Easy", "subject": "Art"},
  "mmlu_pro": {"question_id": 70, "question": "Which?", "options": ["3", "4"], "answer": "B",
               "answer_index": 1, "category": "business"},
}


def parquet(path, *records):
  pyarrow.parquet.write_table(pa.Table.from_pylist(list(records)), path)
  return str(path)


def jsonl(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


@pytest.mark.parametrize("name", sorted(OPEN))
def test_reads_open_questions(tmp_path, name):
  benchmark = open_benchmark(name, parquet(tmp_path / "data.parquet", OPEN[name]))
  (row,) = benchmark.rows
  assert row["answer"] == ACCEPTED[name]
  assert row["question"].count("<image>") in (0, len(row["images"]))
  has_image = any(key.startswith(("image", "decoded")) for key in OPEN[name])
  assert row["images"] == ([png()] if has_image else [])
  assert "{" not in row["question"] and (name != "mathverse" or "Reason" in row["question"])


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_reads_choices_and_accepts_letter_or_text(tmp_path, name):
  (row,) = open_benchmark(name, parquet(tmp_path / "data.parquet", CHOICES[name])).rows
  assert row["answer"] == ["B", "4"]
  # MathVista's query holds them already.
  assert "Which?" in row["question"] and row["question"].count("4") == 1
  assert name == "mathvista" or "A. 3\nB. 4" in row["question"]
  for said, right in (("B", True), ("4", True), ("B. 4", True), ("A. 4", False), ("3", False)):
    assert answer.same_answer(said, row["answer"]) is right


def test_every_schema_is_covered_and_says_who_wrote_its_prompt():
  assert set(benchmark_schemas()) == {*OPEN, *CHOICES, "mathverse_v", "gpqa", "generic",
                                      "mmmu_pro_vision", "charxiv_descriptive"}
  for name, schema in benchmark_schemas().items():
    assert schema["metric"] in METRICS and schema["prompt_by"] in ("authors", "ours"), name
    assert ("{question}" in schema["prompt"]) == (name != "mmmu_pro_vision")
    assert (schema["n"] > 1) == (schema["metric"] == "avg@n"), name


@pytest.mark.parametrize("kind, said, asked", [
  (1, "a, b", "commas"), (2, "no", "one of the options"), (3, "0.5", "explicitly written"),
  (4, "12", "must be an exact integer."), (4, "-0.250", "a number with 3 decimal places."),
])
def test_charxiv_asks_as_its_authors_do_of_each_kind_of_answer(tmp_path, kind, said, asked):
  question = "How far is {about} from {digits}?"
  record = OPEN["charxiv"] | {
    "reasoning_a_type": kind, "reasoning_q": question, "reasoning_a": said}
  (row,) = open_benchmark("charxiv", parquet(tmp_path / "data.parquet", record)).rows
  head, _, rules = row["question"].partition(f"{question}\n* ")
  assert asked in rules and "How far" not in head + rules
  with pytest.raises(ValueError, match="asks number 5; there are 1, 2, 3, 4"):
    open_benchmark("charxiv", parquet(tmp_path / "b.parquet", record | {"reasoning_a_type": 5}))


def test_only_the_vision_version_counts(tmp_path):
  lite, only = OPEN["mathverse"], OPEN["mathverse"] | {"problem_version": "Vision Only"}
  path = parquet(tmp_path / "data.parquet", lite, only)
  assert len(open_benchmark("mathverse", path).rows) == 2
  assert len(open_benchmark("mathverse_v", path).rows) == 1


def test_right_answers_of_gpqa_are_shuffled_by_question(tmp_path):
  def record(number):
    return {"Record ID": f"r{number}", "Question": f"Which {number}?", "Correct Answer": "right ",
            **{f"Incorrect Answer {wrong}": f"wrong {wrong}" for wrong in (1, 2, 3)},
            "High-level domain": "Physics"}

  records = [record(number) for number in range(40)]
  rows = open_benchmark("gpqa", jsonl(tmp_path / "a.jsonl", *records)).rows
  again = open_benchmark("gpqa", jsonl(tmp_path / "b.jsonl", *records[::-1])).rows
  assert rows == again[::-1]
  letters = [row["answer"][0] for row in rows]
  assert set(letters) == set("ABCD")
  for row, letter in zip(rows, letters, strict=True):
    assert row["answer"] == [letter, "right"] and f"{letter}. right" in row["question"]


def test_options_that_are_letters_or_twins_accept_the_letter_alone(tmp_path):
  record = CHOICES["mmlu_pro"] | {"options": ["B", "A"], "answer": "A"}
  twins = CHOICES["mmlu_pro"] | {"options": ["4", "4"], "question_id": 71}
  rows = open_benchmark("mmlu_pro", parquet(tmp_path / "d.parquet", record, twins)).rows
  assert [row["answer"] for row in rows] == [["A"], ["B"]]


def test_questions_by_number_are_asked_about_their_part_of_the_figure(tmp_path):
  asked = {f"descriptive_q{place}": number for place, number in enumerate((1, 10, 18, 19), 1)}
  record = asked | {"figure_id": 7, "image": IMAGE, "category": "cs", "subplot_row": 1,
                    "subplot_col": 2, "subplot_loc": None,
                    **{f"descriptive_a{place}": text for place, text in enumerate(
                      ("Not Applicable", "3", "1 by 2", "2"), 1)}}
  whole = record | {"figure_id": 8, "subplot_row": 0, "subplot_col": 0}
  named = record | {"figure_id": 9, "subplot_row": None, "subplot_loc": "the left one"}
  path = parquet(tmp_path / "data.parquet", record, whole, named)
  rows = open_benchmark("charxiv_descriptive", path).rows
  assert [row["id"] for row in rows[:5]] == ["7", "7#2", "7#3", "7#4", "8"]
  assert [row["answer"] for row in rows[:4]] == [["Not Applicable"], ["3"], ["1 by 2"], ["2"]]
  assert rows[0]["question"].startswith("For the subplot at row 1 and column 2, what is its title?")
  assert rows[1]["question"].splitlines()[0].endswith("column 2, how many lines are there?")
  assert rows[2]["question"].startswith("What is the layout of the subplots?")
  assert rows[4]["question"].startswith("For the current plot, what is its title?")
  assert rows[8]["question"].startswith("For the left one, what is its title?")
  assert all(row["images"] == [png()] for row in rows)
  with pytest.raises(ValueError, match="row data.parquet:0: asks number 20; there are 1, 2, "):
    open_benchmark("charxiv_descriptive",
                   parquet(tmp_path / "data.parquet", record | {"descriptive_q3": 20}))


def test_a_question_may_stand_in_the_picture_alone(tmp_path):
  record = {"id": "test_1", "image": IMAGE, "options": "['3', '4']", "answer": "B",
            "subject": "Art"}
  (row,) = open_benchmark("mmmu_pro_vision", parquet(tmp_path / "data.parquet", record)).rows
  assert row["question"].startswith("Write out the multiple-choice question in the image")
  assert row["answer"] == ["B", "4"] and row["images"] == [png()]


def test_variants_in_a_folder_form_a_group(tmp_path):
  for variant in (1, 2):
    parquet(tmp_path / f"variant{variant}.parquet", OPEN["dynamath"])
  (tmp_path / "README.md").write_text("no data")
  rows = open_benchmark("dynamath", str(tmp_path)).rows
  assert [(row["id"], row["group"]) for row in rows] == [("9", "9"), ("9#2", "9")]


def test_numbered_marks_place_their_own_image(tmp_path):
  images = {"image_1": {"bytes": png(1), "path": None}, "image_2": {"bytes": png(2), "path": None}}
  record = CHOICES["mmmu"] | images | {"question": "<image 2> and <image 1>, <image 2>?"}
  (row,) = open_benchmark("mmmu", parquet(tmp_path / "d.parquet", record)).rows
  assert row["images"] == [png(2), png(1), png(2)] and row["question"].count("<image>") == 3
  record = CHOICES["mmmu"] | {"question": "<image 3> <image 2>?"}
  (row,) = open_benchmark("mmmu", parquet(tmp_path / "e.parquet", record)).rows
  assert row["images"] == [png()] and "<image" not in row["question"]


def test_marks_in_a_file_of_ones_own_are_left_to_the_encoder(tmp_path):
  record = {"question": "<image 1> is what?", "answer": "1", "images": ["a.png", "b.png"]}
  (row,) = open_benchmark("generic", jsonl(tmp_path / "mine.jsonl", record)).rows
  assert row["question"] == "<image 1> is what?" and len(row["images"]) == 2


def test_every_accepted_option_counts(tmp_path):
  record = {"question": "q", "answer": ["A", "C"], "options": ["red", "blue", "green"]}
  (row,) = open_benchmark("generic", jsonl(tmp_path / "mine.jsonl", record)).rows
  assert row["answer"] == ["A", "red", "C", "green"]


def test_a_tolerance_that_is_no_number_names_its_row(tmp_path):
  record = {"question": "q", "answer": "1", "tolerance": [1]}
  with pytest.raises(ValueError, match=r"row mine.jsonl:0: the tolerance \[1\]"):
    open_benchmark("generic", jsonl(tmp_path / "mine.jsonl", record))


def test_tolerance_is_only_what_the_data_say(tmp_path):
  vista = CHOICES["mathvista"] | {"choices": None, "answer": "0.57", "precision": 2.0}
  (row,) = open_benchmark("mathvista", parquet(tmp_path / "v.parquet", vista)).rows
  assert row["tolerance"] == pytest.approx(0.005) and row["question"] == vista["query"]
  (row,) = open_benchmark("olympiadbench", jsonl(tmp_path / "o.jsonl", {
    "question": "r?", "final_answer": ["2"], "error": None})).rows
  assert row["tolerance"] == 0


def test_ones_own_file_needs_a_question_and_an_answer(tmp_path):
  rows = open_benchmark("generic", jsonl(
    tmp_path / "mine.jsonl", {"question": "a {options} brace?", "answer": "1"},
    {"id": 4, "problem": "b", "answer": ["1", "one"], "source": "s", "level": 3})).rows
  assert rows[0]["id"] == "mine.jsonl:0" and rows[0]["question"] == "a {options} brace?"
  assert rows[1] == {"id": "4", "source": "s", "question": "b", "answer": ["1", "one"],
                     "images": [], "level": "3", "group": None, "step": None, "tolerance": 0}


@pytest.mark.parametrize("record, words", [
  ({"text": "q", "answer": "1"}, "row d.jsonl:0: has none of the columns .'question', 'problem'"),
  ({"question": "q"}, "row d.jsonl:0: the answer is None"),
  ({"question": "q", "answer": " "}, "row d.jsonl:0: the answer is ' '"),
  ({"question": "q", "answer": "1", "images": ["../x.png"]}, "image '../x.png' is outside"),
])
def test_names_a_bad_row(tmp_path, record, words):
  with pytest.raises(ValueError, match=words):
    open_benchmark("generic", jsonl(tmp_path / "d.jsonl", record))


def test_names_what_does_not_exist(tmp_path):
  with pytest.raises(ValueError, match="no benchmark 'mathvsta'; did you mean 'mathvista'"):
    open_benchmark("mathvsta", "x")
  with pytest.raises(ValueError, match="neither a .jsonl, .json, .* file nor a folder"):
    open_benchmark("mathvista", str(tmp_path))
  with pytest.raises(ValueError, match="has no rows of 'mathverse_v' where"):
    open_benchmark("mathverse_v", parquet(tmp_path / "d.parquet", OPEN["mathverse"]))
