"""Supervised fine-tuning on packed rows, one jitted step: the warm-up and stage 1 use it.

R packed rows, T tokens a row.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ares_jax.models import lora, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.system import compiling, mesh, shares
from ares_jax.training import optimizer


@flax.struct.dataclass
class SftState:
  """All that supervised training changes; saving it saves the run."""

  step: jax.Array  # int32 [], finished steps
  params: dict  # trained parameters: weights, or adapters (models/lora.py)
  opt_state: optax.OptState


def init_state(config, params, base=None):
  """SftState of an SftConfig before the first step, on the current mesh.

  `params`, on that mesh, are weights, or adapters of the lora.Base `base`.
  """
  tx = optimizer.stage_optimizer(config, params, base)
  return SftState(mesh.put(jnp.int32(0)), params, optimizer.init_opt_state(tx, params))


def abstract_state(config, params, base=None):
  """The shapes of `init_state` on the current mesh, of params and a base in shapes."""
  tx = optimizer.stage_optimizer(config, params, base)
  return SftState(mesh.abstract(jnp.int32, ()), params, optimizer.abstract_opt_state(tx, params))


def abstract_batch(model, config):
  """The shapes of `to_device` if every example of an SftConfig's batch has a row of its own."""
  rows = -(-config.batch // config.microbatch) * config.microbatch
  shape = rows, max(config.row_tokens)
  ints = mesh.abstract(jnp.int32, shape, mesh.ROWS)
  return dict(tokens=ints, segment=ints, unit=ints,
              loss_mask=mesh.abstract(bool, shape, mesh.ROWS),
              positions=mesh.abstract(jnp.int32, (3, *shape), None, mesh.ROWS),
              vision=VisionInput.abstract(model.images, rows, config.row_windows))


@compiling.Announced
@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def sft_step(model, config, state, batch, base=None):
  """One update by the mean negative log-likelihood of a batch's response tokens, and metrics.

  `state` is donated; with a lora.Base `base` it holds adapters. The batch, from `to_device`, has
  tokens, segment, loss_mask, unit [R, T], positions [3, R, T] and vision; R is a multiple of
  config.microbatch.
  """
  frozen = lora.trained_frozen(base, config.frozen)
  tokens = jnp.maximum(batch["loss_mask"].sum(), 1).astype(jnp.float32)

  def loss_fn(params, rows):
    rows = jax.tree.map(lambda x: mesh.shard(x, mesh.ROWS), rows)
    params = params | {name: jax.lax.stop_gradient(params[name])
                       for name in frozen if name in params}
    params = lora.join(base, params)
    features = qwen25_vl.vision_features(model, params, rows["vision"])
    mask = rows["loss_mask"]
    logprob, entropy = qwen25_vl.score(
      model, params, features, tokens=rows["tokens"], unit=rows["unit"],
      positions=rows["positions"], segment=rows["segment"], wanted=mask)
    return -jnp.where(mask, logprob, 0).sum() / tokens, jnp.where(mask, entropy, 0).sum() / tokens

  def accumulate(carry, rows):
    (loss, entropy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, rows)
    return jax.tree.map(jnp.add, carry, (grads, loss, entropy)), None

  def total(microbatches):
    zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(accumulate, zeros, microbatches)[0], {}

  # Positions become [R, 3, T] for the split of the rows.
  split = batch | {"positions": jnp.moveaxis(batch["positions"], -2, 0)}
  split = jax.tree.map(lambda x: x.reshape(len(x) // config.microbatch, config.microbatch,
                                           *x.shape[1:]), split)
  (grads, loss, entropy), _ = mesh.sum_of_slices(total, (1,))(split)
  rate = optimizer.learning_rate(config.optimizer, state.step, config.steps)
  tx = optimizer.stage_optimizer(config, state.params, base)
  # Entropy uses every logit, so a non-finite entropy means a non-finite logit.
  nonfinite = {"nonfinite/logits": ~jnp.isfinite(entropy),
               "nonfinite/logprob": ~jnp.isfinite(loss)}
  params, opt_state, metrics = optimizer.apply_update(
    tx, grads, state.opt_state, state.params, rate, ~jnp.any(jnp.stack([*nonfinite.values()])))
  params, opt_state = optimizer.keep_layout(tx, params, opt_state, lora.specs(model, base, params))
  metrics |= nonfinite | {"loss": loss, "entropy": entropy, "tokens": tokens, "learning_rate": rate,
                          "rows": jnp.float32(len(batch["tokens"])),
                          "pack/real": (batch["segment"] > 0).mean()}
  return SftState(state.step + 1, params, opt_state), metrics


def to_device(batch):
  """The arrays of a data.traces.TraceBatch on the current mesh, rows over mesh.ROWS."""
  arrays = shares.put_rows({
    "tokens": batch.tokens, "segment": batch.segment, "unit": batch.unit,
    "loss_mask": batch.loss_mask, "vision": VisionInput(**batch.vision)}, batch.rows, mesh.ROWS)
  arrays["positions"] = shares.put_rows(batch.positions, batch.rows, None, mesh.ROWS)
  return arrays
