import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from ares_jax import aepo, mesh, responses, setup
from ares_jax.rollout import collect


class Prepared:
  """A tiny run with one graded rollout; half of the answers of each prompt count as right."""

  def __init__(self, devices=1, minibatch=8, microbatch=4):
    self.config = tiny.read(aepo__minibatch=minibatch, aepo__microbatch=microbatch)
    self.mesh = mesh.make_mesh(-1, 1, devices=jax.devices()[:devices])
    with jax.set_mesh(self.mesh), setup.open_run(self.config) as run:
      self.run, config = run, self.config.aepo
      self.params = run.init_params()
      source = run.source("prompts")
      prompts = run.generator.encoder.batch([source[i] for i in range(config.prompts)],
                                            np.arange(config.prompts))
      self.rollout = collect(run.generator, self.params, iter([prompts]), jax.random.key(0),
                             group=config.group, sampling=config.sampling, config=config.filter)
      right = np.float32([1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0])
      self.batch = self.rollout.batch.replace(correct=right)

  def step(self, config=None, batch=None, reference=None, step=aepo.aepo_step):
    config = config or self.config.aepo
    with jax.set_mesh(self.mesh):
      state = aepo.init_state(config, jax.tree.map(jnp.copy, self.params))
      rollout = dataclasses.replace(self.rollout, batch=batch or self.batch)
      return step(self.run.model, config, state, reference or self.params,
                  rollout.to_device(), mesh.put(self.run.words))


@pytest.fixture(scope="module")
def prepared():
  return Prepared()


def replace(config, **changes):
  """`replace(config, loss__average="sequence")`."""
  for path, value in changes.items():
    *parents, name = path.split("__")
    part = getattr(config, parents[0]) if parents else config
    value = dataclasses.replace(part, **{name: value}) if parents else value
    config = dataclasses.replace(config, **{parents[0] if parents else name: value})
  return config


def distance(first, second):
  return max(float(jnp.abs(a - b).max())
             for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_a_step_moves_the_decoder_but_not_the_frozen_vision_tower(prepared):
  state, metrics = prepared.step()
  assert int(state.step) == 1
  assert distance(state.params["blocks"], prepared.params["blocks"]) > 1e-4
  assert distance(state.params["vision"], prepared.params["vision"]) == 0
  assert all(np.isfinite(float(value)) for value in metrics.values())


@pytest.fixture(scope="module")
def whole(prepared):
  """Config of one update from one microbatch, its state and its metrics, far from the reference."""
  config = replace(prepared.config.aepo, minibatch=16, microbatch=16)
  return config, *prepared.step(config, reference=far(prepared))


def far(prepared):
  return jax.tree.map(lambda x: x * 1.2, prepared.params)


def test_at_the_first_update_ratio_is_one_and_kl_zero(prepared, whole):
  _, metrics = prepared.step(whole[0])
  np.testing.assert_allclose(metrics["loss/ratio"], 1, atol=1e-5)
  np.testing.assert_allclose(metrics["kl/mean"], 0, atol=1e-6)
  assert metrics["loss/sampler_gap"] < 1e-4
  np.testing.assert_allclose(metrics["loss/entropy"], metrics["response/entropy"], atol=1e-4)


def test_microbatches_do_not_change_the_update(prepared, whole):
  config, state, metrics = whole
  # Recomputed log-probabilities equal the sampler's, so this is checked along the way.
  config = replace(config, microbatch=4, loss__old_logprob="recompute")
  parts, part_metrics = prepared.step(config, reference=far(prepared))
  # Adam divides by the gradient's size: compare moments, which are the gradient.
  assert distance(state.opt_state, parts.opt_state) < 1e-5
  for name in ("loss/policy", "loss/kl", "kl/mean", "loss/entropy", "loss/ratio"):
    np.testing.assert_allclose(part_metrics[name], metrics[name], atol=1e-5, err_msg=name)
  for name in ("loss/ratio_max", "update/grad_norm"):
    np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-3, err_msg=name)
  assert metrics["loss/ratio_max"] >= 1


def test_sequence_average_weighs_responses_not_tokens(prepared, whole):
  config = replace(whole[0], microbatch=4, loss__average="sequence")
  _, metrics = prepared.step(config)
  # At ratio 1 the loss is minus the mean advantage: over responses, where lengths do not count.
  correct = prepared.batch.correct.reshape(4, 4)
  advantage = (correct - correct.mean(1, keepdims=True)) / correct.std(1, ddof=1, keepdims=True)
  lengths = prepared.batch.response_mask.sum(1)
  by_token = (advantage.ravel() * lengths).sum() / lengths.sum()
  np.testing.assert_allclose(metrics["loss/policy"], 0, atol=1e-5)
  np.testing.assert_allclose(whole[2]["loss/policy"], -by_token, atol=1e-5)
  assert abs(by_token) > 1e-3


