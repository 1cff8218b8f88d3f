"""Supervised fine-tuning on packed rows: stage 1 learns what AdaCS selected, the warm-up lessons.

R packed rows, T tokens a row.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ares_jax.models import lora, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.system import mesh
from ares_jax.training import optimizer


@flax.struct.dataclass
class SftState:
  """All that supervised training changes."""

  step: jax.Array  # int32 [], finished steps
  params: dict  # what is trained: weights, or adapters (models/lora.py)
  opt_state: optax.OptState


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def sft_step(model, config, state, batch, base=None):
  """One update on a packed batch: mean negative log-likelihood of the response tokens.

  Args:
    model: ModelConfig.
    config: SftConfig.
    state: SftState.
    batch: dict of tokens, segment, loss_mask, unit [R, T], positions [3, R, T] and vision; R a
      multiple of config.microbatch.
    base: lora.Base under the adapters that the state holds; None where it holds weights.

  Returns:
    state, metrics.
  """
  frozen = lora.trained_frozen(base, config.frozen)
  parts = len(batch["tokens"]) // config.microbatch
  split = {name: jnp.moveaxis(batch[name], -2, 0) if name == "positions" else batch[name]
           for name in batch}
  split = jax.tree.map(lambda x: x.reshape(parts, config.microbatch, *x.shape[1:]), split)
  tokens = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)

  def loss_fn(params, part):
    part = jax.tree.map(lambda x: mesh.shard(x, mesh.ROWS), part)
    params = params | {name: jax.lax.stop_gradient(params[name]) for name in frozen}
    params = lora.join(base, params)
    features = qwen25_vl.vision_features(model, params, part["vision"])
    mask = part["loss_mask"]
    logprob, entropy = qwen25_vl.score(
      model, params, features, wanted=mask,
      **{name: part[name] for name in ("tokens", "unit", "positions", "segment")})
    return -jnp.where(mask, logprob, 0).sum() / tokens, jnp.where(mask, entropy, 0).sum() / tokens

  def accumulate(carry, part):
    (loss, entropy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, part)
    return jax.tree.map(jnp.add, carry, (grads, loss, entropy)), None

  def total(split):
    zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(accumulate, zeros, split)[0], {}

  (grads, loss, entropy), _ = mesh.sum_of_slices(total, (1,))(split)
  rate = optimizer.learning_rate(config.optimizer, state.step, config.steps)
  tx = optimizer.make_with_frozen(config.optimizer, state.params, frozen=frozen)
  # Entropy is a function of all logits: where one is not finite, it is not.
  faults = {"nonfinite/logits": ~jnp.isfinite(entropy), "nonfinite/logprob": ~jnp.isfinite(loss)}
  params, opt_state, metrics = optimizer.apply_update(
    tx, grads, state.opt_state, state.params, rate, ~jnp.any(jnp.stack([*faults.values()])))
  params, opt_state = optimizer.keep_layout(tx, params, opt_state, lora.specs(model, base, params))
  metrics |= faults | {"loss": loss, "entropy": entropy, "tokens": tokens, "learning_rate": rate,
                       "rows": jnp.float32(len(batch["tokens"])),
                       "pack/real": (batch["segment"] > 0).mean()}
  return SftState(state.step + 1, params, opt_state), metrics


def to_device(batch):
  """The arrays of a data.traces.TraceBatch on the current mesh, rows over mesh.ROWS."""
  arrays = mesh.put({
    "tokens": batch.tokens, "segment": batch.segment, "unit": batch.unit,
    "loss_mask": batch.loss_mask, "vision": VisionInput(**batch.vision)}, mesh.ROWS)
  arrays["positions"] = mesh.put(batch.positions, None, mesh.ROWS)
  return arrays
