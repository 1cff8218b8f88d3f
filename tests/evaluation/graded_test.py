import pytest

from ares_jax.evaluation import graded


@pytest.mark.parametrize("answer, near", [
  ("0.571", True), ("0.575", True), ("0.576", False), ("0.571 cm", True), ("57.1", False),
  ("about", False), (None, False), ("9" * 500, False)])
def test_a_number_within_the_tolerance(answer, near):
  text = "no box" if answer is None else f"\\boxed{{{answer}}}"
  assert graded.within_tolerance({"answer": ["0.57"], "tolerance": 0.005}, text) is near
  assert not graded.within_tolerance({"answer": ["0.57"]}, text)


def test_numbers_of_different_units_are_not_near():
  row = {"answer": "0.57 cm", "tolerance": 0.005}
  assert graded.within_tolerance(row, "\\boxed{0.571 cm}")
  assert not graded.within_tolerance(row, "\\boxed{0.571 m}")


@pytest.mark.parametrize("answer, near", [
  ("1.05, 2.2", True), ("2.2, 1.05", True), ("1.2, 2.2", False), ("1.05, 2.2, 3", False),
  ("1.05", False)])
def test_each_part_has_its_own_tolerance(answer, near):
  row = {"answer": ["1, 2"], "tolerance": [0.1, 0.2]}
  assert graded.within_tolerance(row, f"\\boxed{{{answer}}}") is near


def test_a_tolerance_is_taken_as_its_digits_say():
  row = {"answer": ["0.7"], "tolerance": 0.7}  # the float is a little less than 7/10
  assert graded.within_tolerance(row, "\\boxed{1.4}")
  assert not graded.within_tolerance({"answer": ["1,234"], "tolerance": 1}, "\\boxed{2,234}")


def test_an_option_is_never_nearly_right():
  row = {"answer": ["A", "0.57"], "options": ["0.57", "0.571"], "tolerance": 0.005}
  assert not graded.within_tolerance(row, "\\boxed{0.571}")
