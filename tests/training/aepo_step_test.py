import dataclasses
import functools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from training.sft_step_test import between

from ares_jax import aepo
from ares_jax.diagnose import replay
from ares_jax.models import lora, weights
from ares_jax.run import files, responses, setup
from ares_jax.run.checkpoint.manager import Checkpoints
from ares_jax.sampling.groups import collect
from ares_jax.sampling.rollout import Grades
from ares_jax.system import mesh
from ares_jax.training import aepo_step, gradient_terms, minibatches, policy_gradient


class Prepared:
  """A tiny run with one graded rollout; half of the answers of each prompt count as right."""

  def __init__(self):
    self.config = tiny.read(aepo__minibatch=8)
    with jax.set_mesh(mesh_of(1)), setup.open_run(self.config) as run:
      self.run, config = run, self.config.aepo
      self.params = run.init_params()
      source = run.source("rl")
      prompts = run.generator.encoder.batch([source[i] for i in range(config.prompts)],
                                            np.arange(config.prompts))
      self.rollout = collect(
        run.generator, self.params, iter([prompts]), jax.random.key(0), group=config.group,
        order=lambda prompts_P, _: range(len(prompts_P)), sampling=config.sampling,
        config=config.filter)
      right = np.float32([1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0])
      self.rollout = dataclasses.replace(self.rollout, correct=right)

  def step(self, config=None, reference=None, step=aepo_step.aepo_step, layout=(1,), **changes):
    """A step from the first weights; `layout` as for mesh_of, `changes` are of the rollout."""
    config, model = config or self.config.aepo, self.run.model
    layout = mesh_of(*layout)
    shardings = weights.shardings(weights.weight_table(model), layout)
    # Copies: the step is given the state's memory.
    params, reference = (
      jax.device_put(jax.tree.map(jnp.copy, tree), shardings)
      for tree in (self.params, reference or self.params))
    with jax.set_mesh(layout):
      batch, _ = aepo.pack_rollout(dataclasses.replace(self.rollout, **changes), config,
                              self.run.generator.encoder)
      return step(model, config, aepo_step.init_state(config, params), reference, batch,
                  mesh.put(self.run.trigger_V))


