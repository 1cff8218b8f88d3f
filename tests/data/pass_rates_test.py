import pytest

from ares_jax.data.bad_row import BadRow
from ares_jax.data.pass_rates import candidates, column_passes, part


@pytest.mark.parametrize("rate, passes", [(0, 0), (0.0, 0), (0.05, 0), (0.25, 2), (0.5, 4),
                                          (0.95, 8), (1, 8)])
def test_a_pass_rate_is_the_nearest_count(rate, passes):
  assert column_passes({"id": "7", "pass_rate": rate}, 8) == passes


@pytest.mark.parametrize("row, words", [
  ({}, "None: not measured"), ({"pass_rate": -1.0}, "-1.0: not measured"),
  ({"pass_rate": 75}, "75; a number from 0 to 1"), ({"pass_rate": "0.5"}, "'0.5'; a number"),
  ({"pass_rate": float("nan")}, "nan; a number"), ({"pass_rate": True}, "True; a number")])
def test_what_is_no_pass_rate_is_named(row, words):
  with pytest.raises(BadRow, match=f"row 7: its pass rate is {words}"):
    column_passes({"id": "7"} | row, 8)


def test_candidates_are_several_responses_or_one():
  assert candidates({"id": "7", "responses": ["a", "b"], "response": "c"}) == ["a", "b"]
  assert candidates({"id": "7", "response": "c"}) == ["c"]
  with pytest.raises(BadRow, match="row 7: has no 'responses'"):
    candidates({"id": "7", "responses": [], "response": None})


def test_shards_are_neighbours_and_together_all():
  assert [list(part(10, (number, 3))) for number in range(3)] == [
    [0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
