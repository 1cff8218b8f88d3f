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