def mesh_of(devices, slices=1, model=1):
  return mesh.make_mesh(-1, model, devices=jax.devices()[:devices], slices=slices)


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
  return max(float(np.abs(np.subtract(a, b)).max())
             for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.fixture(scope="module")
def halves(prepared):
  """State and metrics of a step of two updates, far from the reference."""
  return prepared.step(reference=far(prepared))


def test_a_step_moves_the_decoder_but_not_the_frozen_vision_tower(prepared, halves):
  state, metrics = halves
  assert int(state.step) == 1
  assert distance(state.params["blocks"], prepared.params["blocks"]) > 1e-4
  assert distance(state.params["vision"], prepared.params["vision"]) == 0
  assert all(np.isfinite(float(value)) for value in metrics.values())


@pytest.fixture(scope="module")
def one_update(prepared):
  """Config of one update from one microbatch, its state and its metrics, far from the reference."""
  config = replace(prepared.config.aepo, minibatch=16, microbatch=8)
  return config, *prepared.step(config, reference=far(prepared))


def far(prepared):
  # The frozen tower is the reference's too.
  return jax.tree.map(lambda x: x * 1.2, prepared.params) | {"vision": prepared.params["vision"]}


def test_at_the_first_update_ratio_is_one_and_kl_zero(prepared, one_update):
  _, metrics = prepared.step(one_update[0])
  np.testing.assert_allclose(metrics["loss/ratio"], 1, atol=1e-5)
  np.testing.assert_allclose(metrics["kl/mean"], 0, atol=1e-6)
  assert metrics["loss/sampler_gap"] < 1e-4
  np.testing.assert_allclose(metrics["loss/entropy"], metrics["response/entropy"], atol=1e-4)


def assert_same(first, second):
  """Two steps' states and metrics."""
  (state, metrics), (other, other_metrics) = first, second
  # Adam divides by the gradient's size: compare moments, which are the gradient.
  assert distance(state.opt_state, other.opt_state) < 1e-5
  assert distance(state.controllers, other.controllers) < 1e-5
  for name, value in metrics.items():
    tolerance = dict(rtol=1e-3) if name in ("loss/ratio_max", "update/grad_norm") else {}
    np.testing.assert_allclose(other_metrics[name], value, **dict(rtol=1e-5, atol=1e-5) | tolerance,
                               err_msg=name)


@pytest.mark.slow
def test_neither_packing_nor_microbatches_change_the_update(prepared, one_update, monkeypatch):
  config, *packed = one_update
  with jax.set_mesh(mesh_of(1)):
    _, packing = aepo.pack_rollout(prepared.rollout, config, prepared.run.generator.encoder)
  assert packing["pack/rows"] <= 8
  # One sequence a row, two rows a gradient.
  monkeypatch.setattr(minibatches, "first_fit",
                      lambda sizes, _: [[index] for index in range(len(sizes))])
  alone = replace(config, microbatch=2, row_tokens=(38,))
  assert_same(packed, prepared.step(alone, reference=far(prepared)))
  assert packed[1]["loss/ratio_max"] >= 1


def logprobs(prepared, config):
  """float32 [B, T]: log-probability of every response token by weights far from the sampler's."""
  model, params = prepared.run.model, far(prepared)
  with jax.set_mesh(mesh_of(1)):
    batch, packing = aepo.pack_rollout(prepared.rollout, config, prepared.run.generator.encoder)
    images = policy_gradient.frozen_features(model, params, batch.vision, minibatches=1)
    found = policy_gradient.old_logprobs(model, config, params,
                                         policy_gradient.Minibatch(batch.rows, images))
  rows, logprob_BT = jax.device_get(batch.rows), np.zeros(batch.tokens.shape, np.float32)
  logprob_BT[rows.sequence[rows.response_mask], rows.response_index[rows.response_mask]] = (
    np.asarray(found)[rows.response_mask])
  return logprob_BT, rows, packing


def test_shared_prompts_change_no_update(prepared, one_update):
  # Rows so short that some groups are in two of them.
  config = replace(one_update[0], share_prompts=True, row_tokens=(46,))
  logprob_BT, rows, packing = logprobs(prepared, config)
  np.testing.assert_allclose(logprob_BT, logprobs(prepared, one_update[0])[0], atol=1e-5)
  assert packing["pack/shared"] > 0.2 and (rows.unit >= 0).any()
  groups = [set((row[row > 0] // 4).tolist()) for row in rows.sequence.reshape(-1, 46)]
  assert sum(map(len, groups)) > 4
  assert_same(one_update[1:], prepared.step(config, reference=far(prepared)))


@pytest.mark.slow
def test_shared_prompts_change_no_update_of_other_kinds(prepared, one_update):
  # The trained tower, minibatches, ratios of sequences; 4 devices as 2 slices x 2 of "model".
  config = replace(one_update[0], loss__old_logprob="recompute", frozen=(), minibatch=8,
                   loss__ratio="sequence")
  shared = replace(config, share_prompts=True, row_tokens=(46,))
  first, second = (prepared.step(each, reference=far(prepared), layout=(4, 2, 2))
                   for each in (config, shared))
  assert_same(first, second)


@pytest.mark.slow
def test_shared_prompts_change_no_update_of_adapters(prepared, one_update):
  config, model = one_update[0], prepared.run.model
  section = lora.LoraConfig(rank=2, alpha=4.0, targets=("q", "v", "down"))

  def step(config):
    with jax.set_mesh(mesh_of(1)):
      base = lora.Base(jax.tree.map(jnp.copy, prepared.params), scale=2.0)
      # B is not 0, so that A has a gradient; the reference has other adapters.
      first = lora.init(model, section, jax.random.key(0))
      params, reference = (jax.tree.map(functools.partial(jnp.add, x), first) for x in (0.01, 0.02))
      batch, _ = aepo.pack_rollout(prepared.rollout, config, prepared.run.generator.encoder)
      return aepo_step.aepo_step(model, config, aepo_step.init_state(config, params, base),
                                 reference, batch, mesh.put(prepared.run.trigger_V), base)

  first, second = step(config), step(replace(config, share_prompts=True, row_tokens=(46,)))
  assert_same(first, second)
  assert set(first[0].params) == {"q", "v", "down"} and first[1]["kl/mean"] > 1e-4
  assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(
    first[0].opt_state) if x.ndim > 1) > 0


@pytest.mark.slow
def test_recomputed_log_probabilities_are_those_before_the_first_minibatch(prepared, halves):
  config = replace(prepared.config.aepo, loss__old_logprob="recompute")
  state, metrics = prepared.step(config, reference=far(prepared))
  # They equal the sampler's, from which the second minibatch has moved away.
  assert distance(state.opt_state, halves[0].opt_state) < 1e-4
  np.testing.assert_allclose(metrics["loss/ratio_max"], halves[1]["loss/ratio_max"], rtol=1e-3)
  assert metrics["loss/ratio_max"] > 1.001


@pytest.mark.slow
@pytest.mark.parametrize("old", ["sampler", "recompute"])
def test_how_far_the_policy_moves_is_no_gap_to_the_sampler(prepared, old):
  # Rates of 10 and 100 thousand times the recipes' move the second minibatch's policy afar.
  config = replace(prepared.config.aepo, loss__old_logprob=old, optimizer__learning_rate=0.1,
                   loss__sampler_gap=(1e-3, 1e-3))
  _, metrics = prepared.step(config)
  assert metrics["loss/ratio_max"] > 1.1
  assert metrics["loss/sampler_gap"] < 1e-4 and metrics["update/skipped"] == 0


@pytest.mark.slow
def test_sequence_average_weighs_responses_not_tokens(prepared, one_update):
  config = replace(one_update[0], microbatch=4, loss__average="sequence")
  _, metrics = prepared.step(config)
  # At ratio 1 the loss is minus the mean advantage: over responses, where lengths do not count.
  correct = prepared.rollout.correct.reshape(4, 4)
  advantage = (correct - correct.mean(1, keepdims=True)) / correct.std(1, ddof=1, keepdims=True)
  lengths = prepared.rollout.samples.mask.sum(1)
  by_token = (advantage.ravel() * lengths).sum() / lengths.sum()
  np.testing.assert_allclose(metrics["loss/policy"], 0, atol=1e-5)
  np.testing.assert_allclose(one_update[2]["loss/policy"], -by_token, atol=1e-5)
  assert abs(by_token) > 1e-3


def test_averages_divide_by_tokens_sequences_or_the_longest_answer():
  # A minibatch of two answers of the four, of 1 and 3 tokens; the longest may have 4.
  rows = types.SimpleNamespace(response_mask=np.bool_([[[1, 1, 1, 1, 0]]]),
                               sequence=np.int32([[[0, 1, 1, 1, 0]]]))
  signal = types.SimpleNamespace(length=np.int32([1, 3, 2, 2]))
  config = types.SimpleNamespace(minibatch=2, sampling=types.SimpleNamespace(max_tokens=4))
  for average, divisor in (("token", 4), ("sequence", 2), ("sum", 2), ("constant", 8)):
    config.loss = types.SimpleNamespace(average=average)
    found = policy_gradient.minibatch_divisors(config, rows, signal)
    np.testing.assert_allclose(found.loss, divisor)


def test_the_gap_to_the_sampler_is_a_mean_over_tokens():
  sums = types.SimpleNamespace(metrics={"loss/sampler_gap": np.float32([0.1, 0.4]),
                                        "loss/kl": np.float32([1, 3])},
                               nonfinite={}, ratio_max=np.ones(2))
  updates = {"grad_norm": np.ones(2), "skipped": np.zeros(2)}
  metrics = aepo_step._over_minibatches(sums, updates, np.int32([300, 100]))
  np.testing.assert_allclose(metrics["loss/sampler_gap"], (300 * 0.1 + 100 * 0.4) / 400, rtol=1e-6)
  assert metrics["loss/kl"] == 2  # these two are parts of the batch's mean already


# Devices, slices and the "model" axis.
@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 1), (4, 1, 1), (4, 2, 1), (4, 2, 2)])
def test_several_devices_give_the_same_step(prepared, one_update, layout):
  config, *one = one_update
  programs = []

  def step(*arguments):
    programs.append(aepo_step.aepo_step.lower(*arguments).compile())
    return programs[0](*arguments[2:])

  state, metrics = prepared.step(config, reference=far(prepared), step=step, layout=layout)
  assert_same(one, (state, metrics))
  if layout[1] > 1:
    # Slices meet in the loop over minibatches, but in none inside it. Of sums that were made one,
    # whose names stand behind each other, the first tells.
    names = [re.search(r'op_name="([^":]*)', line)[1] for line in between(programs[0].as_text())]
    assert {name.count("while/body") for name in names} == {0, 1}
  # The state stays where it was: a drifting layout would compile the second step anew.
  layout = mesh_of(*layout)
  with jax.set_mesh(layout):
    before = aepo_step.init_state(config, jax.device_put(
      prepared.params, weights.shardings(weights.weight_table(prepared.run.model), layout)))
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state),
                              strict=True):
    assert new.sharding.is_equivalent_to(old.sharding, old.ndim), jax.tree_util.keystr(path)


