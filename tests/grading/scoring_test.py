"""Reward functions of three forms, from files as their users have them, and what goes wrong."""

import pathlib

import numpy as np
import pytest

from ares_jax.grading import functions, scoring
from ares_jax.grading.pool import GraderError, GradingPool
from ares_jax.grading.scoring import ScoreConfig, Scorer, Scores, soft_overlong

FILES = pathlib.Path(__file__).parent / "rewards"
ROWS = [{"id": "a", "question": "3 + 4?", "answer": ["7"], "images": [], "level": "2",
         "columns": {"solution": "7", "task": "math", "answer": "7", "grade_level": 4}},
        {"id": "b", "question": "5 + 3?", "answer": ["8"], "images": [], "level": "1",
         "columns": {"solution": "8", "task": "code", "answer": "8", "grade_level": 9}}]
TEXTS = [r"<think> x </think> \boxed{7}", r"\boxed{6}", r"<think> y </think> \boxed{8}", "no box"]
LENGTHS = [5, 3, 2, 1]


def named(text):
  """The setting `function` with the folder of the files in place of "@"."""
  return text.replace("@", f"{FILES}/")


@pytest.fixture(scope="module")
def grader():
  with GradingPool(workers=1) as pool:
    yield pool


@pytest.fixture(scope="module")
def workers():
  """One pool of workers for all tests: each start costs a second."""
  pool = scoring.sandbox.make_pool(1, "ares_jax.grading.functions")
  yield pool
  pool.stop()
  pool.join()


