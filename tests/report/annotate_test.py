import dataclasses

import numpy as np
import pytest
from small_run import line, metrics, write

from ares_jax.report import statistics
from ares_jax.report.annotate import annotate
from ares_jax.run.records import read_run


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  return read_run(write(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def rows(records):
  return annotate(records.rollouts, records.metrics["aepo"], records.aepo_config())


def test_windows_flags_and_triggers_are_the_ones_of_the_method(rows):
  # Entropies 0 2 1 3 0 in windows of 2: means 1, 1.5, 2, 1.5; tau is 1.5.
  np.testing.assert_allclose(rows[0].mean, [1, 1.5, 2, 1.5, np.nan])
  np.testing.assert_array_equal(rows[0].flag, [False, True, True, True, False])
  np.testing.assert_array_equal(rows[0].cover, [False, True, True, True, True])
  np.testing.assert_array_equal(np.flatnonzero(rows[0].trigger), [1])  # wait
  assert rows[0].count == 3 and rows[0].threshold == 1.5


def test_the_window_behind_a_trigger_word_is_the_one_whose_kl_is_weak(records):
  config = records.aepo_config()
  config = dataclasses.replace(
    config, entropy=dataclasses.replace(config.entropy, detector="trigger"))
  row = annotate(records.rollouts, records.metrics["aepo"], config)[0]
  np.testing.assert_array_equal(np.flatnonzero(row.flag), [1])  # wait
  np.testing.assert_array_equal(np.flatnonzero(row.cover), [2, 3])


def test_the_reward_is_of_that_step_s_target_and_multiplier(rows):
  terms = {(row.line["step"], row.line["correct"]): row for row in rows}
  # Only step 2 of these has right and wrong answers: 3 HWE tokens, medium target 2, lambda 0.25.
  assert terms[2, 1.0].bucket == 1 and terms[2, 1.0].reward["shaping"] == 0
  assert terms[2, 0.0].reward["total"] == pytest.approx(-0.25)
  # Hard is penalised below its target of 3 only.
  assert terms[3, 0.0].bucket == 2 and terms[3, 0.0].reward["total"] == 0


def test_the_kl_weight_is_of_kappa_before_the_step(rows):
  # beta 0.01, kappa 1 at the start and 2 after step 1, rho 0.5.
  first, later = (next(row.reward for row in rows if row.line["step"] == step) for step in (1, 2))
  assert first["kl_outside"] == pytest.approx(0.01) and first["kl_inside"] == pytest.approx(0.005)
  assert later["kl_outside"] == pytest.approx(0.02) and later["kl_inside"] == pytest.approx(0.01)


def test_answers_come_back_in_their_order(records):
  lines = [line(1, sample, 1.0, 1.0) for sample in range(3)]
  lines[0] = lines[0] | {"tokens": ["a"] * 20, "entropy": [0.1] * 20}
  rows = annotate(lines, records.metrics["aepo"], records.aepo_config())
  assert [row.line["sample"] for row in rows] == [0, 1, 2]
  assert [len(row.flag) for row in rows] == [20, 5, 5]


def test_held_out_answers_have_the_last_threshold_and_no_reward(records):
  by_step = {1: metrics(1), 2: metrics(2) | {"hwe/threshold": 1.75}}
  row = annotate(records.held_out, by_step, records.aepo_config(), held_out=True)[0]
  assert row.threshold == 1.75 and row.count == 1 and row.reward is None
  before = annotate(records.held_out, {}, records.aepo_config(), held_out=True)[0]
  assert before.threshold is None and before.count is None and not before.flag.any()


def test_a_step_without_metrics_is_refused(records):
  with pytest.raises(ValueError, match=r"metrics.jsonl lacks: \[3\]"):
    annotate(records.rollouts, {1: metrics(1), 2: metrics(2)}, records.aepo_config())


def test_the_line_fits_and_empty_buckets_are_left_out(records, rows):
  assert statistics.length_against_count(rows) is None  # all alike: no line
  grown = [dataclasses.replace(row, count=index, flag=np.zeros(10 + 3 * index, bool))
           for index, row in enumerate(rows)]
  fit = statistics.length_against_count(grown)
  assert (fit["n"], len(fit["dots"])) == (12, 12)
  np.testing.assert_allclose([fit["slope"], fit["intercept"], fit["r"]], [3, 10, 1])
  bars = statistics.entropy_by_bucket(rows[:4])
  assert [(bar["bucket"], bar["n"], bar["count"]) for bar in bars] == [("easy", 4, 3)]
  assert bars[0]["entropy"] == pytest.approx(6 / 5)


def test_lengths_keep_the_order_of_difficulty_where_the_first_stage_has_no_easy_problem():
  def result(*counts):
    return {"bucket": {name: {"n": n, "length": 3.0, "accuracy": 0.5} for name, n in zip(
      ("easy", "medium", "hard"), counts, strict=True)}, "level": {}}

  found = statistics.lengths({"warmup": result(0, 1, 4), "aepo": result(2, 0, 3)})["bucket"]
  assert list(found) == ["easy", "medium", "hard"]
  assert [list(stages) for stages in found.values()] == [["aepo"], ["warmup"], ["warmup", "aepo"]]


def test_curves_keep_gaps_and_know_the_speed(records):
  curve = statistics.curves(records)["aepo"]
  assert curve["step"] == [1, 2, 3] and curve["values"]["hwe/count/hard"] == [1, None, 1]
  # 4 prompts x 8 answers x 5 tokens in half a second.
  assert curve["values"]["speed/rollout"][0] == 320