def test_devices_work_on_their_own_tokens(prepared, one_update):
  # The form that TPU kernels and a split vocabulary need.
  traced = prepared.step(one_update[0], step=aepo_step.aepo_step.trace, layout=(4,))
  assert "shard_map" in str(traced.jaxpr)


def test_groups_of_equal_correctness_teach_nothing(prepared):
  _, metrics = prepared.step(correct=np.zeros(16, np.float32))
  assert metrics["reward/no_signal"] == 1
  np.testing.assert_allclose(metrics["loss/policy"], 0, atol=1e-7)


def test_the_filter_reads_the_rewards_of_the_step(prepared, one_update):
  config, rollout = one_update[0], prepared.rollout
  grades = Grades(rollout.texts, rollout.correct, rollout.format_ok, 0)
  trigger_V = prepared.run.trigger_V
  with jax.set_mesh(mesh_of(1)):
    controllers = aepo_step.init_state(config, prepared.params).controllers.replace(
      threshold=jnp.float32(1), hwe_target=jnp.float32([0, 0, 20]))
    drawn_B = aepo.drawn_rewards(config, controllers, trigger_V, rollout.samples, grades)
    batch, _ = aepo.pack_rollout(rollout, config, prepared.run.generator.encoder)
    reward_B = aepo_step.update_signal(config, controllers, batch, trigger_V)[1]
  np.testing.assert_array_equal(drawn_B, reward_B)
  assert (drawn_B < rollout.correct).any()


