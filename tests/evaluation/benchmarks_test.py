"""Every schema on a small file made after its published columns.

public_files_test.py reads whole published files.
"""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from ares_jax.data.bad_row import CODES, BadRow
from ares_jax.data.sources import ColumnsConfig
from ares_jax.evaluation.benchmarks import (
  METRICS,
  benchmark_schemas,
  check_prompts,
  open_benchmark,
)
from ares_jax.grading import answer
from ares_jax.system.config import build


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
             "option": "A. 1; B. 2; C. 3", "key": "2steps_multi"},
  "svamp": {"ID": "chal-1", "Body": "He had 3 apples", "Question": "How many now?", "Answer": 5.0,
            "Type": "Addition"},
  "mmk12": {"id": 3, "question": "<image>x?", "answer": "30${}^\\circ $ (or fill in $$30$$)",
            "image": IMAGE, "subject": "math"},
}
ACCEPTED = {"mathverse": ["A"], "charxiv": ["blue"], "mmstar": ["B"], "aime24": ["204"],
            "aime25": ["73"], "math500": ["\\frac{1}{2}"], "gsm8k": ["72"], "bbeh": ["yes"],
            "logicvista": ["A, C"], "olympiadbench": ["3.14"], "dynamath": ["1.5"],
            "wemath": ["C", "3"], "svamp": ["5.0"],
            "mmk12": ["30${}^\\circ $ (or fill in $$30$$)", "30${}^\\circ $", "30^\\circ",
                      "$$30$$"]}
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
  parts = [OPEN[name]]
  if name == "wemath":  # a problem has steps
    parts.append(OPEN[name] | {"problem_id": "4-2", "key": "2steps_1"})
  benchmark = open_benchmark(name, parquet(tmp_path / "data.parquet", *parts))
  row = benchmark.rows[0]
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
  odd = open_benchmark("charxiv_descriptive",
                       parquet(tmp_path / "data.parquet", record | {"descriptive_q3": 20}))
  assert len(odd.rows) == 3
  assert "row data.parquet:0: asks number 20; there are 1, 2, " in odd.summary()


@pytest.mark.parametrize("place, words", [
  ([0, 0], "For the current plot, "), ([1, 2], "For the subplot at row 1 and column 2, "),
  ("the left one", "For the left one, ")])
def test_charxiv_as_published_has_lists_of_questions_and_images_by_number(tmp_path, place, words):
  (tmp_path / "images").mkdir()
  (tmp_path / "data").mkdir()
  (tmp_path / "images" / "7.jpg").write_bytes(png())
  (tmp_path / "data" / "descriptive_val.json").write_text(json.dumps({"7": {
    "figure_id": 7, "subplot_loc": place, "qids": [1, 2, 12, 18], "answers": list("abcd")}}))
  (tmp_path / "data" / "image_metadata_val.json").write_text(json.dumps({"7": {"category": "cs"}}))
  rows = open_benchmark("charxiv_descriptive", str(tmp_path)).rows
  assert rows[0]["question"].startswith(words + "what is its title?")
  assert [row["answer"] for row in rows] == [["a"], ["b"], ["c"], ["d"]]
  assert rows[0]["source"] == "cs" and rows[0]["images"] == [str(tmp_path / "images" / "7.jpg")]


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
  with pytest.raises(ValueError, match="the image marks <image 3>, <image 2> but 1 images"):
    open_benchmark("mmmu", parquet(tmp_path / "e.parquet", record))


def test_marks_in_a_file_of_ones_own_are_left_to_the_encoder(tmp_path):
  for name in ("a.png", "b.png"):
    (tmp_path / name).write_bytes(png())
  record = {"question": "<image 1> is what?", "answer": "1", "images": ["a.png", "b.png"]}
  (row,) = open_benchmark("generic", jsonl(tmp_path / "mine.jsonl", record)).rows
  assert row["question"] == "<image 1> is what?" and len(row["images"]) == 2


