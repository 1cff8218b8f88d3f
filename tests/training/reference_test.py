"""AEPO against slow_aepo.py, token by token: loss, gradient, update, every controller."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from training.aepo_step_test import mesh_of, replace
from training.slow_aepo import Slow, descend, moments

from ares_jax import aepo
from ares_jax.models import qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.run import setup
from ares_jax.sampling.groups import Rollout
from ares_jax.sampling.sampler import Samples
from ares_jax.system import mesh
from ares_jax.training import aepo_step, policy_gradient

pytestmark = pytest.mark.slow

CORRECT = np.float32([[1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
                      [0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0]])


class Case:
  """Prompts with images, random responses, and a plain forward pass: a sequence a row."""

  def __init__(self):
    config = tiny.read()
    with jax.set_mesh(mesh_of(1)), setup.open_run(config) as run:
      self.run, self.params, self.trigger_V = run, run.init_params(), run.trigger_V
    source, rng = run.source("rl"), np.random.default_rng(0)
    prompts = run.generator.encoder.batch([source[i] for i in range(4)], np.arange(4))
    model, most = run.model, config.aepo.sampling.max_tokens
    mask = np.arange(most) < rng.integers(3, most + 1, 16)[:, None]
    drawn = rng.choice(np.flatnonzero(run.generator.allowed), mask.shape)
    zeros = np.zeros(mask.shape, np.float32)
    samples = Samples(np.where(mask, drawn, 0).astype(np.int32), mask, zeros, zeros,
                      np.full(16, -1), np.zeros(16, int))
    self.length = samples.mask.sum(1)
    self.rollout = Rollout(prompts, samples, self.length, CORRECT[0], CORRECT[0], [""] * 16, 1, {})
    self.reference = jax.tree.map(lambda x: x + 0.05 * x.std() * rng.normal(size=x.shape).astype(
      np.float32), self.params)
    rows, width = len(samples.tokens), prompts.tokens.shape[1] + samples.tokens.shape[1]
    tokens, segment = np.zeros((2, rows, width), np.int32)
    unit, positions = np.full((rows, width), -1, np.int32), np.zeros((3, rows, width), np.int32)
    self.start = np.repeat(prompts.length, 4)
    for b in range(rows):
      p, middle, end = b // 4, self.start[b], self.start[b] + self.length[b]
      tokens[b, :middle] = prompts.tokens[p, :middle]
      tokens[b, middle:end] = samples.tokens[b, :self.length[b]]
      segment[b, :end] = 1
      unit[b, :middle] = prompts.unit[p, :middle]
      positions[:, b, :middle] = prompts.positions[:, p, :middle]
      positions[:, b, middle:end] = prompts.positions[:, p].max() + 1 + np.arange(end - middle)
    vision = VisionInput(**{name: np.repeat(x, 4, 0) for name, x in prompts.vision().items()})

    @jax.jit
    def logprob(params):
      features = qwen25_vl.vision_features(model, params, vision)
      embeds = qwen25_vl.embed(model, params, tokens, unit, features)
      hidden = qwen25_vl.hidden(model, params, embeds, positions, segment)
      logits = hidden @ qwen25_vl.unembedding(model, params).T
      return jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], 2)[..., 0]

    @jax.jit
    def gradient(params, slope):
      return jax.vjp(logprob, params)[1](slope)[0]

    self.logprob, self._gradient = logprob, gradient

  def of_tokens(self, params):
    """Log-probabilities of the responses, float64 arrays of their lengths."""
    rows = np.float64(self.logprob(params))
    return [row[start - 1:start - 1 + length]
            for row, start, length in zip(rows, self.start, self.length, strict=True)]

  def gradient(self, params, slopes):
    """{name: float64} in all weights, of slopes in the log-probabilities."""
    slope = np.zeros(jax.eval_shape(self.logprob, params).shape, np.float32)
    for b, row in enumerate(slopes):
      slope[b, self.start[b] - 1:self.start[b] - 1 + len(row)] = row
    return flat(self._gradient(params, slope))

  def draw(self, seed):
    """(entropies, sampler's log-probabilities) [B, T], far from the policy's on some tokens."""
    rng = np.random.default_rng(seed)
    shape = self.rollout.samples.mask.shape
    entropy = np.where(self.rollout.samples.mask, rng.lognormal(-1, 1, shape), 0)
    noise = np.where(rng.random(shape) < 0.3, rng.normal(0, 1.2, shape), rng.normal(0, 0.1, shape))
    logprob = np.zeros(shape)
    for b, row in enumerate(self.of_tokens(self.params)):
      logprob[b, :len(row)] = row + noise[b, :len(row)]
    return entropy.astype(np.float32), logprob.astype(np.float32)

  def batch(self, config, correct, entropy, logprob):
    samples = self.rollout.samples.replace(entropy=entropy, logprob=logprob)
    rollout = dataclasses.replace(self.rollout, samples=samples, correct=correct)
    return aepo.pack_rollout(rollout, config, self.run.generator.encoder)[0]

  def rows(self, array):
    return [np.float64(row[:length]) for row, length in zip(array, self.length, strict=True)]


def flat(tree):
  return {jax.tree_util.keystr(path): np.float64(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(first, second, rtol):
  """Dicts of arrays, to `rtol` of the largest value of each."""
  for name, value in second.items():
    scale = np.abs(value).max()
    np.testing.assert_allclose(first[name], value, rtol=0, atol=rtol * scale + 1e-9, err_msg=name)


@pytest.fixture(scope="module")
def case():
  return Case()


def test_two_iterations_equal_the_slow_reference(case):
  config = replace(case.run.config.aepo, minibatch=16, frozen=(), reward__token_bonus=0.1)
  slow, first, second = Slow(config), *({name: 0.0 for name in flat(case.params)} for _ in "12")
  with jax.set_mesh(mesh_of(1)):
    state = aepo_step.init_state(config, jax.tree.map(jnp.copy, case.params))
    for number in range(2):
      entropy, sampler = case.draw(number)
      correct, params = CORRECT[number], jax.tree.map(np.array, state.params)
      slow.shape(case.rows(entropy), [float(x) for x in correct])
      now, reference = case.of_tokens(params), case.of_tokens(case.reference)
      old = case.rows(sampler)
      policy, penalty, slopes = slow.loss(now, old, old, reference)
      slow.control()
      assert min(slow.clipped.values()) > 0 and min(slow.kl[0]) >= 0  # every branch is met
      first, second = moments(config.optimizer, case.gradient(params, slopes), first, second)
      state, metrics = aepo_step.aepo_step(case.run.model, config, state, case.reference,
                                           case.batch(config, correct, entropy, sampler),
                                           mesh.put(case.trigger_V))
      expected = {"loss/policy": policy, "loss/kl": penalty, "reward/mean": np.mean(slow.reward),
                  "kl/mean": np.concatenate(slow.kl).mean(), "response/tokens": case.length.mean()}
      for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
      for name, value in {"threshold": slow.threshold, "hwe_target": slow.target,
                          "multiplier": slow.multiplier, "kappa": slow.kappa,
                          "alpha": slow.alpha}.items():
        np.testing.assert_allclose(getattr(state.controllers, name), value, rtol=1e-5, err_msg=name)
      ours = [flat(optax.tree_utils.tree_get(state.opt_state, name)) for name in ("mu", "nu")]
      assert_close(ours[0], first, 1e-4)
      assert_close(ours[1], second, 1e-4)
      # From our own moments: a quotient of two that are nearly 0 is no number to compare.
      before = flat(params)
      after = descend(config.optimizer, before, *ours, number + 1)
      # Weights near 1 are stored to 6e-8, 2e-4 of a step.
      assert_close({name: x - before[name] for name, x in flat(state.params).items()},
                   {name: x - before[name] for name, x in after.items()}, 1e-3)
    assert sorted(slow.multiplier)[1] > 0 and np.ptp(slow.kappa) > 0  # two buckets pay
    assert (np.array(slow.reward) < CORRECT[1]).any()


@pytest.mark.parametrize("average, minibatches", [("sequence", 1), ("token", 2)])
def test_minibatches_together_equal_the_slow_reference_with_importance(case, average, minibatches):
  """Before any update their mean gradient is the batch's: a token weighs the same in each."""
  config = replace(case.run.config.aepo, minibatch=16 // minibatches, loss__average=average,
                   loss__old_logprob="recompute")
  model, params, slow = case.run.model, case.params, Slow(config)
  entropy, sampler = case.draw(3)
  _, old = case.draw(4)  # what the weights before an earlier minibatch gave
  reference = case.reference | {"vision": params["vision"]}  # the frozen tower is both's
  slow.shape(case.rows(entropy), [float(x) for x in CORRECT[0]])
  policy, penalty, slopes = slow.loss(case.of_tokens(params), case.rows(old), case.rows(sampler),
                                      case.of_tokens(reference))
  cover = np.zeros(entropy.shape, bool)
  for b, row in enumerate(slow.cover):
    cover[b, :len(row)] = row
  signal = policy_gradient.Signal(
    advantage=jnp.float32([row[0] for row in slow.advantage]), bonus=None, cover=jnp.array(cover),
    bucket=jnp.int32(slow.bucket), length=jnp.int32(case.length),
    beta_3=jnp.float32(config.kl.beta))
  with jax.set_mesh(mesh_of(1)):
    batch = case.batch(config, CORRECT[0], entropy, sampler)
    tokens = batch.rows.response_mask.sum((1, 2, 3))
    assert minibatches == 1 or abs(tokens[0] - tokens[1]) > 0.1 * tokens[0]
    images = policy_gradient.frozen_features(model, params, batch.vision, minibatches=minibatches)
    gradient = jax.jit(functools.partial(policy_gradient.gradient, model, config))
    found = []
    for number in range(minibatches):
      rows, features = jax.tree.map(lambda x: x[number], (batch.rows, images))  # noqa: B023
      old_logprob = jnp.where(rows.response_mask,
                              jnp.array(old)[rows.sequence, rows.response_index], 0)
      minibatch = policy_gradient.Minibatch(rows.replace(old_logprob=old_logprob), features)
      found.append(gradient(params, reference, minibatch, signal))
  grads, sums = jax.tree.map(lambda *parts: sum(parts) / minibatches, *found)
  np.testing.assert_allclose(sums.metrics["loss/policy"], policy, rtol=1e-5)
  np.testing.assert_allclose(sums.metrics["loss/kl"], penalty, rtol=1e-5)
  expected = case.gradient(params, slopes)
  assert_close(flat(grads | {"vision": {}}), {
    name: x for name, x in expected.items() if "vision" not in name}, 1e-4)
  assert max(np.abs(x).max() for x in flat(grads["vision"]).values()) == 0