def terms_with_targets(model, config, state, *others):
  """gradient_terms with counts of HWE windows that miss their targets."""
  controllers = state.controllers.replace(hwe_target=mesh.put(np.float32([0, 0, 20])))
  return gradient_terms.gradient_terms(model, config, state.replace(controllers=controllers),
                                       *others)


@pytest.mark.slow
def test_the_terms_of_the_gradient_are_those_of_steps_with_one_term(prepared, one_update):
  # Without a cap: penalties that are all equal change no advantage.
  config, reference = replace(one_update[0], reward__cap=math.inf), far(prepared)
  terms = prepared.step(config, reference=reference, step=terms_with_targets)
  accuracy = replace(config, reward__kind="accuracy", kl__dynamic=False)
  _, alone = prepared.step(replace(accuracy, kl__beta=(0, 0, 0)), reference=reference)
  np.testing.assert_allclose(terms["gradient/accuracy"], alone["update/grad_norm"], rtol=1e-3)
  _, penalty = prepared.step(accuracy, reference=reference, correct=np.ones(16, np.float32))
  np.testing.assert_allclose(terms["gradient/kl_grpo"], penalty["update/grad_norm"], rtol=1e-3)
  assert 0 < terms["gradient/kl"] < terms["gradient/kl_grpo"]  # windows get relief
  # The entropy term is what is left: without it AEPO is GRPO.
  assert terms["gradient/shaping"] > 1e-3 and terms["gradient/cosine_to_grpo"] < 0.9999
  grpo = prepared.step(accuracy, reference=reference, step=terms_with_targets)
  assert grpo["gradient/shaping"] < 1e-5
  np.testing.assert_allclose(grpo["gradient/cosine_to_grpo"], 1, rtol=1e-5)