def test_a_file_of_ones_own_may_name_its_columns(tmp_path):
  path = jsonl(tmp_path / "mine.jsonl",
               {"Body": "Two.", "Ask": "How many?", "Answer": 2, "n": {"l": 3}})
  columns = build(ColumnsConfig, "question=Body+Ask, answer=Answer,level=n.l", "columns")
  (row,) = open_benchmark("generic", path, columns=columns).rows
  assert (row["question"], row["answer"], row["level"]) == ("Two.\nHow many?", ["2"], "3")
  for text, words in (("question=Body,answer=Anwser", "no column 'Anwser'.*did you mean 'Answer'"),
                      ("qestion=Body", "qestion is not a field.*did you mean 'question'")):
    with pytest.raises(ValueError, match=words):
      open_benchmark("generic", path, columns=build(ColumnsConfig, text, "columns"))


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
                     "options": [], "images": [], "level": "3", "group": None, "step": None,
                     "tolerance": 0, "left_out": []}


@pytest.mark.parametrize("record, words", [
  ({"text": "q", "answer": "1"}, "row d.jsonl:0: has none of the columns .'question', 'problem'"),
  ({"question": "q"}, "row d.jsonl:0: the answer is None"),
  ({"question": "q", "answer": " "}, "row d.jsonl:0: the answer is ' '"),
  ({"question": "q", "answer": "1", "images": ["../x.png"]}, "image '../x.png' is outside"),
])
def test_names_a_bad_row(tmp_path, record, words):
  with pytest.raises(ValueError, match=words):
    open_benchmark("generic", jsonl(tmp_path / "d.jsonl", record))


VISION = {"id": "4", "question": "Which? <image1>", "options": ["3", "4"], "answer": "B",
          "image": "images/4.png", "level": 1, "subject": "counting"}


@pytest.mark.parametrize("place, given", [
  ("data/images/4.png", ""), ("images/4.png", ""), ("elsewhere/images/4.png", "elsewhere"),
  ("elsewhere/images/4.png", "elsewhere/images")])
def test_images_are_beside_the_file_or_its_folder_or_where_it_is_said(tmp_path, place, given):
  (tmp_path / place).parent.mkdir(parents=True)
  (tmp_path / place).write_bytes(png())
  (tmp_path / "data").mkdir(exist_ok=True)
  jsonl(tmp_path / "data" / "test.jsonl", VISION)
  images = given and str(tmp_path / given)
  for path in (tmp_path, tmp_path / "data", tmp_path / "data" / "test.jsonl"):
    assert open_benchmark("mathvision", str(path), images).rows[0]["images"] == [
      str(tmp_path / place)]


def test_mathvisions_one_image_holds_all_that_its_marks_name(tmp_path):
  record = CHOICES["mathvision"] | {"question": "From <image1> to <image2>?",
                                    "options": ["<image3>", "4"]}
  (row,) = open_benchmark("mathvision", parquet(tmp_path / "d.parquet", record)).rows
  assert row["question"].startswith("From [image 1] to [image 2]?\nA. [image 3]\nB. 4")
  assert row["images"] == [png()]


def test_a_missing_image_is_an_error_that_names_its_row(tmp_path):
  record = VISION | {"image": "images/5.png"}
  (tmp_path / "there.png").write_bytes(png())
  path = jsonl(tmp_path / "test.jsonl", record, VISION | {"image": "there.png"}, record)
  with pytest.raises(ValueError, match="2 of 3 rows of 'mathvision' lack an image; the first: row "
                     "test.jsonl:0: image 'images/5.png' is in none of the folders .*--images=FO"):
    open_benchmark("mathvision", path)


@pytest.mark.parametrize("image", ["", None])
def test_only_benchmarks_with_rows_of_text_do_without_images(tmp_path, image):
  verse = OPEN["mathverse"] | {"question": "x?", "query_cot": "x?", "image": image}
  with pytest.raises(ValueError, match="1 of 1 rows of 'mathverse' lack an image"):
    open_benchmark("mathverse", jsonl(tmp_path / "a.jsonl", verse))
  verse["problem_version"] = "Text Only"
  assert open_benchmark("mathverse", jsonl(tmp_path / "a.jsonl", verse)).rows[0]["images"] == []
  with pytest.raises(ValueError, match="1 of 1 rows of 'mmstar' lack an image; the first: row "
                                       "b.jsonl:0: it has no image in the columns"):
    open_benchmark("mmstar", jsonl(tmp_path / "b.jsonl", OPEN["mmstar"] | {"image": image}))


