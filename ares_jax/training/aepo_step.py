"""AEPO's step: one jitted program from a rollout batch to the updated state (algorithm 1)."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ares_jax import ops
from ares_jax.models import lora
from ares_jax.system import mesh
from ares_jax.training import optimizer, policy_gradient
from ares_jax.training.batch import split_minibatches
from ares_jax.training.policy_gradient import Signal
from ares_jax.training.shaping import Controllers, by_bucket, shape_rewards

# Metrics of a minibatch that are above 0 where its update is skipped for what it was made of.
FAULTS = tuple(f"nonfinite/{name}" for name in (
  "logits", "logprob", "reference", "sampler_logprob", "loss", "sampler_gap"))


@flax.struct.dataclass
class AepoState:
  """All that reinforcement learning changes; saving it saves the run."""

  step: jax.Array  # int32 [], finished iterations
  batches: jax.Array  # int32 [], prompt batches drawn: more than `step` with online filtering
  params: dict  # what is trained: weights, or adapters (models/lora.py)
  opt_state: optax.OptState
  controllers: Controllers


def init_state(config, params, base=None):
  """AepoState before the first iteration, on the current mesh, which holds the weights.

  Args:
    config: AepoConfig.
    params: what is trained: weights, or adapters of `base`.
    base: lora.Base, or None.
  """
  opt_state = optimizer.init_opt_state(_optimizer(config, params, base), params)
  controllers = Controllers(
    threshold=jnp.float32(jnp.nan), hwe_target=jnp.full(3, jnp.nan, jnp.float32),
    multiplier=jnp.zeros(3), kappa=jnp.float32(config.kl.start),
    alpha=jnp.full(3, 0.5, jnp.float32))
  return AepoState(params=params, opt_state=opt_state, **mesh.put(
    {"step": jnp.int32(0), "batches": jnp.int32(0), "controllers": controllers}))


def _optimizer(config, params, base):
  return optimizer.make_with_frozen(config.optimizer, params,
                                    frozen=lora.trained_frozen(base, config.frozen))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def aepo_step(model, config, state, reference, batch, trigger_V, base=None):
  """One iteration on a rollout batch (algorithm 1).

  Args:
    model: ModelConfig.
    config: AepoConfig.
    state: AepoState; donated.
    reference: like state.params, of the reference policy; config.frozen parts are those of the
      state.
    batch: rollout.RolloutBatch.
    trigger_V: bool, tokens of V_sem (detectors "semantic" and "trigger").
    base: lora.Base under the adapters that state and reference hold; None where they hold weights.

  Returns:
    state, metrics (float32 scalars).
  """
  shaping, controllers, metrics = shape_rewards(
    config.entropy, config.reward, state.controllers, batch, trigger_V, group=config.group)
  advantage_B = ops.group_advantage(
    shaping.reward, group=config.group, normalize=config.loss.advantage,
    correct_B=batch.correct if config.loss.equal_groups == "zero" else None)
  metrics["reward/no_signal"] = (advantage_B == 0).mean()
  # Values that are not finite; any skips the update.
  faults = {"nonfinite/reward": (~jnp.isfinite(shaping.reward)).sum(), "nonfinite/sampler_entropy":
            (batch.response_mask & ~jnp.isfinite(batch.entropy)).sum()}
  # On every device whole (see Signal).
  signal = jax.tree.map(mesh.shard, Signal(
    advantage=advantage_B, bonus=shaping.bonus if config.reward.token_bonus else None,
    cover=shaping.cover, bucket=shaping.bucket, length=batch.response_mask.sum(1),
    beta_3=jnp.float32(config.kl.beta) * state.controllers.kappa,
    rho=config.kl.rho if config.kl.dynamic else 1.0))
  rows, minibatches = batch.rows, len(batch.rows.used)
  sampled, reference = lora.join(base, state.params), lora.join(base, reference)
  if base is not None or "vision" in config.frozen:
    images = policy_gradient.frozen_features(model, sampled, batch.vision, minibatches=minibatches)
  else:
    images = split_minibatches(batch.vision, minibatches)
  old = rows.sampler_logprob
  if config.loss.old_logprob == "recompute":
    # Of a single minibatch the gradient's own forward pass is it.
    old = policy_gradient.old_logprobs(model, sampled, rows, images) if minibatches > 1 else None

  tx = _optimizer(config, state.params, base)

  def minibatch(carry, part):
    params, opt_state, gap = carry
    rows, images, old = part
    grads, sums = policy_gradient.gradient(model, config, params, reference, rows, images, signal,
                                           old, base)
    rate = optimizer.learning_rate(config.optimizer, state.step, config.steps)
    sums["nonfinite/loss"] = (~jnp.isfinite(sums["loss/policy"] + sums["loss/kl"])).astype(int)
    if config.loss.old_logprob == "sampler":
      # Of the first minibatch: once one was applied, the policy is not the one that sampled.
      sums["loss/sampler_gap"] = jnp.where(gap < 0, sums["loss/sampler_gap"], gap)
    sums["nonfinite/sampler_gap"] = (sums["loss/sampler_gap"] > config.loss.sampler_gap[1]).astype(
      int)
    sound = sum([*faults.values(), *(x for name, x in sums.items() if name in FAULTS)]) == 0
    params, opt_state, update = optimizer.apply_update(tx, grads, opt_state, params, rate, sound)
    gap = jnp.where(update["skipped"], gap, sums["loss/sampler_gap"])
    return (params, opt_state, gap), sums | {f"update/{name}": x for name, x in update.items()}

  (params, opt_state, _), sums = jax.lax.scan(
    minibatch, (state.params, state.opt_state, jnp.float32(-1)), (rows, images, old))
  params, opt_state = optimizer.keep_layout(tx, params, opt_state,
                                            lora.specs(model, base, params))
  kl_tokens_3 = sums.pop("kl_tokens_3").sum(0)
  # NaN, null in the log, where a bucket had no such tokens: not to be mistaken for 0.
  kl_3 = sums.pop("kl_sum_3").sum(0) / kl_tokens_3
  if config.kl.dynamic:
    controllers = controllers.replace(kappa=ops.track_kl_coefficient(
      state.controllers.kappa, kl_3, kl_tokens_3, target_3=jnp.float32(config.kl.target),
      rate=config.kl.rate, low=config.kl.low, high=config.kl.high))
  # A non-finite gradient leaves the controllers as they were, like the weights.
  skipped, ratio_max = sums.pop("update/skipped").sum(), sums.pop("ratio_max").max()
  controllers = jax.tree.map(lambda new, old: mesh.shard(jnp.where(skipped > 0, old, new)),
                             controllers, state.controllers)
  metrics |= faults | {name: sums.pop(name).sum() for name in FAULTS}
  metrics |= {name: value.mean() for name, value in sums.items()}
  metrics |= {"update/skipped": skipped, "loss/ratio_max": ratio_max}
  metrics |= by_bucket("kl/outside", kl_3) | by_bucket("kl/kappa", controllers.kappa)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state,
                       controllers=controllers), metrics
