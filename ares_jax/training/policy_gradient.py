"""The loss of stage 2 and its gradient, microbatch by microbatch (eq. 2, algorithm 1 lines 16-22).

B sequences of T response tokens in packed rows (rows.py): N minibatches, K microbatches of each,
R rows of a microbatch, C tokens of a row. Q prompts of a minibatch, U image units of a prompt,
D embed. Names ending in _3 hold a value for each difficulty bucket.
"""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from ares_jax import ops
from ares_jax.models import lora, qwen25_vl
from ares_jax.system import mesh
from ares_jax.training.batch import split_minibatches


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Clipped policy gradient (eq. 2)."""

  advantage: Literal["std", "none", "leave_one_out"]
  equal_groups: Literal["zero", "normalize"]  # groups of equal correctness: no advantage, or as is
  clip_low: float
  clip_high: float
  clip_dual: float
  average: Literal["token", "sequence"]
  old_logprob: Literal["sampler", "recompute"]
  importance_cap: float  # of min(exp(old - sampler), cap); used where old_logprob is recomputed
  # Mean |log-probability of the trainer - of the sampler|, both before the iteration's first
  # update, nats a token: beyond the first the progress bar warns, beyond the second the update is
  # skipped. inf = never.
  sampler_gap: tuple[float, float]

  def __post_init__(self):
    if not 0 <= self.clip_low < 1 or self.clip_high < 0 or self.clip_dual <= 1:
      raise ValueError(f"clip_low = {self.clip_low} must be in [0, 1), clip_high = "
                       f"{self.clip_high} >= 0, clip_dual = {self.clip_dual} > 1")
    if self.importance_cap <= 0:
      raise ValueError(f"importance_cap = {self.importance_cap} must be > 0")
    if not 0 < self.sampler_gap[0] <= self.sampler_gap[1]:
      raise ValueError(f"sampler_gap = {self.sampler_gap} must be two limits > 0: from the first "
                       "on a warning, from the second on no update; inf = never")


@dataclasses.dataclass(frozen=True)
class KlConfig:
  """The thinking budget: token-adaptive KL to the reference and its controller (lines 16-24)."""

  estimator: Literal["k1", "k2", "k3", "abs"]
  dynamic: bool  # False: kappa stays at `start` and HWE windows get no relief
  start: tuple[float, float, float]  # kappa at step 0
  beta: tuple[float, float, float]
  rho: float  # weight inside HWE windows over outside
  target: tuple[float, float, float]  # delta, nats a token outside windows
  rate: float
  low: float
  high: float

  def __post_init__(self):
    if not 0 <= self.rho <= 1 or not 0 < self.rate < 1 or min(self.target) <= 0:
      raise ValueError(f"rho = {self.rho} must be in [0, 1], rate = {self.rate} in (0, 1), target "
                       f"= {self.target} > 0")
    if min(self.beta) < 0 or not 0 < self.low <= min(self.start) <= max(self.start) <= self.high:
      raise ValueError(f"beta = {self.beta} must be >= 0, and 0 < low <= start <= high: low = "
                       f"{self.low}, start = {self.start}, high = {self.high}")


@flax.struct.dataclass
class Signal:
  """What the sequences are worth: with their rows, all that the loss needs.

  On every device whole, as a row holds sequences of any: at B = 4096, T = 16384 `cover` is 64 MiB.
  """

  advantage: jax.Array  # float32 [B]
  bonus: jax.Array | None  # float32 [B, T], psi of algorithm 1 line 13; None without
  cover: jax.Array  # bool [B, T], inside HWE windows
  bucket: jax.Array  # int32 [B]
  length: jax.Array  # int32 [B], response tokens
  beta_3: jax.Array  # float32, beta times kappa
  rho: float = flax.struct.field(pytree_node=False)


def frozen_features(model, params, vision, *, minibatches):
  """Image features of a whole batch, once: no weight that is trained is in them.

  Args:
    model: ModelConfig.
    params: weights; only params["vision"] is read.
    vision: VisionInput of P prompts.
    minibatches: N.

  Returns:
    [N, Q, U, D] in the compute dtype, split over "data" along D.
  """
  prompts = len(vision.image)
  # As many at once as a minibatch has, or one a device where devices are more; all devices alike.
  own = prompts // mesh.size(*mesh.ROWS)
  parts = next(count for count in range(min(minibatches, own), 0, -1) if own % count == 0)
  features = jax.lax.map(lambda part: _features(model, params, part),
                         split_minibatches(vision, parts))
  features = features.swapaxes(0, 1).reshape(prompts, *features.shape[2:])
  return mesh.shard(split_minibatches(features, minibatches), None, None, None, "data")


def old_logprobs(model, params, rows, images):
  """Log-probability of every token before the update, one pass over all minibatches.

  Args:
    model: ModelConfig.
    params: weights that sampled.
    rows: rows.PackedRows.
    images: what `gradient` takes, of all N minibatches.

  Returns:
    float32 [N, K, R, C], nats; 0 outside responses and in microbatches that are not used.
  """
  def minibatch(part):
    rows, images = part
    features = _shared(model, params, images)

    def microbatch(index, logprob):
      return logprob.at[index].set(_score(model, params, _at(rows, index), features)[0])

    zeros = mesh.shard(jnp.zeros(rows.tokens.shape), None, mesh.ROWS)
    return _for_used(rows, microbatch, zeros)

  return jax.lax.map(minibatch, (rows, images))


def gradient(model, config, params, reference, rows, images, signal, old, base=None):
  """Gradient of a minibatch, accumulated in float32 over the microbatches in use, and its metrics.

  The vision tower works once a prompt, not once a sample: a gradient for it is gathered over the
  microbatches and goes through the tower once.

  Args:
    model: ModelConfig.
    config: AepoConfig.
    params: what is trained: weights, or adapters of `base`.
    reference: frozen weights of the reference policy.
    rows: rows.PackedRows of the minibatch.
    images: its VisionInput; or, where the tower is frozen and so the reference's too, its features
      [Q, U, D].
    signal: Signal.
    old: float32 [K, R, C], log-probabilities before the update; None: those of `params`.
    base: lora.Base, or None.

  Returns:
    Gradient like params, and sums over microbatches of parts of means. Over the minibatches they
    average to means over the batch's tokens; "loss/sampler_gap" is over the minibatch's own, from
    `old` where that is recomputed, else from `params`.
  """
  frozen_vision = base is not None or "vision" in config.frozen
  frozen = (*lora.trained_frozen(base, config.frozen), "vision")
  trained = {name: part for name, part in params.items() if name not in frozen}
  if frozen_vision:
    features = reference_features = _shared(model, reference, images)
  else:
    features, pull = jax.vjp(lambda vision: _shared(model, {"vision": vision}, images),
                             params["vision"])
    reference_features = _shared(model, reference, images)
  # What a mean divides by: as many tokens in every minibatch, the batch's mean. Minibatches are
  # dealt by length (rows.balance) and may hold twice the tokens of others: divided by its own, a
  # token of a short answer would weigh twice that of a long one.
  tokens = signal.length.sum() * (config.minibatch / len(signal.length))
  total, length_B, own = tokens, jnp.maximum(signal.length, 1), rows.response_mask.sum()
  if config.loss.average == "sequence":
    # Every sequence in the rows counts 1, spread over its tokens.
    total = (rows.response_mask / length_B[rows.sequence]).sum()

  def loss_fn(trained, features, part, old_RC):
    logprob_RC, entropy_RC = _score(model, lora.join(base, params | trained), part, features)
    reference_RC = jax.lax.stop_gradient(_score(model, reference, part, reference_features)[0])
    return _loss(config, signal, part, logprob_RC, entropy_RC, reference_RC, old_RC,
                 own, tokens, total, length_B)

  def accumulate(of_rows, old):
    def microbatch(index, carry):
      (weight_grads, feature_grads), sums, largest = carry
      part, old_RC = _at(of_rows, index), None if old is None else old[index]
      grads, new = jax.grad(loss_fn, (0,) if frozen_vision else (0, 1), has_aux=True)(
        trained, features, part, old_RC)
      weight_grads = jax.tree.map(jnp.add, weight_grads, grads[0])
      if not frozen_vision:
        feature_grads += grads[1]
      largest = jnp.maximum(largest, new.pop("ratio_max"))
      return (weight_grads, feature_grads), jax.tree.map(jnp.add, sums, new), largest

    _, sums = jax.eval_shape(
      lambda: loss_fn(trained, features, _at(of_rows, 0), None if old is None else old[0]))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    largest = sums.pop("ratio_max")
    *grads_and_sums, largest = _for_used(rows, microbatch, (
      ({name: zeros[name] for name in trained},
       jnp.zeros(() if frozen_vision else features.shape)), sums, largest))
    return grads_and_sums, largest

  zeros = jax.tree.map(lambda x, spec: mesh.shard(jnp.zeros_like(x), *spec), params,
                       lora.specs(model, base, params))
  ((grads, feature_grads), sums), largest = mesh.sum_of_slices(accumulate, (1, 1))(
    rows.replace(used=None), old)
  if not frozen_vision:
    grads["vision"], = pull(feature_grads.astype(features.dtype))
  return zeros | grads, sums | {"ratio_max": largest}


def _loss(config, signal, part, logprob_RC, entropy_RC, reference_RC, old_RC, own, tokens, total,
          length_B):
  """A microbatch's share of the minibatch's loss, and of its metrics; `own` are its tokens."""
  loss, kl = config.loss, config.kl
  mask_RC, sampler_RC, b_RC = part.response_mask, part.sampler_logprob, part.sequence
  cover_RC, bucket_RC = signal.cover[b_RC, part.place] & mask_RC, signal.bucket[b_RC]
  advantage_RC = signal.advantage[b_RC]
  if signal.bonus is not None:
    advantage_RC += signal.bonus[b_RC, part.place]
  if old_RC is None:
    old_RC = jax.lax.stop_gradient(logprob_RC)
  before_RC = logprob_RC if loss.old_logprob == "sampler" else old_RC
  weight_RC = jnp.ones_like(logprob_RC)
  if loss.average == "sequence":
    weight_RC /= length_B[b_RC]
  kl_RC = ops.token_kl(logprob_RC, reference_RC, estimator=kl.estimator)
  kl_weight_RC = weight_RC * ops.kl_weight(bucket_RC, cover_RC, beta_3=signal.beta_3,
                                           rho=signal.rho)
  if loss.old_logprob == "recompute":
    weight_RC *= ops.importance_weight(old_RC, sampler_RC, mask_RC, cap=loss.importance_cap)
  policy, metrics = ops.policy_loss(
    logprob_RC, old_RC, advantage_RC, mask_RC, clip_low=loss.clip_low, clip_high=loss.clip_high,
    clip_dual=loss.clip_dual, weight_BT=weight_RC, total=total)
  penalty = ops.average_loss(kl_weight_RC * kl_RC, mask_RC, total=total)
  kl_3, kl_tokens_3 = ops.control_kl(kl_RC, mask_RC, cover_RC, bucket_RC)
  share = mask_RC.sum() / jnp.maximum(tokens, 1)
  ratio_max = metrics.pop("ratio_max")
  sums = {f"loss/{name}": value * share for name, value in metrics.items()}
  sums |= {"loss/policy": policy, "loss/kl": penalty,
           "kl/mean": ops.average_loss(kl_RC, mask_RC, total=tokens),
           "loss/entropy": ops.average_loss(entropy_RC, mask_RC, total=tokens),
           "loss/sampler_gap": ops.average_loss(jnp.abs(before_RC - sampler_RC), mask_RC,
                                                total=own),
           "kl_sum_3": kl_3 * kl_tokens_3, "kl_tokens_3": kl_tokens_3, "ratio_max": ratio_max}
  # Entropy is a function of all logits: where one is not finite, it is not.
  sums |= {f"nonfinite/{name}": (mask_RC & ~jnp.isfinite(x)).sum() for name, x in (
    ("logits", entropy_RC), ("logprob", logprob_RC), ("reference", reference_RC),
    ("sampler_logprob", sampler_RC))}
  return policy + penalty, sums


def _features(model, params, vision):
  return qwen25_vl.vision_features(model, params, jax.tree.map(lambda x: mesh.shard(x, mesh.ROWS),
                                                               vision))


def _shared(model, params, images):
  """Features [Q * U, D] that all rows of a minibatch pick from; `images` as for `gradient`."""
  if isinstance(images, qwen25_vl.VisionInput):
    images = _features(model, params, images)
  return mesh.shard(images.reshape(-1, images.shape[-1]))


def _for_used(rows, body, start):
  """`fori_loop` over a minibatch's microbatches in use; their room is a bound that a plan reads."""
  room = len(rows.tokens)
  return jax.lax.while_loop(lambda carry: (carry[0] < room) & (carry[0] < rows.used),
                            lambda carry: (carry[0] + 1, body(*carry)), (jnp.int32(0), start))[1]


def _at(rows, index):
  """One microbatch of a minibatch's rows."""
  return jax.tree.map(lambda x: mesh.shard(x[index], mesh.ROWS), rows.replace(used=None))


def _score(model, params, part, features):
  return qwen25_vl.score(model, params, features, tokens=part.tokens, unit=part.unit,
                         positions=part.positions, segment=part.segment,
                         wanted=part.response_mask)
