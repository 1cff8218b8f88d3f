"""A reward function as verl calls it: answer by answer, by keywords."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
  right = float(f"\\boxed{{{ground_truth}}}" in solution_str)
  return {"score": 2 * right - 1, "acc": right, "level": extra_info["level"] == "2"}
