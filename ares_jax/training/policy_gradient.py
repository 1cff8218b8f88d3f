"""The gradient of stage 2, microbatch by microbatch (algorithm 1 lines 16-22).

B sequences of T response tokens in packed rows (batch.py): N minibatches, K microbatches of each,
R rows of a microbatch, C tokens of a row. Q prompts of a minibatch, U image units of a prompt,
D embed. Names ending in _3 hold a value for each difficulty bucket.
"""

import flax.struct
import jax
import jax.numpy as jnp

from ares_jax.models import lora, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.system import mesh
from ares_jax.training.batch import PackedRows, split_minibatches
from ares_jax.training.loss import microbatch_loss, minibatch_divisors


@flax.struct.dataclass
class Minibatch:
  """The sequences of one optimizer update; with a leading axis [N], those of all updates."""

  rows: PackedRows
  images: VisionInput | jax.Array  # of Q prompts; features [Q, U, D] where the tower is frozen


def tower_is_frozen(config, base):
  """Whether no weight of the vision tower is trained: the config freezes it, or adapters are."""
  return base is not None or "vision" in config.frozen


def frozen_features(model, params, vision, *, minibatches):
  """Features [N, Q, U, D] of a batch's VisionInput, computed once because the tower is frozen.

  They have the compute dtype and are split over "data" along D; of `params` only "vision" is read.
  """
  prompts = len(vision.image)
  # A pass takes as many prompts as a minibatch has, or one a device if devices are more; each
  # device must get equally many.
  per_device = prompts // mesh.size(*mesh.ROWS)
  passes = next(count for count in range(min(minibatches, per_device), 0, -1)
                if per_device % count == 0)
  features = jax.lax.map(lambda part: _tower(model, params, part),
                         split_minibatches(vision, passes))
  features = features.swapaxes(0, 1).reshape(prompts, *features.shape[2:])
  return mesh.shard(split_minibatches(features, minibatches), None, None, None, "data")


def old_logprobs(model, params, minibatches):
  """Log-probability of every response token by `params`, in one pass over all minibatches.

  float32 [N, K, R, C], nats; 0 outside responses and in microbatches that are not used.
  """
  def of_minibatch(minibatch):
    rows, features = minibatch.rows, _features(model, params, minibatch.images)

    def of_microbatch(index, logprob):
      return logprob.at[index].set(_score(model, params, _microbatch(rows, index), features)[0])

    zeros = mesh.shard(jnp.zeros(rows.tokens.shape), None, mesh.ROWS)
    return _for_used(rows, of_microbatch, zeros)

  return jax.lax.map(of_minibatch, minibatches)


def gradient(model, config, params, reference, minibatch, signal, base=None):
  """Gradient of a minibatch, accumulated in float32 over the microbatches in use.

  Args:
    model: ModelConfig.
    config: AepoConfig.
    params: trained parameters: weights, or adapters of `base`.
    reference: frozen weights of the reference policy.
    minibatch: Minibatch.
    signal: loss.Signal.
    base: lora.Base, or None.

  Returns:
    Gradient like params, and loss.Sums.
  """
  rows, images = minibatch.rows, minibatch.images
  frozen = (*lora.trained_frozen(base, config.frozen), "vision")
  decoder = {name: part for name, part in params.items() if name not in frozen}
  zeros = jax.tree.map(lambda x, spec: mesh.shard(jnp.zeros_like(x), *spec), params,
                       lora.specs(model, base, params))
  start = {name: zeros[name] for name in decoder}
  divisors = minibatch_divisors(config, rows, signal)
  reference_features = _features(model, reference, images)

  def loss(decoder, features, part):
    logprob_RC, entropy_RC = _score(model, lora.join(base, params | decoder), part, features)
    reference_RC = jax.lax.stop_gradient(_score(model, reference, part, reference_features)[0])
    return microbatch_loss(config, signal, divisors, part, logprob_RC, entropy_RC, reference_RC)

  if tower_is_frozen(config, base):  # so policy and reference have the same features
    grads, sums = _accumulate(lambda decoder, part: loss(decoder, reference_features, part),
                              decoder, start, rows)
    return zeros | grads, sums
  features, pull = jax.vjp(lambda vision: _features(model, {"vision": vision}, images),
                           params["vision"])
  (grads, feature_grads), sums = _accumulate(
    lambda pair, part: loss(*pair, part), (decoder, features),
    (start, jnp.zeros(features.shape)), rows)
  # The tower runs once a prompt, not once a sample: it gets the sum over the microbatches.
  vision_grads, = pull(feature_grads.astype(features.dtype))
  return zeros | grads | {"vision": vision_grads}, sums


def _accumulate(loss, argument, start, rows):
  """Gradients of `loss(argument, microbatch)` in `argument`, added to `start`, and Sums."""
  def accumulate(of_slice):
    def microbatch(index, carry):
      grads, sums = carry
      new_grads, new = jax.grad(loss, has_aux=True)(argument, _microbatch(of_slice, index))
      ratio_max = jnp.maximum(sums.ratio_max, new.ratio_max)
      sums = jax.tree.map(jnp.add, sums, new).replace(ratio_max=ratio_max)
      return jax.tree.map(jnp.add, grads, new_grads), sums

    _, sums = jax.eval_shape(lambda: loss(argument, _microbatch(of_slice, 0)))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    grads, sums = _for_used(rows, microbatch, (start, sums))
    return (grads, sums.replace(ratio_max=None)), sums.ratio_max

  (grads, sums), ratio_max = mesh.sum_of_slices(accumulate, (1,))(rows.replace(used=None))
  return grads, sums.replace(ratio_max=ratio_max)


def _features(model, params, images):
  """Features [Q * U, D] that all rows of a minibatch pick from; `images` as in Minibatch."""
  if isinstance(images, VisionInput):
    images = _tower(model, params, images)
  return mesh.shard(images.reshape(-1, images.shape[-1]))


def _tower(model, params, vision):
  """Features [Q, U, D] of a VisionInput whose prompts are split over the devices."""
  vision = jax.tree.map(lambda x: mesh.shard(x, mesh.ROWS), vision)
  return qwen25_vl.vision_features(model, params, vision)


def _for_used(rows, body, start):
  """`fori_loop` over the microbatches in use; ares_jax.plan reads the bound K in its condition."""
  capacity = len(rows.tokens)
  return jax.lax.while_loop(lambda carry: (carry[0] < capacity) & (carry[0] < rows.used),
                            lambda carry: (carry[0] + 1, body(*carry)), (jnp.int32(0), start))[1]


def _microbatch(rows, index):
  """The rows of microbatch `index`, split over the devices."""
  return jax.tree.map(lambda x: mesh.shard(x[index], mesh.ROWS), rows.replace(used=None))


def _score(model, params, rows, features):
  return qwen25_vl.score(model, params, features, tokens=rows.tokens, unit=rows.unit,
                         positions=rows.positions, segment=rows.segment,
                         wanted=rows.response_mask)