def test_one_device_and_four_give_the_same_first_step(prepared, whole):
  four = Prepared(devices=4, minibatch=16, microbatch=16)
  np.testing.assert_array_equal(four.batch.tokens, prepared.batch.tokens)
  _, one_metrics = prepared.step(whole[0])
  state, four_metrics = four.step()
  for name, value in one_metrics.items():
    np.testing.assert_allclose(four_metrics[name], value, atol=1e-4, rtol=1e-4, err_msg=name)
  # The state stays where it was: a drifting layout would compile the second step anew.
  with jax.set_mesh(four.mesh):
    before = aepo.init_state(four.config.aepo, four.params)
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state),
                              strict=True):
    assert new.sharding.is_equivalent_to(old.sharding, old.ndim), jax.tree_util.keystr(path)
  # The logits of each device's own tokens: the form that TPU kernels and a split vocabulary need.
  assert "shard_map" in str(four.step(step=aepo.aepo_step.trace).jaxpr)


def test_groups_of_equal_correctness_teach_nothing(prepared):
  _, metrics = prepared.step(batch=prepared.batch.replace(correct=np.zeros(16, np.float32)))
  assert metrics["reward/no_signal"] == 1
  np.testing.assert_allclose(metrics["loss/policy"], 0, atol=1e-7)


def test_kl_controller_moves_towards_its_target(prepared, whole):
  config, state, metrics = whole
  share = np.array([metrics[f"bucket/share/{name}"] for name in ("easy", "medium", "hard")])
  outside = np.array([metrics[f"kl/outside/{name}"] for name in ("easy", "medium", "hard")])
  kl = config.kl
  kappa = np.clip(1 + kl.rate * (outside / np.array(kl.target) - 1), kl.low, kl.high)
  np.testing.assert_allclose(state.controllers.kappa, np.where(share > 0, kappa, 1), rtol=1e-5)
  assert (share > 0).sum() >= 2 and (np.abs(kappa[share > 0] - 1) > 1e-3).all()


def test_without_dynamic_kl_the_coefficient_stays_and_windows_get_no_relief(prepared, whole):
  state, metrics = prepared.step(replace(whole[0], kl__dynamic=False), reference=far(prepared))
  assert (np.asarray(state.controllers.kappa) == 1).all()
  np.testing.assert_allclose(metrics["loss/kl"], 0.01 * metrics["kl/mean"], rtol=1e-4)
  assert whole[2]["loss/kl"] < metrics["loss/kl"]


def test_a_gradient_that_is_not_finite_changes_nothing(prepared):
  logprob = prepared.batch.sampler_logprob.copy()
  logprob[prepared.batch.response_mask] = np.nan
  state, metrics = prepared.step(batch=prepared.batch.replace(sampler_logprob=logprob))
  assert metrics["update/skipped"] == 2
  assert distance(state.params, prepared.params) == 0
  assert np.isnan(state.controllers.threshold)  # not seeded by a batch that was thrown away
  assert (state.controllers.kappa == 1).all()


def test_rewarded_answers_become_more_probable(prepared, whole):
  state, _ = prepared.step(replace(whole[0], kl__beta=(0.0, 0.0, 0.0)))
  with jax.set_mesh(prepared.mesh):
    part = {"tokens": prepared.batch.tokens, "segment": prepared.batch.mask.astype(np.int32),
            "unit": prepared.batch.unit, "vision": prepared.batch.vision,
            "positions": np.moveaxis(prepared.batch.positions, 1, 0)}
    before, after = (np.where(prepared.batch.response_mask, aepo._logprob(
      prepared.run.model, params, part)[0], 0).sum(1) for params in (prepared.params, state.params))
  right = prepared.batch.correct.reshape(4, 4) == 1
  change = (after - before).reshape(4, 4)
  assert change[right].mean() > change[~right].mean() + 1e-3


@pytest.mark.parametrize("changes, words", [
  ({"aepo.group": 1}, "group = 1"), ({"aepo.minibatch": 6}, "minibatch = 6"),
  ({"aepo.microbatch": 2}, "microbatch = 2"), ({"aepo.branches": 4}, "branches = 4"),
])
def test_refuses_sizes_that_do_not_divide(changes, words):
  with pytest.raises(ValueError, match=words):
    tiny.read(**changes)


def test_all_samples_of_the_first_prompts_are_logged_token_by_token(prepared, tmp_path):
  rollout, chat = prepared.rollout, prepared.run.generator.encoder.chat
  parent, fork = np.full(16, -1), np.zeros(16, int)
  parent[1], fork[1] = 0, 3
  rollout = dataclasses.replace(rollout, batch=rollout.batch.replace(parent=parent, fork=fork))
  responses.write_rollouts(str(tmp_path), 1, rollout, group=4, count=2, chat=chat)
  lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
  assert [line["sample"] for line in lines] == [0, 1]
  assert lines[0]["id"] == lines[1]["id"] and lines[0]["response"] == rollout.texts[0]
  assert [(line["parent"], line["fork"]) for line in lines] == [(-1, 0), (0, 3)]
  assert lines[0]["pass_rate"] == rollout.batch.correct[:4].mean()
  for row, line in enumerate(lines):
    mask = rollout.batch.response_mask[row]
    np.testing.assert_allclose(line["entropy"], rollout.batch.entropy[row][mask], atol=6e-5)
    assert "".join(line["tokens"]).removesuffix("<|im_end|>") == line["response"]
  [name] = lines[0]["images"]
  shown, truth = Image.open(tmp_path / name), rollout.prompts.rows[0]["images"][0]
  assert np.abs(np.float32(shown) - np.float32(truth)).mean() < 5