@pytest.mark.slow
def test_minibatches_do_not_change_the_terms_of_the_gradient(prepared, one_update):
  one, two = (prepared.step(replace(config, reward__cap=math.inf), reference=far(prepared),
                            step=terms_with_targets)
              for config in (one_update[0], prepared.config.aepo))
  for name, value in one.items():
    np.testing.assert_allclose(two[name], value, rtol=1e-3, err_msg=name)


def test_kl_controller_moves_towards_its_target(prepared, one_update):
  config, state, metrics = one_update
  share = np.array([metrics[f"bucket/share/{name}"] for name in ("easy", "medium", "hard")])
  outside = np.array([metrics[f"kl/outside/{name}"] for name in ("easy", "medium", "hard")])
  kl = config.kl
  kappa = np.clip(1 + kl.rate * (outside / np.array(kl.target) - 1), kl.low, kl.high)
  np.testing.assert_allclose(state.controllers.kappa, np.where(share > 0, kappa, 1), rtol=1e-5)
  assert (share > 0).sum() >= 2 and (np.abs(kappa[share > 0] - 1) > 1e-3).all()


@pytest.mark.slow
def test_without_dynamic_kl_the_coefficient_stays_and_windows_get_no_relief(prepared, one_update):
  state, metrics = prepared.step(replace(one_update[0], kl__dynamic=False), reference=far(prepared))
  assert (np.asarray(state.controllers.kappa) == 1).all()
  np.testing.assert_allclose(metrics["loss/kl"], 0.01 * metrics["kl/mean"], rtol=1e-4)
  assert one_update[2]["loss/kl"] < metrics["loss/kl"]


def broken(prepared, name):
  """Changes of the rollout in which one value of the first response is not what it should be."""
  samples, correct = prepared.rollout.samples, prepared.rollout.correct.copy()
  if name == "reward":
    correct[0] = np.nan
    return {"correct": correct}
  if name == "sampler_gap":
    return {"samples": samples.replace(logprob=samples.logprob - 2)}
  field = {"sampler_logprob": "logprob", "sampler_entropy": "entropy"}[name]
  array = getattr(samples, field).copy()
  array[0, 0] = np.inf
  return {"samples": samples.replace(**{field: array})}


@pytest.mark.parametrize("name", ["reward", "sampler_gap", "sampler_logprob", "sampler_entropy",
                                  "reference"])
