"""How much each term of AEPO's loss moves the weights: the norms and angles of their gradients."""

import functools

import jax
import jax.numpy as jnp
import optax

from ares_jax import ops
from ares_jax.models import lora
from ares_jax.training import policy_gradient
from ares_jax.training.aepo_step import update_minibatches, update_signal


@functools.partial(jax.jit, static_argnames=("model", "config"))
def gradient_terms(model, config, state, reference, batch, trigger_V, base=None):
  """{metric: float32 []} of the gradient of a RolloutBatch at the weights that sampled it.

  The arguments are those of `aepo_step`; the state is not donated.
  At these weights every ratio is 1 and nothing is clipped, so the gradient is the sum of its
  terms: that of advantages of accuracy alone, that of the reward's entropy term, and that of the
  KL penalty. GRPO's is the first plus a KL penalty of fixed weight, the same in all tokens.

  Memory: five gradients in float32 beside the state.
  """
  full, *_ = update_signal(config, state.controllers, batch, trigger_V)
  accuracy_B = ops.group_advantage(batch.reward, group=config.group,
                                   normalize=config.loss.advantage)
  none_B, none_3 = jnp.zeros_like(accuracy_B), jnp.zeros(3)
  fixed_3 = jnp.float32(config.kl.beta) * jnp.float32(config.kl.start)
  minibatches = update_minibatches(model, config, lora.join(base, state.params), batch, base)
  minibatches = minibatches.replace(rows=minibatches.rows.replace(old_logprob=None))
  reference = lora.join(base, reference)

  def gradient(**changes):
    def add(total, minibatch):
      part, _ = policy_gradient.gradient(model, config, state.params, reference, minibatch,
                                         full.replace(**changes), base)
      return optax.tree.add(total, part), None

    total, _ = jax.lax.scan(add, optax.tree.zeros_like(state.params), minibatches)
    return optax.tree.scale(1 / len(minibatches.rows.used), total)

  accuracy = gradient(advantage=accuracy_B, bonus=None, beta_3=none_3)
  penalty = gradient(advantage=none_B, bonus=None)
  grpo_penalty = gradient(advantage=none_B, bonus=None, beta_3=fixed_3,
                          cover=jnp.zeros_like(full.cover))
  complete, grpo = gradient(), optax.tree.add(accuracy, grpo_penalty)
  shaping = optax.tree.sub(optax.tree.sub(complete, accuracy), penalty)
  norm = optax.tree.norm
  return {"gradient/accuracy": norm(accuracy), "gradient/shaping": norm(shaping),
          "gradient/kl": norm(penalty), "gradient/kl_grpo": norm(grpo_penalty),
          "gradient/cosine_to_grpo":
            optax.tree.vdot(complete, grpo) / (norm(complete) * norm(grpo))}
