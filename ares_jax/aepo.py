"""Stage 2, AEPO: GRPO that explores where window entropy is high (section 3.2, algorithm 1).

`aepo_step` is one jitted program: shaping of the whole rollout batch (shaping.py), then a scan over
minibatches, an optimizer update each, and inside it a scan over microbatches. `run` is the host's
side: sample, grade, step, log.

P prompts, G group, B = P*G rows (row b = p*G + g), T tokens. Names ending in _3 hold a value for
each difficulty bucket: easy, medium, hard.
"""

import dataclasses
import functools
import os
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ares_jax import mesh, ops, optimizer
from ares_jax.branching import Branching
from ares_jax.data.sources import epochs, stream
from ares_jax.loop import LoopConfig, run_stage
from ares_jax.metrics import truncate
from ares_jax.models import qwen25_vl, weights
from ares_jax.optimizer import OptimizerConfig
from ares_jax.responses import write_rollouts
from ares_jax.rollout import FilterConfig, collect
from ares_jax.run_folder import dump_batch
from ares_jax.sampler import SamplingConfig, stage_key
from ares_jax.shaping import Controllers, EntropyConfig, RewardConfig, by_bucket, shape

# Share of high-window-entropy tokens below which AEPO is GRPO, above which it relaxes everything.
HWE_SHARE = (0.001, 0.2)


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

  def __post_init__(self):
    if not 0 <= self.clip_low < 1 or self.clip_high < 0 or self.clip_dual <= 1:
      raise ValueError(f"clip_low = {self.clip_low} must be in [0, 1), clip_high = "
                       f"{self.clip_high} >= 0, clip_dual = {self.clip_dual} > 1")
    if self.importance_cap <= 0:
      raise ValueError(f"importance_cap = {self.importance_cap} must be > 0")


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


@dataclasses.dataclass(frozen=True)
class AepoConfig:
  """Reinforcement learning."""

  steps: int  # iterations; 0 leaves the stage out
  prompts: int  # P
  group: int  # G
  branches: int  # of the group: sequences that may fork off others at high window entropy; 0 = none
  minibatch: int  # rows an optimizer update
  microbatch: int  # rows a gradient
  frozen: tuple[str, ...]  # parts of the weights that are not trained, e.g. ("vision",)
  log_responses: int  # graded responses written to rollouts.jsonl an iteration
  sampling: SamplingConfig
  filter: FilterConfig
  entropy: EntropyConfig
  reward: RewardConfig
  loss: LossConfig
  kl: KlConfig
  optimizer: OptimizerConfig
  loop: LoopConfig

  def __post_init__(self):
    rows = self.prompts * self.group
    if self.steps < 0 or self.prompts < 1 or self.log_responses < 0:
      raise ValueError(f"steps = {self.steps} and log_responses = {self.log_responses} must be "
                       f">= 0, prompts = {self.prompts} >= 1")
    if self.group < 2:
      raise ValueError(f"group = {self.group}: an advantage needs at least 2 samples a prompt")
    if not 0 <= self.branches < self.group:
      raise ValueError(f"branches = {self.branches} is outside 0..group - 1 = {self.group - 1}: "
                       "what forks needs a sequence to fork from")
    if min(self.minibatch, self.microbatch) < 1 or (
        rows % self.minibatch or self.minibatch % self.microbatch or self.microbatch % self.group):
      raise ValueError(
        f"{self.prompts} prompts x {self.group} samples = {rows} rows: minibatch = "
        f"{self.minibatch} must divide them, microbatch = {self.microbatch} must divide minibatch "
        f"and be a multiple of group = {self.group}")


@flax.struct.dataclass
class AepoState:
  """All that reinforcement learning changes; saving it saves the run."""

  step: jax.Array  # int32 [], finished iterations
  batches: jax.Array  # int32 [], prompt batches drawn: more than `step` with online filtering
  params: dict
  opt_state: optax.OptState
  controllers: Controllers


