"""The paper's tables: transcribed without a slip, and found by benchmark and model."""

import pytest

from ares_jax.evaluation import benchmarks, paper


def test_printed_averages_are_those_of_the_rows():
  for number in (2, 3, 5):
    table = paper.paper_tables()[f"table_{number}"]
    for model, (*values, average) in table["rows"].items():
      known = [value for value in values if value is not None]
      assert len(values) == len(table["columns"]) - 1
      # Both are rounded to a decimal.
      assert sum(known) / len(known) == pytest.approx(average, abs=0.0501), model


def test_columns_are_benchmarks_and_models_are_found():
  for table in list(paper.paper_tables().values())[2:]:
    assert set(table["columns"]) <= {*benchmarks.benchmark_schemas(), "average"}
  assert paper.paper_scores()["mathverse_v"]["ARES-RL-7B"] == (56.5, 3198.3)
  assert paper.paper_scores()["mathvision"]["ARES-7B"] == (51.9, None)
  assert paper.paper_scores()["aime25"]["ARES-CS-7B"] == (55.0, 17895.0)
  assert "Gemini-2.5-Pro-Thinking" not in paper.paper_scores()["mmlu_pro"]  # none printed


def test_a_row_reads_as_results_and_unknown_ones_are_refused_by_name():
  row = paper.paper_result("ARES-7B", "dynamath", "worst")
  assert row["score"] == pytest.approx(0.397) and row["interval"] == [row["score"]] * 2
  with pytest.raises(ValueError, match="no score of 'ARES7B' on dynamath; did you mean 'ARES-7B'"):
    paper.paper_result("ARES7B", "dynamath", "worst")
  with pytest.raises(ValueError, match="no scores on 'generic', only on aime24, "):
    paper.paper_result("ARES-7B", "generic", "pass@1")
