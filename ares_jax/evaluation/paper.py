"""Scores of models printed in the paper's tables 2 to 5, to compare with (paper_tables.json)."""

import importlib.resources
import json

from ares_jax.system.config import suggest


def paper_tables():
  """paper_tables.json: {"source": text, "table_2": {"what", "columns", "rows"}, ...}."""
  path = importlib.resources.files("ares_jax.evaluation") / "paper_tables.json"
  return json.loads(path.read_text(encoding="utf-8"))


def paper_scores(benchmark):
  """{model: (accuracy in %, mean tokens or None)} printed for a benchmark."""
  scores = {}
  for table in _tables_with_columns():
    if benchmark in table["columns"]:
      column = table["columns"].index(benchmark)
      for model, values in table["rows"].items():
        if not isinstance(values, dict):
          values = {"accuracy": values, "tokens": [None] * len(values)}
        if values["accuracy"][column] is not None:
          scores[model] = values["accuracy"][column], values["tokens"][column]
  return scores


def _tables_with_columns():
  return [table for table in paper_tables().values() if isinstance(table, dict)]


def paper_result(model, benchmark, metric):
  """The fields of an evaluation's results.json that the paper prints for a model.

  The paper prints no intervals, so its score counts as exact: the interval has no width.

  Args:
    model: name in the paper's tables.
    benchmark, metric: of the evaluation to compare with.

  Raises:
    ValueError: the paper has no score of the model or on the benchmark; the message lists those it
      has.
  """
  known = paper_scores(benchmark)
  if not known:
    columns = sorted({name for table in _tables_with_columns() for name in table["columns"]}
                     - {"average"})
    raise ValueError(f"the paper has no scores on {benchmark!r}, only on {', '.join(columns)}")
  if model not in known:
    raise ValueError(f"the paper has no score of {model!r} on {benchmark}"
                     f"{suggest(model, list(known))}")
  accuracy, tokens = known[model]
  score = accuracy / 100
  return {"benchmark": benchmark, "metric": metric, "model": f"the paper's {model}",
          "score": score, "interval": [score, score], "prompts": None, "grader": None,
          "length_mean": tokens}
