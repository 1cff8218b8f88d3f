import pathlib

import pytest

from ares_jax.data.bad_row import BadRow
from ares_jax.data.curation.pass_rates import (
  FILE,
  candidate_responses,
  column_passes,
  drop_torn_line,
  finished_shards,
  read_problems,
  shard_folder,
  shard_numbers,
)


@pytest.mark.parametrize("rate, passes", [(0, 0), (0.0, 0), (0.05, 0), (0.25, 2), (0.5, 4),
                                          (0.95, 8), (1, 8)])
def test_a_pass_rate_is_the_nearest_count(rate, passes):
  assert column_passes({"id": "7", "pass_rate": rate}, 8) == passes


@pytest.mark.parametrize("row, words", [
  ({}, "None: not measured"), ({"pass_rate": -1.0}, "-1.0: not measured"),
  ({"pass_rate": 75}, "75; a number from 0 to 1"), ({"pass_rate": "0.5"}, "'0.5'; a number"),
  ({"pass_rate": float("nan")}, "nan; a number"), ({"pass_rate": True}, "True; a number")])
def test_an_invalid_pass_rate_is_named(row, words):
  with pytest.raises(BadRow, match=f"row 7: its pass rate is {words}"):
    column_passes({"id": "7"} | row, 8)


def test_candidates_are_several_responses_or_one():
  assert candidate_responses({"id": "7", "responses": ["a", "b"], "response": "c"}) == ["a", "b"]
  assert candidate_responses({"id": "7", "response": "c"}) == ["c"]
  with pytest.raises(BadRow, match="row 7: has no 'responses'"):
    candidate_responses({"id": "7", "responses": [], "response": None})
  for wrong in ("boxed", [1], [["a"]]):
    with pytest.raises(BadRow, match="row 7: its candidate answers are not a list of texts"):
      candidate_responses({"id": "7", "responses": wrong})


def test_shards_of_other_machines_are_counted_and_not_changed(tmp_path):
  written = {0: b'{"problem": 0}\n', 1: b'{"problem": 1}\n{"prob'}
  for number, content in written.items():
    path = pathlib.Path(shard_folder(tmp_path, (number, 2)), FILE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
  (tmp_path / "curation" / ".DS_Store").touch()
  with pytest.raises(ValueError, match="the shards 1/2 are missing or not finished"):
    finished_shards(tmp_path, 3, lambda folder: None)
  assert path.read_bytes() == written[1]
  # By its own machine.
  assert drop_torn_line(path) == 1 and path.read_bytes() == b'{"problem": 1}\n'


@pytest.mark.parametrize("line", [b"\0\0\0", b'{"problem": 1', b"\xff"])
def test_a_damaged_line_is_named_with_the_remedy(tmp_path, line):
  path = tmp_path / FILE
  path.write_bytes(b'{"problem": 0}\n' + line + b'\n{"problem": 2}\n')
  with pytest.raises(ValueError, match=f"{FILE} line 2 is not JSON .* remove it and all lines beh"):
    list(read_problems([path]))


def test_shards_are_contiguous_and_cover_all_problems():
  assert [list(shard_numbers(10, (number, 3))) for number in range(3)] == [
    [0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
