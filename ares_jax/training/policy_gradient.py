"""The gradient of stage 2, microbatch by microbatch (eq. 2, algorithm 1 lines 16-22).

B sequences of T response tokens in packed rows (batch.py): N minibatches, K microbatches of each,
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
from ares_jax.models.vision import VisionInput
from ares_jax.system import mesh
from ares_jax.system.config import optional
from ares_jax.training.batch import PackedRows, split_minibatches


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Clipped policy gradient (eq. 2)."""

  advantage: Literal["std", "none", "leave_one_out"]
  equal_groups: Literal["zero", "normalize"]  # groups of equal correctness: no advantage, or as is
  clip_low: float
  clip_high: float
  clip_dual: float
  # Tokens equal; sequences equal; or the sum over a sequence's tokens, averaged over sequences
  # ("sum"), and also divided by the longest answer ("constant", arXiv 2503.20783).
  average: Literal["token", "sequence", "sum", "constant"]
  old_logprob: Literal["sampler", "recompute"]
  importance_cap: float  # of min(exp(old - sampler), cap); used where old_logprob is recomputed
  # Mean |log-probability of the trainer - of the sampler|, both before the iteration's first
  # update, nats a token: beyond the first the progress bar warns, beyond the second the update is
  # skipped. inf = never.
  sampler_gap: tuple[float, float]
  ratio: Literal["token", "sequence"] = optional("token")  # sequence: one for a whole answer (GSPO)
  # What is clipped: the objective, or the weight of the log-probability's gradient (CISPO).
  clip: Literal["loss", "weight"] = optional("loss")

  def __post_init__(self):
    if not 0 <= self.clip_low <= 1 or self.clip_high < 0 or self.clip_dual <= 1:
      raise ValueError(f"clip_low = {self.clip_low} must be in [0, 1], clip_high = "
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
  """Values of the sequences that their packed rows do not hold, replicated on every device."""

  advantage: jax.Array  # float32 [B]
  bonus: jax.Array | None  # float32 [B, T], psi of algorithm 1 line 13; None without
  cover: jax.Array  # bool [B, T], inside HWE windows; 64 MiB at B = 4096 and T = 16384
  bucket: jax.Array  # int32 [B]
  length: jax.Array  # int32 [B], response tokens
  beta_3: jax.Array  # float32, beta times kappa


@flax.struct.dataclass
class Sums:
  """Sums over the microbatches of a minibatch."""

  # Parts of means: averaged over the minibatches, they are means over the batch. loss/sampler_gap
  # is the mean over the minibatch's own tokens.
  metrics: dict
  nonfinite: dict  # {value: int32 [], response tokens where it is not finite}
  kl_sum_3: jax.Array  # float32 [3]: KL of tokens outside HWE windows, nats
  kl_tokens_3: jax.Array  # [3]: number of these tokens
  ratio_max: jax.Array  # float32 []: the maximum, not a sum


@flax.struct.dataclass
class Minibatch:
  """The sequences of one optimizer update; with a leading axis [N], those of all updates."""

  rows: PackedRows
  # Of Q prompts; features [Q, U, D] where the tower is frozen, None for a text model.
  images: VisionInput | jax.Array | None


def tower_is_frozen(model, config, base):
  """Whether no weight of a vision tower is trained: frozen, under adapters, or none there."""
  return model.vision is None or base is not None or "vision" in config.frozen


def frozen_features(model, params, vision, *, minibatches):
  """Features [N, Q, U, D] of a batch's VisionInput, computed once because the tower is frozen.

  They have the compute dtype and are split over "data" along D; of `params` only "vision" is read.
  None for a text model.
  """
  if model.vision is None:
    return None
  prompts = len(vision.image)
  # A pass takes a minibatch's prompts, or one a device if devices are more; each device must get
  # equally many.
  per_device = prompts // mesh.size(*mesh.ROWS)
  passes = next(count for count in range(min(minibatches, per_device), 0, -1)
                if per_device % count == 0)
  features = jax.lax.map(lambda part: _tower(model, params, part),
                         split_minibatches(vision, passes))
  features = features.swapaxes(0, 1).reshape(prompts, *features.shape[2:])
  return mesh.shard(split_minibatches(features, minibatches), None, None, None,
                    (*_width_axes(model), "data"))


def old_logprobs(model, config, params, minibatches):
  """Log-probability of every response token by `params`, in one pass over all minibatches.

  float32 [N, K, R, C], nats; 0 outside responses and in microbatches that are not used.
  """
  def of_minibatch(minibatch):
    rows, features = minibatch.rows, _features(model, params, minibatch.images)

    def of_microbatch(index, logprob):
      scores = _score(model, config, params, _microbatch(rows, index), features)
      return logprob.at[index].set(scores[0])

    zeros = mesh.shard(jnp.zeros(rows.tokens.shape), None, mesh.ROWS)
    return _for_used(rows, of_microbatch, zeros)

  return jax.lax.map(of_minibatch, minibatches)


def gradient(model, config, params, reference, minibatch, signal, base=None):
  """Gradient of a Minibatch, accumulated in float32 over the microbatches in use, and Sums.

  `params` are weights, or adapters of the lora.Base `base`; `reference` are weights.
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
    policy = lora.join(base, params | decoder)
    logprob_RC, entropy_RC = _score(model, config, policy, part, features)
    reference_RC = jax.lax.stop_gradient(
      _score(model, config, reference, part, reference_features)[0])
    return microbatch_loss(config, signal, divisors, part, logprob_RC, entropy_RC, reference_RC)

  if tower_is_frozen(model, config, base):  # so policy and reference have the same features
    grads, sums = _accumulate(lambda decoder, part: loss(decoder, reference_features, part),
                              decoder, start, rows)
    return zeros | grads, sums
  features, pull = jax.vjp(lambda vision: _features(model, {"vision": vision}, images),
                           params["vision"])
  (grads, feature_grads), sums = _accumulate(lambda pair, part: loss(*pair, part),
                                             (decoder, features),
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


@flax.struct.dataclass
class Divisors:
  """Divisors of the means over a minibatch's tokens."""

  # Mean of the minibatches' response tokens, not the tokens of this one. Minibatches are made by
  # length (minibatches.balance_minibatches), and one may hold twice the tokens of another: divided
  # by its number, a token of a short answer would weigh twice as much as one of a long answer.
  tokens: jax.Array
  loss: jax.Array  # `tokens`, or sequences, or sequences times the longest answer: config.average
  minibatch_tokens: jax.Array  # response tokens of this minibatch
  length: jax.Array  # int32 [B]: response tokens of each sequence, at least 1


def minibatch_divisors(config, rows, signal):
  """Divisors of the minibatch of packed `rows`."""
  tokens = signal.length.sum() * (config.minibatch / len(signal.length))
  loss, length_B = tokens, jnp.maximum(signal.length, 1)
  if config.loss.average != "token":
    # Every sequence in the rows counts 1, spread over its tokens.
    loss = (rows.response_mask / length_B[rows.sequence]).sum()
  if config.loss.average == "constant":
    loss *= config.sampling.max_tokens
  return Divisors(tokens, loss, rows.response_mask.sum(), length_B)


def microbatch_loss(config, signal, divisors, rows, logprob_RC, entropy_RC, reference_RC):
  """A microbatch's part of the minibatch's loss, clipped policy loss and KL penalty, and Sums.

  Log-probabilities of the policy and of the reference, and entropies, are float32 nats.
  """
  loss, kl = config.loss, config.kl
  mask_RC, sampler_RC, sequence_RC = rows.response_mask, rows.sampler_logprob, rows.sequence
  old_RC = jax.lax.stop_gradient(logprob_RC) if rows.old_logprob is None else rows.old_logprob
  share_RC = jnp.ones_like(logprob_RC)
  if loss.average == "sequence":
    share_RC /= divisors.length[sequence_RC]

  # Clipped policy gradient.
  advantage_RC = signal.advantage[sequence_RC]
  if signal.bonus is not None:
    advantage_RC += signal.bonus[sequence_RC, rows.response_index]
  weight_RC = share_RC
  if loss.old_logprob == "recompute":
    weight_RC *= ops.importance_weight(old_RC, sampler_RC, mask_RC, cap=loss.importance_cap)
  policy, ratios = ops.policy_loss(
    logprob_RC, old_RC, advantage_RC, mask_RC, clip_low=loss.clip_low, clip_high=loss.clip_high,
    clip_dual=loss.clip_dual, weight_BT=weight_RC, total=divisors.loss, ratio=loss.ratio,
    clip=loss.clip, segment_BT=rows.segment if loss.ratio == "sequence" else None)
  ratio_max = ratios.pop("ratio_max")

  # KL to the reference, relaxed inside HWE windows.
  cover_RC = signal.cover[sequence_RC, rows.response_index] & mask_RC
  bucket_RC = signal.bucket[sequence_RC]
  kl_RC = ops.token_kl(logprob_RC, reference_RC, estimator=kl.estimator)
  beta_RC = share_RC * ops.kl_weight(bucket_RC, cover_RC, beta_3=signal.beta_3,
                                       rho=kl.rho if kl.dynamic else 1.0)
  penalty = ops.average_loss(beta_RC * kl_RC, mask_RC, total=divisors.loss)
  kl_3, kl_tokens_3 = ops.control_kl(kl_RC, mask_RC, cover_RC, bucket_RC)

  part = mask_RC.sum() / jnp.maximum(divisors.tokens, 1)
  before_RC = logprob_RC if loss.old_logprob == "sampler" else old_RC
  metrics = {f"loss/{name}": mean * part for name, mean in ratios.items()} | {
    "loss/policy": policy, "loss/kl": penalty,
    "kl/mean": ops.average_loss(kl_RC, mask_RC, total=divisors.tokens),
    "loss/entropy": ops.average_loss(entropy_RC, mask_RC, total=divisors.tokens),
    "loss/sampler_gap": ops.average_loss(jnp.abs(before_RC - sampler_RC), mask_RC,
                                         total=divisors.minibatch_tokens)}
  # Entropy uses every logit, so a non-finite entropy means a non-finite logit.
  nonfinite = {name: (mask_RC & ~jnp.isfinite(values)).sum() for name, values in (
    ("logits", entropy_RC), ("logprob", logprob_RC), ("reference", reference_RC),
    ("sampler_logprob", sampler_RC))}
  return policy + penalty, Sums(metrics, nonfinite, kl_3 * kl_tokens_3, kl_tokens_3, ratio_max)


def _features(model, params, images):
  """Features [Q * U, D] that all rows of a minibatch pick from; `images` as in Minibatch."""
  if images is None:
    return None
  if isinstance(images, VisionInput):
    images = _tower(model, params, images)
  return mesh.shard(images.reshape(-1, images.shape[-1]), None, _width_axes(model))


def _tower(model, params, vision):
  """Features [Q, U, D] of a VisionInput whose prompts are split over the devices."""
  vision = jax.tree.map(lambda x: mesh.shard(x, mesh.ROWS), vision)
  features, axes = qwen25_vl.vision_features(model, params, vision), _width_axes(model)
  return mesh.shard(features, mesh.ROWS, None, axes) if axes else features


def _width_axes(model):
  """The mesh axes that split a token's features beside "data": "model" with DeepStack, if it can.

  Features are several times as wide there: those of 512 prompts of 4096 image tokens of
  Qwen3-VL-8B are 64 GiB in bfloat16, those of the 16 prompts of a minibatch 2 GiB. On 16 x 4 chips
  the plan of an update needs 11.2 GiB a chip, 16.0 where "data" alone splits them, and 22.3 where
  "data" stands before "model".
  """
  deep = len(model.vision.deepstack)
  return mesh.dividing((1 + deep) * model.embed, "data", "model")[1:] if deep else ()


def _for_used(rows, body, start):
  """`fori_loop` over the microbatches in use; ares_jax.plan reads the bound K in its condition."""
  capacity = len(rows.tokens)
  return jax.lax.while_loop(lambda carry: (carry[0] < capacity) & (carry[0] < rows.used),
                            lambda carry: (carry[0] + 1, body(*carry)), (jnp.int32(0), start))[1]


def _microbatch(rows, index):
  """The rows of microbatch `index`, split over the devices."""
  return jax.tree.map(lambda x: mesh.shard(x[index], mesh.ROWS), rows.replace(used=None))


def _score(model, config, params, rows, features):
  """`score` of the policy that sampled: at the sampling temperature, as TRL and verl have it."""
  return qwen25_vl.score(model, params, features, tokens=rows.tokens, unit=rows.unit,
                         positions=rows.positions, segment=rows.segment,
                         prompt_segment=rows.prompt_segment, wanted=rows.response_mask,
                         temperature=config.sampling.temperature)