def test_a_bad_published_row_is_skipped_and_counted(tmp_path):
  good, bad = OPEN["math500"], OPEN["math500"] | {"problem": " "}
  benchmark = open_benchmark("math500", jsonl(tmp_path / "test.jsonl", good, bad, good))
  assert len(benchmark.rows) == 2
  assert benchmark.summary().splitlines()[:2] == [
    "math500: 2 of 3 problems, 0 with images; pass@1",
    "skipped: row test.jsonl:1: the question is empty"]
  with pytest.raises(ValueError, match="2 of 3 rows of 'math500' cannot be used; the first: row t"):
    open_benchmark("math500", jsonl(tmp_path / "test.jsonl", bad, good, bad))


def test_a_group_without_one_of_its_rows_is_skipped(tmp_path):
  def row(group, part, **more):
    return OPEN["wemath"] | {"ID": group, "problem_id": f"{group}-{part}", "key": part} | more

  rows = [row("1", "2steps_1"), row("1", "2steps_multi"), row("2", "2steps_1"),
          row("2", "2steps_multi", question="")]
  benchmark = open_benchmark("wemath", parquet(tmp_path / "d.parquet", *rows))
  assert [row["group"] for row in benchmark.rows] == ["1", "1"] and len(benchmark.skipped) == 2
  with pytest.raises(ValueError, match="1 of 2 groups are incomplete: group 2 has 0 whole"):
    open_benchmark("wemath", parquet(tmp_path / "d.parquet", *rows[:3]))


def test_the_keys_of_an_object_are_ids_and_groups(tmp_path):
  seed = {"question": "f?", "answer": "2.0944", "image": "image/1.png", "answer_type": "float",
          "subject": "algebra", "level": "high school"}
  (tmp_path / "image").mkdir()
  (tmp_path / "image" / "1.png").write_bytes(png())
  (tmp_path / "dataset.json").write_text(json.dumps({"1": seed, "2": seed | {
    "question": "Choices: (A) yes (B) no", "answer": "B", "knowledge_level": "easy"}}))
  first, second = open_benchmark("dynamath", str(tmp_path)).rows
  assert (first["id"], first["group"], first["level"]) == ("1", "1", "high school")
  assert first["tolerance"] == 0.001 and "three-digit floating-point" in first["question"]
  assert second["answer"] == ["B", "no"] and second["level"] == "easy"


def test_mathvista_as_published_has_its_queries_in_a_second_file(tmp_path):
  record = CHOICES["mathvista"] | {"metadata": {"source": "TQA"}, "decoded_image": None}
  query = record.pop("query")
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "1.jpg").write_bytes(png())
  (tmp_path / "testmini.json").write_text(json.dumps({"1": record}))
  with pytest.raises(ValueError, match="1 of 1 rows of 'mathvista' cannot be used; the first: row t"
                     r".*; the published query\*.json belongs beside the file"):
    open_benchmark("mathvista", str(tmp_path))
  (tmp_path / "query.json").write_text(json.dumps({"1": query, "2": "another"}))
  for path in (tmp_path, tmp_path / "testmini.json"):
    (row,) = open_benchmark("mathvista", str(path)).rows
    assert (row["question"], row["source"]) == (query, "TQA")


@pytest.mark.parametrize("choices, text, accepted", [
  (["(c)", "(a)", "(e)", "(d)", "(b)"], "(b)", ["E"]), (["b", "a"], "b", ["A"]),
  (["50", "100", "50"], "50", ["A", "C"]), (["3", "4"], "4", ["B", "4"])])
def test_mathvistas_answer_is_always_the_text_of_an_option(tmp_path, choices, text, accepted):
  record = CHOICES["mathvista"] | {"choices": choices, "answer": text}
  (row,) = open_benchmark("mathvista", parquet(tmp_path / "d.parquet", record)).rows
  assert row["answer"] == accepted


def test_mmmus_open_answers_are_a_list_in_a_text(tmp_path):
  record = CHOICES["mmmu"] | {"options": "[]", "answer": "['24/7', '3.429']"}
  (row,) = open_benchmark("mmmu", parquet(tmp_path / "d.parquet", record)).rows
  assert row["answer"] == ["24/7", "3.429"]