def init_state(config, params):
  """AepoState before the first iteration, on the current mesh, which holds the weights."""
  opt_state = optimizer.start(
    optimizer.of(config.optimizer, params, frozen=config.frozen), params)
  controllers = Controllers(
    threshold=jnp.float32(jnp.nan), hwe_target=jnp.full(3, jnp.nan, jnp.float32),
    multiplier=jnp.zeros(3), kappa=jnp.float32(config.kl.start),
    alpha=jnp.full(3, 0.5, jnp.float32))
  step, batches = jnp.int32(0), jnp.zeros((), jnp.int32)
  return AepoState(params=params, opt_state=opt_state, **mesh.put(
    {"step": step, "batches": batches, "controllers": controllers}))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def aepo_step(model, config, state, reference, batch, words_V):
  """One iteration on a rollout batch (algorithm 1).

  Args:
    model: ModelConfig.
    config: AepoConfig.
    state: AepoState; donated.
    reference: frozen weights of the reference policy.
    batch: rollout.RolloutBatch.
    words_V: bool, tokens of V_sem (detectors "semantic" and "trigger").

  Returns:
    state, metrics (float32 scalars).
  """
  shaping, controllers, metrics = shape(
    config.entropy, config.reward, state.controllers, batch, words_V, group=config.group)
  advantage_B = ops.group_advantage(
    shaping.reward, group=config.group, normalize=config.loss.advantage,
    correct_B=batch.correct if config.loss.equal_groups == "zero" else None)
  metrics["reward/no_signal"] = (advantage_B == 0).mean()
  kl_weight_BT = ops.kl_weight(
    shaping.bucket, shaping.cover, beta_3=jnp.float32(config.kl.beta) * state.controllers.kappa,
    rho=config.kl.rho if config.kl.dynamic else 1.0)
  parts = _split(config, batch, shaping, advantage_B[:, None] + shaping.bonus, kl_weight_BT)
  if config.loss.old_logprob == "recompute":
    parts["old_logprob"] = jax.lax.map(functools.partial(
      jax.lax.map, lambda rows: _logprob(model, state.params, rows)[0]), parts)
  else:
    parts["old_logprob"] = parts["sampler_logprob"]

  tx = optimizer.of(config.optimizer, state.params, frozen=config.frozen)

  def minibatch(carry, part):
    params, opt_state = carry
    grads, sums = _gradient(model, config, params, reference, part)
    rate = optimizer.learning_rate(config.optimizer, state.step, config.steps)
    params, opt_state, update = optimizer.apply(tx, grads, opt_state, params, rate)
    return (params, opt_state), sums | {f"update/{name}": x for name, x in update.items()}

  (params, opt_state), sums = jax.lax.scan(minibatch, (state.params, state.opt_state), parts)
  params, opt_state = optimizer.keep_layout(tx, params, opt_state, weights.specs(model))
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
  metrics |= {name: value.mean() for name, value in sums.items()}
  metrics |= {"update/skipped": skipped, "loss/ratio_max": ratio_max}
  metrics |= by_bucket("kl/outside", kl_3) | by_bucket("kl/kappa", controllers.kappa)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state,
                       controllers=controllers), metrics


def _split(config, batch, shaping, advantage_BT, kl_weight_BT):
  """Rows as [minibatches, microbatches, rows, ...], all of a group in the same microbatch.

  A microbatch takes every n-th prompt, so that each device finds its share among its own rows.
  """
  rows = {"tokens": batch.tokens, "segment": batch.mask.astype(jnp.int32), "unit": batch.unit,
          "positions": jnp.moveaxis(batch.positions, 1, 0), "mask": batch.response_mask,
          "sampler_logprob": batch.sampler_logprob, "vision": batch.vision,
          "advantage": advantage_BT, "kl_weight": kl_weight_BT, "cover": shaping.cover,
          "bucket": shaping.bucket}
  minibatches = len(batch.tokens) // config.minibatch
  microbatches = config.minibatch // config.microbatch
  prompts = config.microbatch // config.group

  def split(x):
    samples = len(x) // (prompts * minibatches * microbatches)  # G, or 1 for what a prompt has once
    x = x.reshape(prompts, minibatches, microbatches, samples, *x.shape[1:])
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(minibatches, microbatches, prompts * samples, *x.shape[4:])

  return jax.tree.map(split, rows)


