"""AEPO's step: one jitted program from a rollout batch to the updated state (algorithm 1).

B sequences; N minibatches, an optimizer update each. Names ending in _3 hold a value for each
difficulty bucket: easy, medium, hard.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ares_jax import ops
from ares_jax.models import lora
from ares_jax.system import compiling, mesh
from ares_jax.training import optimizer, policy_gradient
from ares_jax.training.batch import split_minibatches
from ares_jax.training.policy_gradient import Minibatch, Signal
from ares_jax.training.shaping import Controllers, by_bucket, shape_rewards, shaped_metrics


@flax.struct.dataclass
class AepoState:
  """All that reinforcement learning changes; saving it saves the run."""

  step: jax.Array  # int32 [], finished iterations
  batches: jax.Array  # int32 [], prompt batches drawn: more than `step` with online filtering
  params: dict  # trained parameters: weights, or adapters (models/lora.py)
  opt_state: optax.OptState
  controllers: Controllers


def init_state(config, params, base=None):
  """AepoState of an AepoConfig before the first iteration, on the current mesh.

  `params`, on that mesh, are weights, or adapters of the lora.Base `base`.
  """
  opt_state = optimizer.init_opt_state(optimizer.stage_optimizer(config, params, base), params)
  step, batches, controllers = mesh.put((np.int32(0), np.int32(0), _first_controllers(config)))
  return AepoState(step, batches, params, opt_state, controllers)


def abstract_state(config, params, base=None):
  """The shapes of `init_state` on the current mesh, of params and a base in shapes."""
  tx = optimizer.stage_optimizer(config, params, base)
  count = mesh.abstract(np.int32, ())
  controllers = jax.tree.map(lambda x: mesh.abstract(x.dtype, x.shape), _first_controllers(config))
  return AepoState(count, count, params, optimizer.abstract_opt_state(tx, params), controllers)


def _first_controllers(config):
  return Controllers(np.float32(np.nan), hwe_target=np.full(3, np.nan, np.float32),
                     multiplier=np.zeros(3, np.float32), kappa=np.float32(config.kl.start),
                     alpha=np.full(3, 0.5, np.float32))


@compiling.Announced
@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def aepo_step(model, config, state, reference, batch, trigger_V, base=None):
  """One iteration on a RolloutBatch (algorithm 1): the new state, and float32 metrics.

  `state` is donated. `reference` is like its params; parts that the config freezes are equal in
  both. With a lora.Base `base` both hold adapters. trigger_V, bool, marks the tokens of V_sem.
  """
  signal, reward_B, controllers, metrics = update_signal(config, state.controllers, batch,
                                                         trigger_V)
  # Any value that is not finite skips every update of the iteration.
  nonfinite = {"reward": (~jnp.isfinite(reward_B)).sum(),
               "sampler_entropy": (batch.response_mask & ~jnp.isfinite(batch.entropy)).sum()}

  # Policy gradient with the KL penalty, an optimizer update a minibatch (lines 16-22).
  minibatches = update_minibatches(model, config, lora.join(base, state.params), batch, base)
  reference = lora.join(base, reference)
  tx = optimizer.stage_optimizer(config, state.params, base)

  def update(carry, minibatch):
    params, opt_state, gap = carry
    grads, sums = policy_gradient.gradient(model, config, params, reference, minibatch, signal,
                                           base)
    if config.loss.old_logprob == "sampler":
      # After an update the policy is not the one that sampled, so the gap from before it is kept.
      sums.metrics["loss/sampler_gap"] = jnp.where(gap < 0, sums.metrics["loss/sampler_gap"], gap)
    loss = sums.metrics["loss/policy"] + sums.metrics["loss/kl"]
    gap_is_large = sums.metrics["loss/sampler_gap"] > config.loss.sampler_gap[1]
    sums.nonfinite.update(loss=(~jnp.isfinite(loss)).astype(int),
                          sampler_gap=gap_is_large.astype(int))
    valid = sum([*nonfinite.values(), *sums.nonfinite.values()]) == 0
    rate = optimizer.learning_rate(config.optimizer, state.step, config.steps)
    params, opt_state, done = optimizer.apply_update(tx, grads, opt_state, params, rate, valid)
    gap = jnp.where(done["skipped"], gap, sums.metrics["loss/sampler_gap"])
    return (params, opt_state, gap), (sums, done)

  no_gap = jnp.float32(-1)  # no update has been applied yet
  (params, opt_state, _), (sums, updates) = jax.lax.scan(
    update, (state.params, state.opt_state, no_gap), minibatches)
  params, opt_state = optimizer.keep_layout(tx, params, opt_state,
                                            lora.specs(model, base, params))

  # The KL controller (lines 23-24).
  kl_tokens_3 = sums.kl_tokens_3.sum(0)
  # A bucket without such tokens gives NaN, null in the log, so that nobody takes it for 0.
  kl_3 = sums.kl_sum_3.sum(0) / kl_tokens_3
  if config.kl.dynamic:
    controllers = controllers.replace(kappa=ops.track_kl_coefficient(
      state.controllers.kappa, kl_3, kl_tokens_3, target_3=jnp.float32(config.kl.target),
      rate=config.kl.rate, low=config.kl.low, high=config.kl.high))
  # A skipped update leaves the controllers as they were, like the weights.
  skipped = updates["skipped"].sum()
  controllers = jax.tree.map(lambda new, old: mesh.shard(jnp.where(skipped > 0, old, new)),
                             controllers, state.controllers)

  metrics |= by_bucket("kl/outside", kl_3) | by_bucket("kl/kappa", controllers.kappa)
  if config.reward.kind == "release":
    metrics |= by_bucket("reward/alpha", controllers.alpha)
  metrics |= _over_minibatches(sums, updates, batch.rows.response_mask.sum((1, 2, 3)))
  metrics |= {f"nonfinite/{name}": count for name, count in nonfinite.items()}
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state,
                       controllers=controllers), metrics


def update_signal(config, controllers, batch, trigger_V):
  """Rewards and advantages of a RolloutBatch (algorithm 1 lines 5-13).

  Returns its Signal, its rewards float32 [B], the next Controllers (kappa unchanged) and metrics.
  """
  shaping, after, metrics = shape_rewards(config.entropy, config.reward, controllers, batch,
                                          trigger_V, group=config.group)
  advantage = functools.partial(
    ops.group_advantage, group=config.group, normalize=config.loss.advantage,
    correct_B=batch.reward if config.loss.equal_groups == "zero" else None)
  advantage_B = advantage(shaping.reward)
  metrics["reward/no_signal"] = (advantage_B == 0).mean()
  metrics |= shaped_metrics(advantage_B, advantage(batch.reward), shaping.bucket)
  signal = jax.tree.map(mesh.shard, Signal(
    advantage=advantage_B, bonus=shaping.bonus if config.reward.token_bonus else None,
    cover=shaping.cover, bucket=shaping.bucket, length=batch.response_mask.sum(1),
    beta_3=jnp.float32(config.kl.beta) * controllers.kappa))
  return signal, shaping.reward, after, metrics


def update_minibatches(model, config, policy, batch, base):
  """Minibatch with a leading axis [N]; `policy` are the weights before the first update."""
  count = len(batch.rows.used)
  if policy_gradient.tower_is_frozen(model, config, base):
    images = policy_gradient.frozen_features(model, policy, batch.vision, minibatches=count)
  else:
    images = split_minibatches(batch.vision, count)
  minibatches = Minibatch(batch.rows, images)
  if config.loss.old_logprob == "sampler":
    old_logprob = batch.rows.sampler_logprob
  elif count > 1:
    old_logprob = policy_gradient.old_logprobs(model, config, policy, minibatches)
  else:
    return minibatches  # the gradient's forward pass gives the old log-probabilities
  return minibatches.replace(rows=batch.rows.replace(old_logprob=old_logprob))


def _over_minibatches(sums, updates, tokens_N):
  """Metrics of the iteration, from [N] values: counts add up, the rest is averaged."""
  metrics = {name: values.mean() for name, values in sums.metrics.items()}
  # A minibatch's gap is the mean over its own tokens, of which some minibatches have more.
  gap_N = sums.metrics["loss/sampler_gap"]
  metrics["loss/sampler_gap"] = (gap_N * (tokens_N / tokens_N.sum())).sum()
  metrics |= {f"nonfinite/{name}": counts.sum() for name, counts in sums.nonfinite.items()}
  return metrics | {"loss/ratio_max": sums.ratio_max.max(),
                    "update/grad_norm": updates["grad_norm"].mean(),
                    "update/skipped": updates["skipped"].sum()}