def test_bbeh_as_published_has_a_folder_for_each_task(tmp_path):
  for task in ("bbeh_a", "bbeh_b"):
    (tmp_path / "benchmark_tasks" / task).mkdir(parents=True)
    (tmp_path / "benchmark_tasks" / task / "task.json").write_text(json.dumps({
      "canary": "x", "examples": [{"input": f"Is it {task}?", "target": "yes"}]}))
  rows = open_benchmark("bbeh", str(tmp_path)).rows
  assert [row["source"] for row in rows] == ["bbeh_a", "bbeh_b"] and len({
    row["id"] for row in rows}) == 2


def test_olympiadbench_gives_context_marks_and_an_error_for_each_part(tmp_path):
  record = OPEN["olympiadbench"] | {
    "context": "A ring <image_1>.", "question": "Find both.", "final_answer": ["$1$,$2$"],
    "error": "0.1,0.2"}
  (row,) = open_benchmark("olympiadbench", parquet(tmp_path / "d.parquet", record)).rows
  assert row["question"] == "A ring <image>.\nFind both." and row["tolerance"] == [0.1, 0.2]
  assert row["answer"] == ["$1$,$2$", "1,2"]
  assert answer.same_answer("2, 1", row["answer"])


def test_olympiadbench_names_images_in_its_marks(tmp_path):
  for folder in ("data", "images"):
    (tmp_path / folder).mkdir()
  for number in (1, 2):
    (tmp_path / "images" / f"img_{number}.jpg").write_bytes(png())
  record = {"id": 1, "context": "See <img_2>.", "question": "And <img_1>?", "error": None,
            "final_answer": ["3"], "subfield": "Optics"}
  text = {"id": 2, "context": None, "question": "Why?", "final_answer": ["4"], "error": None}
  (tmp_path / "data" / "OE_MM_physics_en_COMP.json").write_text(json.dumps([record, text]))
  first, second = open_benchmark("olympiadbench", str(tmp_path)).rows
  assert first["question"] == "See <image>.\nAnd <image>?" and not second["images"]
  assert [image[-9:] for image in first["images"]] == ["img_2.jpg", "img_1.jpg"]


def test_logicvista_as_published_names_its_skill_in_a_list(tmp_path):
  record = {"imagename": "v1_0.png", "question": "Which? A) 10 B) 12", "answer": "B",
            "skill": ["inductive"]}
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "v1_0.png").write_bytes(png())
  (tmp_path / "dataset.json").write_text(json.dumps({"v1_0": record}))
  (row,) = open_benchmark("logicvista", str(tmp_path)).rows
  assert (row["id"], row["source"], row["answer"]) == ("v1_0", "inductive", ["B", "12"])


class Encoder:
  """Encodes a row unless its question names a kind of BadRow."""

  def encode(self, row):
    if row["question"] in CODES:
      raise BadRow(row["id"], row["question"], "it is bad")


def test_prompts_are_encoded_before_anything_is_answered(tmp_path):
  def checked(*questions):
    path = jsonl(tmp_path / "d.jsonl", *({"problem": text, "answer": "1", "id": str(number)}
                                         for number, text in enumerate(questions)))
    return check_prompts(open_benchmark("aime25", path), Encoder(), threads=2)

  benchmark = checked("a", "image", "b")
  assert [row["question"] for row in benchmark.rows] == ["a", "b"]
  assert benchmark.skipped == ("row 1: it is bad",)
  with pytest.raises(ValueError, match="1 of 3 prompts of 'aime25' cannot be asked; the first: row "
                                       "2: it is bad"):
    checked("a", "b", "length")
  with pytest.raises(ValueError, match="2 of 3 prompts of 'aime25' cannot be asked; the first: row "
                                       "0: it is bad"):
    checked("image", "a", "image")


def test_names_what_does_not_exist(tmp_path):
  with pytest.raises(ValueError, match="no benchmark 'mathvsta'; did you mean 'mathvista'"):
    open_benchmark("mathvsta", "x")
  with pytest.raises(ValueError, match="neither a .jsonl, .json, .* file nor a folder"):
    open_benchmark("mathvista", str(tmp_path))
  with pytest.raises(ValueError, match="has no rows of 'mathverse_v' where"):
    open_benchmark("mathverse_v", parquet(tmp_path / "d.parquet", OPEN["mathverse"]))
