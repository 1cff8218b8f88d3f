import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
import tiny

from ares_jax.data.images import VisionShape
from ares_jax.data.prompts import PromptBatch
from ares_jax.grading.pool import GraderError
from ares_jax.grading.scoring import Scores
from ares_jax.models import flops
from ares_jax.run import model as model_lib
from ares_jax.sampling.groups import FilterConfig, collect
from ares_jax.sampling.rollout import Grades
from ares_jax.sampling.sampler import Samples
from ares_jax.system.profiler import PhaseTimer


def prompts(first, count=2):
  tokens = np.array([[11, 12, 13], [21, 22, 0]] * count, np.int32)[:count]
  positions = np.tile(np.where(tokens > 0, np.arange(3), 0), (3, 1, 1)).astype(np.int32)
  unit = np.where(tokens == 12, 0, -1).astype(np.int32)
  length = (tokens > 0).sum(1).astype(np.int32)
  rows = [{"id": first + index, "answer": "1"} for index in range(count)]
  sizes = np.pad(length[:, None], ((0, 0), (0, 3))).astype(np.int64)
  return PromptBatch(tokens, length, positions, unit, [[]] * count, VisionShape(1, 28, 14, 2),
                     first + np.arange(count, dtype=np.int32), rows, np.arange(count), sizes)


def samples(rows):
  lengths = np.array([2, 1] * rows)[:rows]
  mask = np.arange(2) < lengths[:, None]
  tokens = np.where(mask, 100 + np.arange(rows)[:, None] * 10 + np.arange(2), 0)
  logprob, entropy = (np.where(mask, value, 0).astype(np.float32) for value in (-0.5, 1.5))
  return Samples(tokens.astype(np.int32), mask, logprob, entropy,
                 parent=np.full(rows, -1, np.int32), fork=np.zeros(rows, np.int32))


class Fake:
  """A generator whose answers are right for the prompts and samples it is told."""

  model = model_lib.model_config(tiny.read().model)
  history = mock.Mock(redrawn=0.25)

  def __init__(self, right):
    self.right, self.phases, self.end = right, PhaseTimer(), (101,)

  def answer(self, params, batch, key, *, group, sampling, branching):
    correct = np.concatenate([self.right[row["id"]] for row in batch.rows]).astype(np.float32)
    texts = [str(row["id"]) for row in batch.rows for _ in range(group)]
    return samples(len(batch.rows) * group), Grades(texts, correct, correct, 1)


def as_drawn(prompts_P, lengths_PG):
  return range(len(lengths_PG))


def gather(right, config, rewards=None):
  batches = iter([prompts(0), prompts(2), prompts(4)])
  return collect(Fake(right), None, batches, jax.random.key(0), group=2, order=as_drawn,
                 sampling=None, config=config, rewards=rewards)


ALL, NONE, HALF = [1, 1], [0, 0], [1, 0]


