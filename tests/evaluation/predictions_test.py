import dataclasses
import json
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ares_jax.evaluation import predictions
from ares_jax.evaluation.benchmarks import Benchmark
from ares_jax.evaluation.graded import EvaluationSettings, verdicts
from ares_jax.sampling.rollout import Grades
from ares_jax.sampling.sampler import Samples
from ares_jax.system import heartbeat

ROWS = [{"id": f"r{number}", "source": "s", "question": f"q{number}", "answer": [str(number)],
         "images": [], "level": 1, "group": None, "step": None, "tolerance": 0.5 * (number == 4)}
        for number in range(5)]
SAMPLING = dataclasses.replace(tiny.read().aepo.sampling, temperature=1.0, max_tokens=6)
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3)}


class Fake:
  """Answers row i with i, right, or from row 3 on with i + .25; in i + 1 tokens, cut off in row 4.
  """

  end = (9,)
  model = types.SimpleNamespace(compute_dtype="float32")

  def __init__(self, fail_at=None, grader="layered", max_pixels=9):
    self.grader = types.SimpleNamespace(name=grader)
    self.encoder = types.SimpleNamespace(
      chat=types.SimpleNamespace(suffix=" Think.", text=lambda tokens: said(len(tokens) - 1)),
      config=types.SimpleNamespace(min_pixels=1, max_pixels=max_pixels),
      encode=id, sizes=lambda encoded: np.zeros((len(encoded), 4), int),
      batch=lambda rows, indices, _, *, held, sizes: types.SimpleNamespace(
        rows=rows, indices=indices, held=held, sizes=sizes))
    self.calls, self.fail_at = [], fail_at

  def answer(self, params, prompts, key, *, group, sampling):
    if self.grader.name == "never":
      raise AssertionError("the grader was asked")
    samples = self.sample(params, prompts, key, group=group, sampling=sampling)
    indices = np.repeat(prompts.indices, group)
    return samples, Grades([said(index) for index in indices], np.float32(indices < 3),
                           np.ones(len(indices), np.float32), 1)

  def sample(self, params, prompts, key, *, group, sampling):
    self.calls.append(list(prompts.indices))
    if len(self.calls) == self.fail_at:
      raise KeyboardInterrupt
    lengths = np.repeat(np.int32(prompts.indices) + 1, group)
    tokens = np.ones((len(lengths), 6), np.int32)
    tokens[np.arange(len(lengths)), lengths - 1] = np.where(lengths == 5, 1, 9)
    return Samples(tokens, np.arange(6) < lengths[:, None], *[None] * 4)


def said(index):
  return f"<think> </think> \\boxed{{{index + (0 if index < 3 else 0.25)}}}"


def predict(path, generator, rows=ROWS, params=PARAMS, n=2, sampling=SAMPLING, judge=""):
  settings = EvaluationSettings(n, sampling, judge)
  return predictions.predict(generator, params, Benchmark("mine", rows, "avg@n", n), settings,
                             batch=2, path=str(path), model="m")


def test_every_problem_gets_its_samples(tmp_path):
  head, problems = predict(tmp_path / "p.jsonl", Fake())
  assert [problem.id for problem in problems] == ["r0", "r1", "r2", "r3", "r4"]
  assert [len(problem.samples) for problem in problems] == [2] * 5
  # 4.25 is within the .5 that row 4 allows; 3.25 is not 3.
  assert [problem.samples[0].correct for problem in problems] == [1, 1, 1, 0, 1]
  assert [problem.samples[1].truncated for problem in problems] == [0, 0, 0, 0, 1]
  assert [problem.samples[0].tokens for problem in problems] == [1, 2, 3, 4, 5]
  assert sum(problem.timed_out for problem in problems) == 3  # one a batch
  assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0]) == head


def test_a_run_cut_off_goes_on_and_says_the_same(tmp_path):
  whole = predict(tmp_path / "whole.jsonl", Fake())[1]
  with pytest.raises(KeyboardInterrupt):
    predict(tmp_path / "p.jsonl", Fake(fail_at=3))
  text = (tmp_path / "p.jsonl").read_text()
  (tmp_path / "p.jsonl").write_text(text[:-20])  # the last line was cut off too
  again = Fake()
  problems = predict(tmp_path / "p.jsonl", again)[1]
  assert again.calls == [[2, 3], [4, 0]]
  for problem, other in zip(problems, whole, strict=True):
    assert dataclasses.replace(problem, seconds=0) == dataclasses.replace(other, seconds=0)
  finished = Fake()
  predict(tmp_path / "p.jsonl", finished)
  assert finished.calls == []