def score(grader, workers, function="", texts=TEXTS, **config):
  scorer = Scorer(ScoreConfig(named(function), **config), grader, workers=1, timeout=2.0,
                  max_tokens=10)
  scorer._pool = workers
  scoring_ = scorer.begin()
  for index in reversed(range(len(texts))):  # in any order of arrival
    scoring_.add(index, texts[index], ROWS[index // 2], list(range(LENGTHS[index])))
  return scoring_.finish({index: [0.5] * LENGTHS[index] for index in range(len(texts))})


def test_ours_returns_a_bool_for_an_answer(grader, workers):
  correct, format_ok, timed_out, scores = score(grader, workers, "@ours.py:same")
  np.testing.assert_array_equal(correct, [1, 0, 1, 0])
  np.testing.assert_array_equal(format_ok, [1, 0, 1, 0])
  np.testing.assert_array_equal(scores.reward, [1, 0, 1, 0])
  assert timed_out == 0 and list(scores.components) == ["same"] and not scores.failed.any()


def test_ours_may_name_the_row_the_columns_and_the_entropies(grader, workers):
  correct, _, _, scores = score(grader, workers, "@ours.py:parts", threshold=0.7,
                                weights="accuracy=1, sure=0.1, level=-1")
  np.testing.assert_allclose(scores.accuracy, [0.75, 0.25, 0.75, 0.25])
  np.testing.assert_array_equal(correct, [1, 0, 1, 0])
  np.testing.assert_allclose(scores.components["sure"], -0.5 * np.float32(LENGTHS))
  np.testing.assert_array_equal(scores.components["grade"], [4, 4, 9, 9])
  np.testing.assert_allclose(scores.reward, [0.75 - 0.25 - 2, 0.25 - 0.15 - 2, 0.75 - 0.1 - 1,
                                             0.25 - 0.05 - 1], rtol=1e-6)


def test_a_function_that_needs_entropies_is_refused_where_a_teacher_s_answers_have_none(
    grader, workers):
  scorer = Scorer(ScoreConfig(named("@ours.py:parts"), accuracy="accuracy"), grader, workers=1,
                  timeout=2.0, max_tokens=10)
  scorer._pool = workers
  scorer.try_out(ROWS)
  with pytest.raises(GraderError, match="'NoneType' object is not iterable"):
    scorer.try_out(ROWS, entropies=False)


def test_ours_may_take_a_whole_batch(grader, workers):
  _, _, _, scores = score(grader, workers, "@ours.py:ranks", accuracy="grader")
  np.testing.assert_allclose(scores.reward, [1, 9 / 28, 1, 6 / 28], rtol=1e-6)
  # The grader looks for a box: of the last answer it finds none.
  np.testing.assert_array_equal(scores.accuracy, [1, 0, 1, 0])


def test_a_process_without_prompts_has_no_scores(grader, workers):
  correct, format_ok, timed_out, scores = score(grader, workers, "@ours.py:ranks", texts=[])
  assert (correct.shape, format_ok.shape, timed_out, scores.reward.shape) == ((0,), (0,), 0, (0,))
  assert scores.components == {} and scores.failure == ""


def test_easyr1_gets_a_list_of_dicts_and_its_overall_is_the_reward(grader, workers):
  correct, _, _, scores = score(grader, workers, "@easyr1.py:compute_score",
                                arguments="format_weight=0.5")
  np.testing.assert_array_equal(correct, [1, 0, 1, 0])
  np.testing.assert_allclose(scores.reward, [1, 0, 1, 0])
  assert {*scores.components} == {"overall", "format", "accuracy"}
  _, _, _, scores = score(grader, workers, "easyr1:@easyr1.py:compute_one")
  np.testing.assert_array_equal(scores.reward, [-1, 1, 1, 1])


def test_an_accuracy_outside_0_and_1_names_the_remedy(grader, workers):
  how = dict(function="@easyr1.py:signed", arguments="max_response_length=10")
  with pytest.raises(GraderError, match="is -1 by .*name the component that is one by reward.acc"):
    score(grader, workers, **how)
  _, _, _, scores = score(grader, workers, accuracy="share", **how)
  np.testing.assert_array_equal(scores.accuracy, [1, 0, 1, 0])
  np.testing.assert_allclose(scores.reward, [0.5, -1.3, 0.8, -1.1], rtol=1e-6)


def test_verl_is_called_answer_by_answer_and_its_score_is_the_reward(grader, workers):
  correct, _, _, scores = score(grader, workers, "@verl.py:compute_score")
  np.testing.assert_array_equal(scores.reward, [1, -1, 1, -1])
  np.testing.assert_array_equal(correct, [1, 0, 1, 0])
  assert {*scores.components} == {"overall", "acc", "level"}


def test_verls_texts_are_no_components_and_its_score_must_be_there(grader, workers):
  _, _, _, scores = score(grader, workers, "@verl.py:with_prediction")
  np.testing.assert_array_equal(scores.reward, [1, -1, 1, -1])
  assert {*scores.components} == {"overall", "acc"}
  with pytest.raises(GraderError, match="returns {'acc': 1.0}, which has no 'score'"):
    score(grader, workers, "@verl.py:without_score")


@pytest.mark.parametrize("function", ["@ours.py:keywords", "@ours.py:anything"])
def test_ours_may_take_keywords_alone(grader, workers, function):
  _, _, _, scores = score(grader, workers, function)
  np.testing.assert_array_equal(scores.reward, [1, 0, 1, 0])


def test_an_argument_of_the_user_goes_before_a_field(grader, workers):
  _, _, _, scores = score(grader, workers, "@ours.py:keywords", arguments="level='9', scale=2")
  assert not scores.reward.any()


def test_a_parameter_without_a_value_is_named(grader, workers):
  with pytest.raises(GraderError, match="parameter 'solutoin' is no column .*level, question"):
    score(grader, workers, "@ours.py:lacking")


def test_a_function_of_texts_that_gets_messages_says_what_to_write(grader, workers):
  with pytest.raises(GraderError, match="raises TypeError.*expects plain texts, write trl_text:"):
    score(grader, workers, "trl:@trl.py:task_of_texts")


def test_trl_gets_dialogues_columns_and_ids_and_weights_add_up(grader, workers):
  text = "@trl.py:accuracy_reward, @trl.py:short_reward"
  _, _, _, scores = score(grader, workers, text)
  np.testing.assert_allclose(scores.reward, [1.5, 0.7, 1.8, 0.9], rtol=1e-6)  # TRL's sum
  _, _, _, scores = score(grader, workers, text, weights="accuracy_reward=1, short_reward=0.5")
  np.testing.assert_allclose(scores.reward, [1.25, 0.35, 1.4, 0.45], rtol=1e-6)
  np.testing.assert_array_equal(scores.accuracy, [1, 0, 1, 0])


def test_none_of_one_function_leaves_an_answer_to_the_others(grader, workers):
  _, _, _, scores = score(grader, workers, "@trl.py:short_reward, @trl.py:task_reward",
                          accuracy="grader")
  np.testing.assert_allclose(scores.reward, [1.5, 0.7, 0.8, 0.9], rtol=1e-6)
  np.testing.assert_array_equal(scores.components["task_reward"], [1, 0, np.nan, np.nan])
  with pytest.raises(GraderError, match="returns None on .*boxed.*8.* for \\['8'\\]"):
    score(grader, workers, "@trl.py:task_reward")


@pytest.mark.parametrize("text, form, is_judge", [
  ("@ours.py:same", "answer", False), ("@ours.py:ranks", "batch", False),
  ("@easyr1.py:compute_score", "easyr1", False), ("@trl.py:accuracy_reward", "trl", False),
  ("@trl.py:task_reward", "trl_text", False), ("trl_text:@trl.py:short_reward", "trl_text", False),
  ("@verl.py:compute_score", "verl", False),
  ("judge:@ours.py:same", "answer", True), ("@trl.py:slow_reward", "trl", True),
  ("judge:easyr1:@ours.py:same", "easyr1", True)])
def test_a_prefix_or_the_signature_tells_the_form(text, form, is_judge):
  function, = functions.read_functions(named(text))
  assert (function.form, function.is_judge) == (form, is_judge)


@pytest.mark.parametrize("how, message", [
  ("raises", "raises KeyError: 'x'"), ("exits", "raises SystemExit"),
  ("None", "returns None"), ("nan", "returns nan, which is not finite"),
  ("text", "returns '1.0', neither a number nor a dict of numbers"),
  ("empty", "returns an empty dict"), ("length", "returns 3 scores for 2 answers"),
  ("dies", r"hangs or dies \(ProcessExpired, reward.timeout = 1.0 s\) on 2 answer"),
  ("hangs", r"hangs or dies \(TimeoutError, reward.timeout = 1.0 s\) on 2 answer")])
def test_a_failure_is_one_line_with_the_answer_or_the_answers_are_dropped(grader, workers, how,
                                                                        message):
  how = dict(function="@ours.py:odd", texts=[how, how], timeout=1.0)
  with pytest.raises(GraderError, match=f"{message}.* on '{how['texts'][0]}'") as error:
    score(grader, workers, **how)
  assert "\n" not in str(error.value) and "reward.failure=drop" in str(error.value)
  if how["texts"][0] in ("nan", "length"):
    correct, _, timed_out, scores = score(grader, workers, failure="drop", **how)
    assert scores.failed.all() and timed_out == 2 and not correct.any()
    assert message.split(",")[0] in scores.failure


def test_built_in_components_need_no_function(grader, workers):
  _, _, _, scores = score(grader, workers, weights="accuracy=1, format=0.1, overlong=0.5",
                          overlong=0.8)
  # 5, 3, 2 and 1 of 10 tokens: beyond the first 2 the penalty falls to -1 at 10.
  np.testing.assert_allclose(scores.components["overlong"], [-3 / 8, -1 / 8, 0, 0])
  np.testing.assert_allclose(scores.reward, [1.1 - 3 / 16, -1 / 16, 1.1, 0], rtol=1e-6)


def test_the_overlong_penalty_is_dapos():
  # DAPO's own numbers: 16,384 tokens expected, 4,096 more until the longest answer.
  for tokens, penalty in ((1, 0), (16384, 0), (18432, -0.5), (20480, -1)):
    assert soft_overlong(tokens, 20480, 0.2) == pytest.approx(penalty)


@pytest.mark.parametrize("changes, message", [
  (dict(weights="accuracy"), "weights = 'accuracy' is not of the form"),
  (dict(weights="acuracy=1"), "weights name 'acuracy'; did you mean 'accuracy'"),
  (dict(threshold=2.0), "threshold = 2.0"), (dict(timeout=0.0), "timeout = 0.0")])
def test_a_wrong_setting_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    ScoreConfig(**changes)


def test_a_weight_of_no_component_is_named(grader, workers):
  with pytest.raises(GraderError, match="names 'formatt', which no function returns; did you mean"):
    score(grader, workers, "@easyr1.py:compute_score", weights="accuracy=1, formatt=1")


@pytest.mark.parametrize("text, message", [
  ("@ours.py:none", "does not load: AttributeError"), ("nowhere.py:f", "does not load: FileNotFou"),
  ("ours", "is not of the form"), ("@ours.py:same, @ours.py:same", "two functions have one name")])
def test_a_function_that_does_not_load_is_one_line(text, message):
  with pytest.raises(ValueError, match=message):
    functions.read_functions(named(text))
  with pytest.raises(ValueError, match="has no name|not of the form"):
    functions.read_functions(named("@ours.py:same"), "2048")


def test_scores_of_two_hosts_join_by_component():
  one = Scores(*np.float32([[1], [1]]), {"a": np.float32([1])}, np.bool_([0]))
  two = Scores(*np.float32([[0], [2]]), {"b": np.float32([2])}, np.bool_([1]), "f raises")
  both = Scores.join([one, two])
  np.testing.assert_array_equal(both.components["a"], [1, np.nan])
  np.testing.assert_array_equal(both.take([1]).components["b"], [2])
  assert both.failure == "f raises"
