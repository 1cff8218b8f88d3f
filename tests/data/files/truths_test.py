"""Options and truths of every kind that files hold: read as they are meant, or refused."""

import math
import time

import numpy as np
import pytest

from ares_jax.data.bad_row import BadRow
from ares_jax.data.files.schema import read_row, read_schemas


def read(schema="plain", **values):
  return read_row(read_schemas()[schema], {"question": "q"} | values, location="d.jsonl:0",
                  name="d", folder="f")


@pytest.mark.parametrize("answer, truths", [
  (3, ["3"]), (51.0, ["51.0"]), (np.int64(3), ["3"]), (np.float32(0.1), ["0.1"]),
  (b"3", ["3"]), (["3", 4], ["3", "4"]), (np.array([b"3"], object), ["3"]), ("nan", ["nan"])])
def test_a_truth_is_a_text_or_a_number(answer, truths):
  assert read(answer=answer)["answer"] == truths


@pytest.mark.parametrize("answer", [
  math.nan, math.inf, -math.inf, True, False, np.bool_(True), {"value": 3}, [["3"]], [{"a": 1}],
  ["3", None], ["3", math.nan], None, [], ""])
def test_any_other_truth_is_a_bad_row(answer):
  with pytest.raises(BadRow, match="the answer is ") as error:
    read(answer=answer)
  assert error.value.code == "answer"


@pytest.mark.parametrize("question", [3, True, {"text": "q"}, math.nan])
def test_a_question_that_is_no_text_is_named(question):
  with pytest.raises(BadRow, match="the question is .*; a text is needed"):
    read(question=question, answer="3")


@pytest.mark.parametrize("options", [
  ["one", "two"], "['one', 'two']", '["one", "two"]', {"A": "one", "B": "two"},
  {"B": "two", "A": "one", "C": None}, {"(a)": "one", "b.": "two"}, '{"A": "one", "B": "two"}',
  {"label": ["A", "B"], "text": ["one", "two"]}, "[['one', 'two']]",
  np.array([b"one", b"two"], object)])
def test_options_are_a_list_or_an_object_by_letter(options):
  row = read(options=options, answer="b")
  assert row["question"] == "q\nA. one\nB. two" and row["answer"] == ["B", "two"]


@pytest.mark.parametrize("options, words", [
  ({"first": "one", "second": "two"}, "its options have the names first, second"),
  ({"A": "one", "C": "two"}, "its options have the names A, C"),
  ("A. one B. two", "its options 'A. one B. two' are no list"),
  ("['one' 'two']", "lack commas"), (3, "its options are 3; a list"),
  ([["one"], "two"], "the option is .'one'."), ([None], "the option is None"),
  ([True], "the option is"),
  (["x"] * 27, "it has 27 options, there are 26 letters")])
def test_options_of_another_kind_are_a_bad_row(options, words):
  with pytest.raises(BadRow, match=words):
    read(options=options, answer="A")


def test_options_with_letters_of_their_own_are_shown_with_one_letter():
  for options in (["A. one", "B. two"], ["(A) one", "(B) two"], {"A": "A: one", "B": "B: two"}):
    for answer in ("B", "two", "B. two", "(B) two", "$B$", "\\text{B}", "\\boxed{B}", "Option B",
                   "B: two"):
      row = read(options=options, answer=answer)
      assert row["question"] == "q\nA. one\nB. two" and row["answer"] == ["B", "two"]
  for options in (["A)", "B)"], ["B. one", "A. two"], ["A. one", "two"]):
    assert read(options=options, answer="A")["options"] == options


@pytest.mark.parametrize("answer", ["C", 0, 3, "3", "three", "A. two", "A, C", ["A", "C"],
                                    "C. three"])
def test_a_truth_that_is_none_of_the_options_is_a_bad_row(answer):
  with pytest.raises(BadRow, match="is none of its 2 options") as error:
    read(options=["one", "two"], answer=answer)
  assert error.value.code == "answer"


@pytest.mark.parametrize("answer, options", [
  ("A, B", ["one", "two"]), ("A and B", ["one", "two"]), ("AB", ["one", "two"]),
  (3.0, ["2", "3"]), ("$\\frac12$", ["1/2", "1/3"]), ("\\sqrt{12}", ["2\\sqrt{3}", "2"]),
  ("Two.", ["one", "two"])])
def test_a_truth_may_be_several_letters_or_another_writing_of_an_option(answer, options):
  assert read(options=options, answer=answer)["answer"] == [str(answer)]


@pytest.mark.parametrize("text", ["[" * 2_000_000, "'" + "x" * 2_000_000 + "'", "[" * 30_000,
                                  "(" * 30_000, "-" * 30_000 + "1", "[" + "1," * 10_000 + "]"])
def test_options_in_a_text_are_bounded(text):
  start = time.process_time()
  with pytest.raises(BadRow):
    read(options=text, answer="A")
  assert time.process_time() - start < 2


def test_a_second_name_of_a_field_is_not_read_and_counted():
  row = read(answer="3", problem="Given x.", image="b.png", images=["a.png"], id=1)
  assert row["question"] == "q" and row["images"] == ["f/a.png"]
  assert row["left_out"] == ["column 'problem'", "column 'image'"]


def test_a_list_of_labels_is_joined():
  row = read(answer="3", source=["algebra", "geometry"], level=4, id=7)
  assert [row["source"], row["level"], row["id"]] == ["algebra, geometry", "4", "7"]
  assert read(answer="3", level=math.nan)["level"] is None
  with pytest.raises(BadRow, match="the source is .*; a text or a number is needed"):
    read(answer="3", source={"name": "x"})