def _logprob(model, params, part):
  """(logprob, entropy) float32 [rows, T] of a microbatch; column t is about token t."""
  part = jax.tree.map(lambda x: mesh.shard(x, "data"), part)
  rows = len(part["tokens"])
  features = qwen25_vl.vision_features(model, params, part["vision"])
  features = jnp.repeat(features, rows // len(features), axis=0)
  embeds = qwen25_vl.embed(model, params, part["tokens"], part["unit"], features)
  hidden = qwen25_vl.hidden(model, params, embeds, jnp.moveaxis(part["positions"], 1, 0),
                            part["segment"])
  both = ops.logprob_and_entropy(
    hidden[:, :-1].reshape(-1, hidden.shape[-1]), qwen25_vl.unembedding(model, params),
    part["tokens"][:, 1:].reshape(-1), axes=mesh.AXES)
  # The first token of a row has no predecessor.
  return tuple(jnp.pad(x.reshape(rows, -1), ((0, 0), (1, 0))) for x in both)


def _gradient(model, config, params, reference, part):
  """Gradient of a minibatch, accumulated over its microbatches, and its metrics."""
  loss, kl = config.loss, config.kl
  tokens = part["mask"].sum()
  # What a mean divides by, of the whole minibatch: the parts' losses then add up to its own.
  total = tokens if loss.average == "token" else part["mask"].any(-1).sum()

  def loss_fn(params, rows):
    params = params | {name: jax.lax.stop_gradient(params[name]) for name in config.frozen}
    mask_BT, sampler_BT, old_BT = rows["mask"], rows["sampler_logprob"], rows["old_logprob"]
    logprob_BT, entropy_BT = _logprob(model, params, rows)
    reference_BT = jax.lax.stop_gradient(_logprob(model, reference, rows)[0])
    weight_BT = None
    if loss.old_logprob == "recompute":
      weight_BT = ops.importance_weight(old_BT, sampler_BT, mask_BT, cap=loss.importance_cap)
    policy, metrics = ops.policy_loss(
      logprob_BT, old_BT, rows["advantage"], mask_BT, clip_low=loss.clip_low,
      clip_high=loss.clip_high, clip_dual=loss.clip_dual, average=loss.average,
      weight_BT=weight_BT, total=total)
    kl_BT = ops.token_kl(logprob_BT, reference_BT, estimator=kl.estimator)
    penalty = ops.average_loss(rows["kl_weight"] * kl_BT, mask_BT, average=loss.average,
                               total=total)
    kl_3, kl_tokens_3 = ops.control_kl(kl_BT, mask_BT, rows["cover"], rows["bucket"])
    share = mask_BT.sum() / jnp.maximum(tokens, 1)
    ratio_max = metrics.pop("ratio_max")
    sums = {f"loss/{name}": value * share for name, value in metrics.items()}
    sums |= {"loss/policy": policy, "loss/kl": penalty,
             "kl/mean": ops.average_loss(kl_BT, mask_BT, total=tokens),
             "loss/entropy": ops.average_loss(entropy_BT, mask_BT, total=tokens),
             "loss/sampler_gap": ops.average_loss(jnp.abs(logprob_BT - sampler_BT), mask_BT,
                                                  total=tokens),
             "kl_sum_3": kl_3 * kl_tokens_3, "kl_tokens_3": kl_tokens_3, "ratio_max": ratio_max}
    return policy + penalty, sums

  def accumulate(grads, rows):
    new, sums = jax.grad(loss_fn, has_aux=True)(params, rows)
    return jax.tree.map(jnp.add, grads, new), sums

  grads, sums = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), part)
  ratio_max = sums.pop("ratio_max").max()
  return grads, jax.tree.map(lambda x: x.sum(0), sums) | {"ratio_max": ratio_max}


def run(params, source, config, *, generator, words, workdir, seed, threads):
  """AEPO as a resumable stage.

  Args:
    params: weights to start from, which are also the frozen reference policy.
    source: random access to rows.
    config: AepoConfig.
    generator: rollout.Generator.
    words: bool [V] numpy, tokens of V_sem.
    workdir, seed, threads: folder, seed of shuffle and samples, reading threads.

  Returns:
    The trained weights.
  """
  reference = params
  # The state is donated step by step: it needs weights of its own.
  state = init_state(config, jax.tree.map(jnp.copy, params))
  words_V, key = mesh.put(words), stage_key(seed, "aepo")

  def collate(rows, number):
    return generator.encoder.batch(rows, number * config.prompts + np.arange(config.prompts))

  def begin(state):
    truncate(os.path.join(workdir, "rollouts.jsonl"), "aepo", int(state.step))
    batches = stream(source, batch=config.prompts, seed=seed, collate=collate,
                     start=int(state.batches), threads=threads)

    def step(state):
      # The threshold of the iterations so far: nan, which forks nothing, before the first.
      branching = Branching(state.controllers.threshold, config.branches, config.entropy.window)
      rollout = collect(generator, state.params, batches, key, group=config.group,
                        sampling=config.sampling, config=config.filter,
                        branching=branching if config.branches else None)
      if jax.process_index() == 0:
        write_rollouts(workdir, int(state.step) + 1, rollout, group=config.group,
                       count=config.log_responses, chat=generator.encoder.chat)
      with generator.phases("update"):
        state = state.replace(batches=state.batches + rollout.batches)
        state, metrics = aepo_step(generator.model, config, state, reference,
                                   rollout.to_device(), words_V)
        metrics = jax.device_get(metrics)
      if metrics["update/skipped"]:
        dump_batch(workdir, "aepo", int(state.step), rollout.batch)
      metrics |= rollout.metrics | epochs(source, int(state.batches) * config.prompts)
      note = (f"accuracy {metrics['reward/accuracy']:.2f} "
              f"tokens {metrics['response/tokens']:.1f} hwe {metrics['hwe/share']:.1%}")
      # Outside this band windows say nothing about when to explore (section 3.2.1).
      if not HWE_SHARE[0] <= metrics["hwe/share"] <= HWE_SHARE[1]:
        note += f" (outside {HWE_SHARE[0]:.1%}..{HWE_SHARE[1]:.0%}: change entropy.quantile)"
      return state, metrics, note

    return step

  return run_stage("aepo", state, begin, steps=config.steps, workdir=workdir, config=config.loop,
                   phases=generator.phases).params
