import json
import types

import numpy as np
import pytest
import tiny

from ares_jax.evaluation import held_out
from ares_jax.evaluation.held_out import evaluate_stage, level_table, stage_table
from ares_jax.sampling.rollout import Grades
from ares_jax.sampling.sampler import Samples

CONFIG = tiny.read(evaluate__problems=5, evaluate__samples=4, evaluate__batch=2)
SOURCE = [{"id": str(number), "number": number, "answer": "1", "level": 1 + number // 3}
          for number in range(6)]


class Fake:
  """Sampled answers of row i: `RIGHT[i]` of 4 right, length 10 (i + 1); greedy right for even i."""

  RIGHT = [4, 3, 2, 0, 0]
  end = (9,)

  def __init__(self):
    self.encoder = types.SimpleNamespace(
      encode=id, sizes=lambda encoded: np.zeros((len(encoded), 4), int),
      batch=lambda rows, indices, _, *, held, sizes: types.SimpleNamespace(
        rows=rows, indices=indices, held=held, sizes=sizes))

  def answer(self, params, prompts, key, *, group, sampling):
    lengths = [10 * (row["number"] + 1) for row in prompts.rows for _ in range(group)]
    samples = Samples(np.full((len(lengths), 60), 9),
                      np.arange(60) < np.array(lengths)[:, None], *[None] * 4)
    correct = []
    for row in prompts.rows:
      number = row["number"]
      correct += [float(number % 2 == 0)] if group == 1 else (
        [1.0] * self.RIGHT[number] + [0.0] * (4 - self.RIGHT[number]))
    texts = ["<think> x </think>" if row["number"] else "<think> </think>"
             for row in prompts.rows for _ in range(group)]
    return samples, Grades(texts, np.float32(correct), np.ones(len(correct), np.float32), 0)


def result(show=None):
  parts = types.SimpleNamespace(config=CONFIG, generator=Fake(), source=lambda name: SOURCE)
  return evaluate_stage(parts, None, show)


def test_means_over_the_problems_by_hand():
  got = result()
  assert got["greedy"]["accuracy"] == pytest.approx(3 / 5)
  assert got["sampled"]["accuracy"] == pytest.approx(9 / 20)
  assert got["sampled"]["pass_at_k"] == pytest.approx(3 / 5)
  assert got["sampled"]["length"] == pytest.approx(30)
  assert got["sampled"]["shows_work"] == pytest.approx(4 / 5)
  # Interval over problems: rates 1, .75, .5, 0, 0.
  rates = np.array([1, 0.75, 0.5, 0, 0])
  assert got["sampled"]["interval"] == pytest.approx(1.96 * rates.std(ddof=1) / 5**0.5)


def test_a_problem_is_read_and_encoded_once():
  generator, encoded = Fake(), []
  generator.encoder.encode = lambda row: encoded.append(row["number"])
  evaluate_stage(types.SimpleNamespace(config=CONFIG, generator=generator,
                                       source=lambda name: SOURCE), None)
  assert encoded == [0, 1, 2, 3, 4, 0]  # the first fills up the last batch


def test_the_texts_of_responses_are_not_kept(monkeypatch):
  seen, summarize = [], held_out.summarize
  monkeypatch.setattr(held_out, "summarize", lambda problems: seen.extend(
    sample.response for problem in problems for sample in problem.samples) or summarize(problems))
  result()
  assert set(seen) == {""}


def test_a_source_with_too_few_rows_is_refused():
  parts = types.SimpleNamespace(config=CONFIG, generator=Fake(), source=lambda name: SOURCE[:4])
  with pytest.raises(ValueError, match="5 problems to evaluate on, the source has 4; lower "
                                       "evaluate.problems"):
    evaluate_stage(parts, None)


def test_buckets_by_pass_rate_and_levels():
  got = result()
  assert [got["bucket"][name]["n"] for name in ("easy", "medium", "hard")] == [2, 1, 2]
  assert got["bucket"]["hard"]["length"] == pytest.approx(45)
  assert got["level"]["1"]["n"] == 3 and got["level"]["2"]["accuracy"] == 0


def test_tables_hold_every_stage():
  text = stage_table({"adacs": result(), "aepo": result()})
  assert [line.split()[0] for line in text.splitlines()] == ["stage", "adacs", "aepo", "5"]
  assert "pass@4" in text and "5 held-out problems, 4 samples each" in text
  assert "± is 1.96 standard errors over 5 problems" in text
  assert "60.0%" in text and "2 / 45.0" in text
  assert "1: 75.0% 20.0" in level_table({"adacs": result()})
  assert level_table({"adacs": result() | {"level": {}}}) == ""


def test_the_first_sampled_batch_is_shown():
  shown = []
  result(show=shown.append)
  [responses] = shown
  assert [row["id"] for row in responses.rows] == ["0", "1"] and responses.group == 4
  assert responses.correct == [1.0] * 4 + [1.0] * 3 + [0.0]


def test_a_stage_is_evaluated_once_and_its_seconds_are_added_up(tmp_path, monkeypatch):
  lines = [{"stage": "adacs", "step": 1, "seconds/step": 1.5},
           {"stage": "aepo", "step": 1, "seconds/step": 9.0},
           {"stage": "adacs", "step": 2, "seconds/step": 2.0, "loss": 1.0}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  evaluated = []
  monkeypatch.setattr(held_out, "evaluate_stage",
                      lambda parts, params, show: evaluated.append(params) or {"n": 5})
  parts = types.SimpleNamespace(config=CONFIG, generator=types.SimpleNamespace(
    encoder=types.SimpleNamespace(chat=None)))
  for params in ("first", "second"):
    held_out.StageResults(parts, str(tmp_path)).add("adacs", params)
  assert evaluated == ["first"]
  assert json.loads((tmp_path / "results.json").read_text()) == {
    "adacs": {"n": 5, "steps": CONFIG.adacs.steps, "seconds": {"step": 3.5}}}