def test_a_term_that_is_not_finite_is_named_and_changes_nothing(prepared, name, monkeypatch):
  if name == "reference":
    config = replace(prepared.config.aepo, reward__kind="release")
    first = aepo_step._first_controllers(config).replace(hwe_target=np.full(3, 9, np.float32))
    monkeypatch.setattr(aepo_step, "_first_controllers", lambda config: first)
    state, metrics = prepared.step(config, reference=prepared.params | {
      "final_norm": prepared.params["final_norm"] * np.nan})
    alpha = [metrics[f"reward/alpha/{bucket}"] for bucket in ("easy", "medium", "hard")]
    np.testing.assert_array_equal(alpha, state.controllers.alpha)  # not that of a lost update
  else:
    state, metrics = prepared.step(**broken(prepared, name))
  nonfinite_counts = {key: int(metrics[key]) for key in metrics if key.startswith("nonfinite/") and
            metrics[key]}
  assert f"nonfinite/{name}" in nonfinite_counts and "nonfinite/logits" not in nonfinite_counts
  # What is wrong with a single minibatch leaves the update of the other one.
  assert metrics["update/skipped"] == (1 if name == "sampler_logprob" else 2)
  if name != "sampler_logprob":
    assert distance(state.params, prepared.params) == 0
  assert np.isnan(state.controllers.threshold)  # not seeded by a batch that was thrown away
  assert (state.controllers.kappa == 1).all()


def rename_arrays(path, names):
  with np.load(path) as file:
    arrays = {names.get(name, name): array for name, array in file.items()}
  np.savez_compressed(path, **arrays)


@pytest.mark.slow
def test_a_dumped_batch_is_replayed_and_its_term_named(prepared, tmp_path):
  config, run = prepared.config.aepo, prepared.run
  path = str(tmp_path / "nonfinite" / "aepo-7.npz")
  with jax.set_mesh(mesh_of(1)):
    for name, kept in (("sampler_logprob", True), (None, False)):
      rollout = dataclasses.replace(prepared.rollout, **(broken(prepared, name) if name else {}))
      batch, _ = aepo.pack_rollout(rollout, config, run.generator.encoder)
      state = aepo_step.init_state(config, prepared.params)
      files.dump_batch(str(tmp_path), "aepo", 7, {"batch": batch,
                                                      "controllers": state.controllers})
      if not kept:
        rename_arrays(path, {"batch/rows/response_index": "batch/rows/place",
                             "batch/format_ok": "batch/formatted"})  # as before 0.2
      terms, step = replay.replay(run, str(tmp_path), path)
      assert step == 0 and list(terms)[:2] == (
        ["batch/rows/sampler_logprob", "sampler_logprob"] if kept else [])
      said = replay.replay_text(path, terms, step)
      assert "exceeds its limit: batch/rows/sampler_logprob" in said or not kept
      assert "with the weights of step 0:\n  the batch came from step 6, but" in said
    # The batch is finite: now the weights are not.
    weights_of = prepared.params | {"final_norm": prepared.params["final_norm"] * np.nan}
    with Checkpoints(str(tmp_path / "aepo"), 1) as checkpoints:
      checkpoints.save(6, state.replace(params=weights_of), {})
    terms, step = replay.replay(run, str(tmp_path), path)
  assert step == 6 and next(iter(terms)) == "weights/final_norm" and {"logits", "logprob"} <= set(
    terms)
  assert "the batch came from" not in replay.replay_text(path, terms, step)
  with pytest.raises(ValueError, match="STAGE-STEP.npz, with STAGE one of warmup"):
    replay.replay(run, str(tmp_path), "x.npz")


@pytest.mark.slow
def test_rewarded_answers_become_more_probable(prepared, one_update):
  state, _ = prepared.step(replace(one_update[0], kl__beta=(0.0, 0.0, 0.0)))
  model = prepared.run.model
  with jax.set_mesh(mesh_of(1)):
    batch, _ = aepo.pack_rollout(prepared.rollout, one_update[0], prepared.run.generator.encoder)
    images = policy_gradient.frozen_features(model, prepared.params, batch.vision, minibatches=1)
    minibatches = policy_gradient.Minibatch(batch.rows, images)
    before, after = (policy_gradient.old_logprobs(model, one_update[0], params, minibatches)
                     for params in (prepared.params, state.params))
  change = np.zeros(16)
  mask = np.asarray(batch.rows.response_mask)
  np.add.at(change, np.asarray(batch.rows.sequence)[mask], np.asarray(after - before)[mask])
  right = prepared.rollout.correct == 1
  assert change[right].mean() > change[~right].mean() + 1e-3


