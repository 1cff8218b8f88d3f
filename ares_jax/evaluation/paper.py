"""Scores of models printed in the paper's tables 2 to 5, to compare with (paper_tables.json)."""

import importlib.resources
import json

from ares_jax.system.config import suggest


def paper_tables():
  """paper_tables.json: {"source": text, "table_2": {"what", "columns", "rows"}, ...}."""
  path = importlib.resources.files("ares_jax.evaluation") / "paper_tables.json"
  return json.loads(path.read_text(encoding="utf-8"))


def paper_scores():
  """{benchmark: {model: (accuracy in %, mean tokens or None)}} of all printed scores."""
  scores = {}
  for table in (table for table in paper_tables().values() if isinstance(table, dict)):
    for model, values in table["rows"].items():
      if not isinstance(values, dict):
        values = {"accuracy": values, "tokens": [None] * len(values)}
      cells = zip(table["columns"], values["accuracy"], values["tokens"], strict=True)
      for benchmark, accuracy, tokens in cells:
        if accuracy is not None and benchmark != "average":
          scores.setdefault(benchmark, {})[model] = accuracy, tokens
  return scores


def paper_result(model, benchmark, metric):
  """The fields of an evaluation's results.json that the paper prints for a model.

  The paper prints no intervals, so its score counts as exact: the interval has no width.

  Raises:
    ValueError: the paper has no such score; names the models or benchmarks that have one.
  """
  known = dict(sorted(paper_scores().items()))
  if benchmark not in known:
    raise ValueError(f"the paper has no scores on {benchmark!r}, only on {', '.join(known)}")
  if model not in known[benchmark]:
    raise ValueError(f"the paper has no score of {model!r} on {benchmark}"
                     f"{suggest(model, list(known[benchmark]))}")
  accuracy, tokens = known[benchmark][model]
  score = accuracy / 100
  return {"benchmark": benchmark, "metric": metric, "model": f"the paper's {model}",
          "score": score, "interval": [score, score], "prompts": None, "grader": None,
          "length_mean": tokens}
