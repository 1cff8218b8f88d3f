"""A reward function as verl calls it: answer by answer, by keywords."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
  right = float(f"\\boxed{{{ground_truth}}}" in solution_str)
  return {"score": 2 * right - 1, "acc": right, "level": extra_info["level"] == "2"}


def with_prediction(data_source, solution_str, ground_truth, extra_info=None):
  """A dict with a text, as verl's own score of DAPO returns."""
  scores = compute_score(data_source, solution_str, ground_truth, extra_info)
  return {"score": scores["score"], "acc": bool(scores["acc"]), "pred": solution_str[-9:]}


def without_score(data_source, solution_str, ground_truth):
  return {"acc": 1.0}