def test_filtering_samples_until_enough_groups_are_useful():
  rollout = gather([ALL, HALF, NONE, ALL, HALF, NONE], FilterConfig(3, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [1, 4]
  assert rollout.metrics["rollout/redrawn"] == 0.25
  assert rollout.texts == ["1", "1", "4", "4"]
  np.testing.assert_array_equal(rollout.correct, [1, 0, 1, 0])
  assert rollout.batches == 3 and rollout.metrics["rollout/filled"] == 0
  # Of all drawn: 2 groups all right, 2 half, 2 none; those kept are half right whatever is drawn.
  assert rollout.metrics["rollout/accuracy"] == pytest.approx(0.5)
  assert rollout.metrics["rollout/timed_out"] == 3


def test_filtering_by_reward_keeps_groups_whose_penalties_differ():
  def rewards(samples, grades):
    # Each batch has two prompts: the first one's right answers lose a quarter.
    return grades.correct * np.float32([0.75, 0.75, 1, 1])

  rollout = gather([ALL, ALL, ALL, NONE, HALF, ALL], FilterConfig(3, 0.01, 0.99, "reward"), rewards)
  assert [row["id"] for row in rollout.prompts.rows] == [0, 2] and rollout.batches == 2
  # It still learns from plain grades: the update adds the penalties itself.
  np.testing.assert_array_equal(rollout.correct, [1, 1, 1, 1])


def test_dropped_groups_fill_up_when_the_limit_is_reached():
  rollout = gather([ALL, HALF, NONE, ALL, ALL, NONE], FilterConfig(2, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [1, 0]
  assert rollout.batches == 2 and rollout.metrics["rollout/filled"] == 0.5
  assert rollout.metrics["rollout/accuracy"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_without_a_filter_there_is_one_accuracy():
  assert "rollout/accuracy" not in gather([ALL, HALF], FilterConfig(1, 0.01, 0.99)).metrics


def test_work_counts_every_sampled_token_once():
  class Branching(Fake):
    def answer(self, params, batch, key, **options):
      drawn, grades = super().answer(params, batch, key, **options)
      if batch.rows[0]["id"] == 0:
        return drawn, grades
      # The second batch has answers of 1 and 2 tokens; the last one's first is its parent's.
      return dataclasses.replace(drawn, mask=drawn.mask[::-1], fork=np.int32([0, 0, 0, 1])), grades

  batches = iter([prompts(0), prompts(2)])
  metrics = collect(Branching([ALL, HALF, NONE, HALF]), None, batches, jax.random.key(0), group=2,
                    order=as_drawn, sampling=None, config=FilterConfig(2, 0.01, 0.99)).metrics
  assert metrics["work/tokens"] == 6 + 5
  model = Fake.model
  # Prompts have 3 and 2 tokens.
  reading = 2 * (flops.text_flops(model, 3, heads=0) + flops.text_flops(model, 2, heads=0))
  pairs = [(3, 2), (3, 1), (2, 2), (2, 1)], [(3, 1), (3, 2), (2, 1), (3, 1)]
  drawing = sum(flops.decoding_flops(model, *pair) for batch in pairs for pair in batch)
  np.testing.assert_allclose(metrics["work/flops"], reading + drawing)


class Failing(Fake):
  """A generator with reward functions that fail on the answers to some prompts."""

  def __init__(self, right, failed):
    super().__init__(right)
    self.failed = failed

  def answer(self, params, batch, key, **options):
    drawn, grades = super().answer(params, batch, key, **options)
    failed = np.repeat([row["id"] in self.failed for row in batch.rows], 2)
    return drawn, dataclasses.replace(grades, scores=Scores(
      grades.correct, 2 * grades.correct, {"a": grades.correct}, failed, "f raises"))


def test_a_group_on_which_a_reward_function_failed_is_dropped_and_counted():
  def take(failed, config):
    return collect(Failing([ALL, HALF, NONE, HALF], failed), None, iter([prompts(0), prompts(2)]),
                   jax.random.key(0), group=2, order=as_drawn, sampling=None, config=config)

  # The others of its batch repeat; with a filter, further batches replace it.
  rollout = take({0}, FilterConfig(1, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [1, 1]
  assert rollout.metrics["rollout/failed_groups"] == 1
  np.testing.assert_array_equal(rollout.scores.reward, [2, 0, 2, 0])
  rollout = take({0}, FilterConfig(2, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [1, 3]
  # Of the groups on which none failed.
  assert rollout.metrics["rollout/accuracy"] == pytest.approx((0.5 + 0 + 0.5) / 3)
  with pytest.raises(GraderError, match="all 2 groups failed, the first: f raises"):
    take({0, 1}, FilterConfig(1, 0.01, 0.99))


def test_one_batch_means_no_filtering():
  rollout = gather([ALL, NONE], FilterConfig(1, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [0, 1]
  assert rollout.metrics["rollout/useful"] == 0  # neither group has both right and wrong answers


def test_prompts_come_in_the_order_that_their_lengths_call_for():
  class Long(Fake):
    def answer(self, params, batch, key, **options):
      drawn, grades = super().answer(params, batch, key, **options)
      mask = drawn.mask & (np.arange(8) < 4)[:, None]
      return dataclasses.replace(drawn, mask=mask), grades

  def order(prompts_P, lengths_PG):
    # Prompts have 3 and 2 tokens in turn, responses 2 and 1, those of prompts 2 and 3 none.
    np.testing.assert_array_equal(prompts_P, [3, 2, 3, 2])
    np.testing.assert_array_equal(lengths_PG, [[2, 1], [2, 1], [0, 0], [0, 0]])
    return [3, 1, 0, 2]

  rollout = collect(Long([ALL, ALL, NONE, HALF]), None, iter([prompts(0, 4)]), jax.random.key(0),
                    group=2, order=order, sampling=None, config=FilterConfig(1, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [3, 1, 0, 2]
  np.testing.assert_array_equal(rollout.correct, [1, 0, 1, 1, 1, 1, 0, 0])


def test_fraction_of_truncated_answers():
  rollout = gather([ALL, NONE], FilterConfig(1, 0.01, 0.99))
  # Row 0 ends with 101, the end token; the other three do not.
  assert rollout.metrics["rollout/truncated"] == pytest.approx(0.75)


def test_needs_at_least_one_batch():
  with pytest.raises(ValueError, match="batches"):
    FilterConfig(0, 0.01, 0.99)


def test_batches_of_several_shapes_are_filtered_into_one():
  wide = prompts(2)
  pad = ((0, 0), (0, 2))
  wide = dataclasses.replace(
    wide, tokens=np.pad(wide.tokens, pad), unit=np.pad(wide.unit, pad, constant_values=-1),
    positions=np.pad(wide.positions, ((0, 0), *pad)))
  rollout = collect(Fake([ALL, HALF, HALF, ALL]), None, iter([prompts(0), wide]),
                    jax.random.key(0), group=2, order=as_drawn, sampling=None,
                    config=FilterConfig(2, 0.01, 0.99))
  assert [row["id"] for row in rollout.prompts.rows] == [1, 2]
  np.testing.assert_array_equal(rollout.prompts.tokens, [[21, 22, 0, 0, 0], [11, 12, 13, 0, 0]])
  np.testing.assert_array_equal(rollout.prompts.unit[1], [-1, 0, -1, -1, -1])
  np.testing.assert_array_equal(rollout.samples.tokens, [[120, 121], [130, 0], [100, 101],
                                                         [110, 0]])


def test_joined_prompts_are_those_taken():
  both = PromptBatch.join([prompts(0).take([1]), prompts(2).take([0])], 3, 1)
  assert [row["id"] for row in both.rows] == [1, 2]
  np.testing.assert_array_equal(both.tokens, [[21, 22, 0], [11, 12, 13]])
  np.testing.assert_array_equal(both.prompt_id, [1, 2])
  assert both.positions.shape == (3, 2, 3)