@pytest.mark.slow
def test_the_trainer_scores_the_policy_that_sampled(prepared):
  """At another temperature than 1 too; an answer is as probable to both."""
  config = replace(prepared.config.aepo, sampling__temperature=0.5)
  run = prepared.run
  with jax.set_mesh(mesh_of(1)):
    prompts = run.generator.encoder.batch(prepared.rollout.prompts.rows, np.arange(config.prompts))
    rollout = collect(
      run.generator, prepared.params, iter([prompts]), jax.random.key(0), group=config.group,
      order=lambda prompts_P, _: range(len(prompts_P)), sampling=config.sampling,
      config=config.filter)
    batch, _ = aepo.pack_rollout(rollout, config, run.generator.encoder)
    images = policy_gradient.frozen_features(run.model, prepared.params, batch.vision,
                                             minibatches=len(batch.rows.used))
    logprob = policy_gradient.old_logprobs(run.model, config, prepared.params,
                                           policy_gradient.Minibatch(batch.rows, images))
  mask = np.asarray(batch.rows.response_mask)
  assert mask.sum() > 50
  np.testing.assert_allclose(logprob[mask], batch.rows.sampler_logprob[mask], atol=1e-4)


@pytest.mark.parametrize("changes, words", [
  ({"aepo.group": 1}, "group = 1"), ({"aepo.sampling.temperature": 0.0}, "temperature = 0 draws"),
  ({"aepo.minibatch": 6}, "minibatch = 6"),
  ({"aepo.microbatch": 0}, "microbatch = 0"), ({"aepo.row_tokens": ()}, r"row_tokens = \(\)"),
  ({"aepo.row_tokens": (80, 37)}, r"row_tokens = \(80, 37\).*= 38 tokens; raise it"),
  ({"aepo.branches": 4}, "branches = 4"),
])
def test_refuses_sizes_that_do_not_divide(changes, words):
  with pytest.raises(ValueError, match=words):
    tiny.read(**changes)


def test_all_samples_of_the_first_prompts_are_logged_token_by_token(prepared, tmp_path):
  rollout, encoder = prepared.rollout, prepared.run.generator.encoder
  parent, fork = np.full(16, -1), np.zeros(16, int)
  parent[1], fork[1] = 0, 3
  entropies = rollout.samples.entropy.copy()
  entropies[1, 0] = np.nan  # a broken sampler, whose step is skipped
  rollout = dataclasses.replace(rollout, samples=dataclasses.replace(
    rollout.samples, parent=parent, fork=fork, entropy=entropies))
  graded = responses.GradedResponses(rollout.prompts.rows, rollout.prompts.held, rollout.samples,
                                     rollout.texts, rollout.correct, rollout.format_ok, group=4)
  responses.write_rollouts(str(tmp_path), 1, graded, encoder, count=2)
  lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
  assert [line["sample"] for line in lines] == [0, 1]
  assert lines[0]["id"] == lines[1]["id"] and lines[0]["response"] == rollout.texts[0]
  assert [(line["parent"], line["fork"]) for line in lines] == [(-1, 0), (0, 3)]
  assert lines[0]["pass_rate"] == rollout.correct[:4].mean()
  for row, line in enumerate(lines):
    entropy = rollout.samples.entropy[row][rollout.samples.mask[row]]
    np.testing.assert_allclose(np.float64(line["entropy"]), entropy, atol=6e-5)
    assert "".join(line["tokens"]).removesuffix("<|im_end|>") == line["response"]
  assert lines[1]["entropy"][0] is None  # NaN is not JSON
  [name] = lines[0]["images"]
  shown, truth = Image.open(tmp_path / name), rollout.prompts.rows[0]["images"][0]
  assert np.abs(np.float32(shown) - np.float32(truth)).mean() < 5
