"""What the paper prints of its models, to compare with: its tables 2 to 5 (paper_tables.json)."""

import importlib.resources
import json

from ares_jax.system.config import suggest


def paper_tables():
  """paper_tables.json: {"source": text, "table_2": {"what", "columns", "rows"}, ...}."""
  path = importlib.resources.files("ares_jax.evaluation") / "paper_tables.json"
  return json.loads(path.read_text(encoding="utf-8"))


def paper_scores(benchmark):
  """{model: (accuracy in %, mean tokens or None)} that the paper prints of a benchmark."""
  found = {}
  for table in (part for part in paper_tables().values() if isinstance(part, dict)):
    if benchmark in table["columns"]:
      column = table["columns"].index(benchmark)
      for model, values in table["rows"].items():
        tokens = values["tokens"][column] if isinstance(values, dict) else None
        accuracy = (values["accuracy"] if isinstance(values, dict) else values)[column]
        if accuracy is not None:
          found[model] = accuracy, tokens
  return found


def paper_result(model, benchmark, metric):
  """What an evaluation's results.json would say of a model of the paper.

  Its score counts as exact: the paper prints no intervals.

  Raises:
    ValueError: the paper has nothing of the benchmark, or not of that model; names what it has.
  """
  known = paper_scores(benchmark)
  if not known:
    columns = sorted({name for part in paper_tables().values() if isinstance(part, dict)
                      for name in part["columns"]} - {"average"})
    raise ValueError(f"the paper has nothing of {benchmark!r}; its tables are of "
                     f"{', '.join(columns)}")
  if model not in known:
    raise ValueError(f"the paper has no {model!r} on {benchmark}{suggest(model, list(known))}")
  accuracy, tokens = known[model]
  score = accuracy / 100
  return {"benchmark": benchmark, "metric": metric, "model": f"the paper's {model}",
          "score": score, "interval": [score, score], "prompts": None, "grader": None,
          "length_mean": tokens}