@pytest.mark.parametrize("generator, changes, word", [
  ({}, {"params": {"w": jnp.arange(6.0).reshape(2, 3)[::-1]}}, "weights was"),
  ({}, {"params": {"v": PARAMS["w"]}}, "weights was"),
  ({}, {"rows": [*ROWS[:4], ROWS[4] | {"question": "other"}]}, "prompts was"),
  ({}, {"rows": [*ROWS[:4], ROWS[4] | {"images": [b"x"]}]}, "prompts was"),
  ({}, {"rows": [*ROWS[:4], ROWS[4] | {"tolerance": 0.1}]}, "prompts was"),
  ({}, {"n": 3}, "n was 2, is 3"),
  ({}, {"sampling": dataclasses.replace(SAMPLING, temperature=0.5)}, "temperature was 1.0"),
  ({"grader": "release"}, {}, "grader was 'layered'"),
  ({"max_pixels": 8}, {}, "max_pixels was 9"),
])
def test_answers_of_something_else_are_refused(tmp_path, generator, changes, word):
  predict(tmp_path / "p.jsonl", Fake())
  with pytest.raises(ValueError, match=f"p.jsonl holds other answers: .*{word}"):
    predict(tmp_path / "p.jsonl", Fake(**generator), **changes)


def lenient(items):
  assert all(set(item) == {"id", "question", "truths", "response", "answer"} for item in items)
  assert all(isinstance(item["truths"], list) for item in items)
  return np.array([item["answer"].startswith(item["truths"][0]) and item["id"] != "r4"
                   for item in items])


def breaks(items):
  if items[0]["id"] == "r2":
    raise KeyError("no key")
  return lenient(items)


def few(items):
  return [1]


def takes_long(items):
  heartbeat._process.last_heartbeat -= 3600
  turns = iter([False, True])
  heartbeat._watch(types.SimpleNamespace(wait=lambda _: next(turns)), os.devnull, 60)
  return [True] * len(items)


def half(items):
  return [0.5] * len(items)


def leaves(items):
  raise SystemExit(0)


def test_a_judge_has_the_last_word_and_is_asked_about_each_answer_once(tmp_path):
  judge = f"{__name__}:lenient"
  rows = [ROWS[0], ROWS[1] | {"answer": "1"}, *ROWS[2:]]  # generated data have one text
  head, problems = predict(tmp_path / "p.jsonl", Fake(grader="never"), rows=rows, judge=judge)
  # 3.25 passes with this judge; 4.25 does not, though it is within the tolerance of row 4.
  assert [problem.samples[1].correct for problem in problems] == [1, 1, 1, 1, 0]
  assert head["grader"] == judge and all(problem.timed_out == 0 for problem in problems)
  assert all(sample.format_ok for problem in problems for sample in problem.samples)
  with pytest.raises(ValueError, match="grader was '.*:lenient', is 'layered'"):
    predict(tmp_path / "p.jsonl", Fake(), rows=rows)
  with pytest.raises(ValueError, match=r"judge '.*:breaks' raises KeyError: 'no key' on 4 answers "
                                       "from 'r2' on; those before are kept"):
    predict(tmp_path / "q.jsonl", Fake(), judge=f"{__name__}:breaks")
  assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 3  # the head and two problems


@pytest.mark.parametrize("judge, words", [
  ("few", "returns 1 verdicts for 4 answers"), ("half", "returns 0.5 for 'r0', neither 0 nor 1"),
  ("none", "judge '.*:none' does not load"), ("leaves", "judge '.*:leaves' raises SystemExit: 0")])
def test_a_judge_that_says_something_else_is_named(tmp_path, judge, words):
  with pytest.raises(ValueError, match=words):
    predict(tmp_path / "p.jsonl", Fake(), judge=f"{__name__}:{judge}")


def test_a_judge_without_a_module_is_told_its_form(tmp_path):
  with pytest.raises(ValueError, match="^judge 'mine' is not of the form 'package.module:func"):
    predict(tmp_path / "p.jsonl", Fake(), judge="mine")


def test_a_judge_that_takes_long_is_no_stall(monkeypatch):
  ended = []
  monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
  heartbeat.heartbeat()
  assert verdicts(f"{__name__}:takes_long", [(ROWS[0], "text")]) == [1.0] and ended == []
  takes_long([])
  heartbeat._disarm()  # the process did not end
  assert ended == [75]


def test_an_image_file_that_was_replaced_is_another_prompt(tmp_path):
  picture = tmp_path / "a.png"
  picture.write_bytes(b"one")
  rows = [*ROWS[:4], ROWS[4] | {"images": [str(picture)]}]
  predict(tmp_path / "p.jsonl", Fake(), rows=rows)
  picture.write_bytes(b"two")
  with pytest.raises(ValueError, match="prompts was"):
    predict(tmp_path / "p.jsonl", Fake(), rows=rows)


def test_problems_of_one_id_keep_their_own_answers(tmp_path):
  rows = [row | {"id": "same"} for row in ROWS]
  for _ in range(2):
    problems = predict(tmp_path / "p.jsonl", Fake(), rows=rows)[1]
    assert [problem.samples[0].tokens for problem in problems] == [1, 2, 3, 4, 5]


def test_a_file_with_the_field_names_of_older_runs_is_continued(tmp_path):
  problems = predict(tmp_path / "p.jsonl", Fake())[1]
  text = (tmp_path / "p.jsonl").read_text()
  assert text.count('"shows_work": 0.0, ') == 2 * len(ROWS)
  (tmp_path / "p.jsonl").write_text(
    text.replace('"index":', '"place":').replace('"format_ok":', '"formatted":')
    .replace('"shows_work": 0.0, ', ""))
  again = Fake()
  assert predict(tmp_path / "p.jsonl", again)[1] == problems and again.calls == []
