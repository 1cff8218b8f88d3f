"""Stage 2, AEPO: GRPO that explores where window entropy is high (section 3.2, algorithm 1).

`aepo_step` is one jitted program: shaping of the whole rollout batch (shaping.py), then a scan over
minibatches, an optimizer update each, and inside it a loop over microbatches of packed rows
(policy_gradient.py). `run` is the host's side: sample, grade, pack, step, log.

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, N minibatches. Names ending
in _3 hold a value for each difficulty bucket: easy, medium, hard.
"""

import dataclasses
import functools
import os
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ares_jax import hosts, mesh, model_flops, ops, optimizer, policy_gradient
from ares_jax.branching import Branching
from ares_jax.data.sources import epochs
from ares_jax.loop import LoopConfig, run_stage
from ares_jax.metrics import truncate
from ares_jax.models import lora
from ares_jax.optimizer import OptimizerConfig
from ares_jax.policy_gradient import KlConfig, LossConfig, Signal
from ares_jax.responses import write_rollouts
from ares_jax.rollout import FilterConfig, collect
from ares_jax.rows import balance, deal, pack
from ares_jax.run_folder import dump_batch
from ares_jax.sampler import SamplingConfig, stage_key
from ares_jax.shaping import Controllers, EntropyConfig, RewardConfig, by_bucket, shape
from ares_jax.shares import stream

# Share of high-window-entropy tokens below which AEPO is GRPO, above which it relaxes everything.
HWE_SHARE = (0.001, 0.2)
# Metrics of a minibatch that are above 0 where its update is skipped for what it was made of.
FAULTS = tuple(f"fault/{name}" for name in (
  "logits", "logprob", "reference", "sampler_logprob", "loss", "sampler_gap"))


@dataclasses.dataclass(frozen=True)
class AepoConfig:
  """Reinforcement learning."""

  steps: int  # iterations; 0 leaves the stage out
  prompts: int  # P
  group: int  # G
  branches: int  # of the group: sequences that may fork off others at high window entropy; 0 = none
  minibatch: int  # sequences an optimizer update: whole groups
  microbatch: int  # packed rows a gradient
  row_tokens: tuple[int, ...]  # tokens of a packed row: of these, what pads a batch least
  frozen: tuple[str, ...]  # parts of the weights that are not trained, e.g. ("vision",); LoRA: all
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
    if self.minibatch < 1 or rows % self.minibatch or self.minibatch % self.group:
      raise ValueError(
        f"{self.prompts} prompts x {self.group} samples = {rows} sequences: minibatch = "
        f"{self.minibatch} must divide them and be a multiple of group = {self.group}")
    if min(self.microbatch, *self.row_tokens, len(self.row_tokens)) < 1:
      raise ValueError(f"microbatch = {self.microbatch} must be >= 1, row_tokens = "
                       f"{self.row_tokens} one size or more, >= 1")


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
  opt_state = optimizer.start(_optimizer(config, params, base), params)
  controllers = Controllers(
    threshold=jnp.float32(jnp.nan), hwe_target=jnp.full(3, jnp.nan, jnp.float32),
    multiplier=jnp.zeros(3), kappa=jnp.float32(config.kl.start),
    alpha=jnp.full(3, 0.5, jnp.float32))
  return AepoState(params=params, opt_state=opt_state, **mesh.put(
    {"step": jnp.int32(0), "batches": jnp.int32(0), "controllers": controllers}))


def _optimizer(config, params, base):
  return optimizer.of(config.optimizer, params, frozen=lora.trained_frozen(base, config.frozen))


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def aepo_step(model, config, state, reference, batch, words_V, base=None):
  """One iteration on a rollout batch (algorithm 1).

  Args:
    model: ModelConfig.
    config: AepoConfig.
    state: AepoState; donated.
    reference: like state.params, of the reference policy; config.frozen parts are those of the
      state.
    batch: rollout.RolloutBatch.
    words_V: bool, tokens of V_sem (detectors "semantic" and "trigger").
    base: lora.Base under the adapters that state and reference hold; None where they hold weights.

  Returns:
    state, metrics (float32 scalars).
  """
  shaping, controllers, metrics = shape(
    config.entropy, config.reward, state.controllers, batch, words_V, group=config.group)
  advantage_B = ops.group_advantage(
    shaping.reward, group=config.group, normalize=config.loss.advantage,
    correct_B=batch.correct if config.loss.equal_groups == "zero" else None)
  metrics["reward/no_signal"] = (advantage_B == 0).mean()
  # Values that are not finite; any skips the update.
  faults = {"fault/reward": (~jnp.isfinite(shaping.reward)).sum(), "fault/sampler_entropy":
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
    images = deal(batch.vision, minibatches)
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
    sums["fault/loss"] = (~jnp.isfinite(sums["loss/policy"] + sums["loss/kl"])).astype(int)
    if config.loss.old_logprob == "sampler":
      # Of the first minibatch: once one was applied, the policy is not the one that sampled.
      sums["loss/sampler_gap"] = jnp.where(gap < 0, sums["loss/sampler_gap"], gap)
    sums["fault/sampler_gap"] = (sums["loss/sampler_gap"] > config.loss.sampler_gap[1]).astype(int)
    sound = sum([*faults.values(), *(x for name, x in sums.items() if name in FAULTS)]) == 0
    params, opt_state, update = optimizer.apply(tx, grads, opt_state, params, rate, sound)
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


def run(params, source, config, *, generator, words, workdir, seed, threads, base=None):
  """AEPO as a resumable stage.

  Args:
    params: what is trained, as the stage starts: weights, or adapters of `base`. It is the frozen
      reference policy too: after a cold start that trained adapters, these, not the base alone.
    source: random access to rows.
    config: AepoConfig.
    generator: rollout.Generator.
    words: bool [V] numpy, tokens of V_sem.
    workdir, seed, threads: folder, seed of shuffle and samples, reading threads.
    base: lora.Base, or None.

  Returns:
    `params`, trained.
  """
  reference = params
  # The state is donated step by step: it needs weights of its own.
  state = init_state(config, jax.tree.map(jnp.copy, params), base)
  words_V, key = mesh.put(words), stage_key(seed, "aepo")

  def collate(rows, encoded, number):
    place = number * config.prompts + np.arange(config.prompts)
    return generator.encoder.batch(rows, place, encoded)

  def begin(state):
    hosts.leader(lambda: truncate(os.path.join(workdir, "rollouts.jsonl"), "aepo", int(state.step)))
    batches = announced(generator.encoder.config, stream(
      source, batch=config.prompts, seed=seed, encode=generator.encoder.encode, collate=collate,
      start=int(state.batches), threads=threads))
    order = functools.partial(balance, minibatch=config.minibatch, microbatch=config.microbatch,
                              row_tokens=config.row_tokens)

    def step(state):
      # The threshold of the iterations so far: nan, which forks nothing, before the first.
      branching = Branching(state.controllers.threshold, config.branches, config.entropy.window)
      rollout = collect(generator, lora.join(base, state.params), batches, key,
                        group=config.group,
                        order=order, sampling=config.sampling, config=config.filter,
                        branching=branching if config.branches else None)
      hosts.leader(functools.partial(
        write_rollouts, workdir, int(state.step) + 1, rollout, group=config.group,
        count=config.log_responses, chat=generator.encoder.chat))
      with generator.phases("packing"):
        batch, packing = _packed(rollout, config, generator.encoder)
      with generator.phases("update"), generator.phases("device"):
        state = state.replace(batches=state.batches + rollout.batches)
        state, metrics = aepo_step(generator.model, config, state, reference, batch, words_V, base)
        metrics = jax.device_get(metrics)
      if metrics["update/skipped"]:
        dump_batch(workdir, "aepo", int(state.step),
                   {"batch": batch, "controllers": state.controllers})
      metrics |= rollout.metrics | packing | epochs(source, int(state.batches) * config.prompts)
      metrics["work/flops"] += _update_flops(rollout, config, generator.model, base is not None)
      note = (f"accuracy {metrics['reward/accuracy']:.2f} "
              f"tokens {metrics['response/tokens']:.1f} hwe {metrics['hwe/share']:.1%}")
      # Outside this band windows say nothing about when to explore (section 3.2.1).
      if not HWE_SHARE[0] <= metrics["hwe/share"] <= HWE_SHARE[1]:
        note += f" (outside {HWE_SHARE[0]:.1%}..{HWE_SHARE[1]:.0%}: change entropy.quantile)"
      if metrics["loss/sampler_gap"] > config.loss.sampler_gap[0]:
        note += (f" (sampler and trainer are {metrics['loss/sampler_gap']:.2g} nats a token apart: "
                 "they compute differently)")
      return state, metrics, note

    return step

  return run_stage("aepo", state, begin, steps=config.steps, workdir=workdir, config=config.loop,
                   phases=generator.phases).params


def announced(config, batches):
  """PromptBatches; process 0 says before the first of each of PromptConfig's shapes that it is."""
  seen = set()
  for batch in batches:
    shape = batch.tokens.shape[1], batch.vision["image"].shape[1]
    if shape not in seen:
      seen.add(shape)
      if jax.process_index() == 0:
        print(f"prompts of {shape[0]} tokens and {shape[1]} vision windows: shape {len(seen)} of "
              f"{len(config.max_tokens)}, compiled at its first use", file=sys.stderr, flush=True)
    yield batch


def _update_flops(rollout, config, model, adapters):
  return model_flops.update(
    config, model, prompts=rollout.prompts.length, answers=rollout.samples.mask.sum(1),
    image=model_flops.vision(model.vision, rollout.prompts.vision["image"]), adapters=adapters)


def _packed(rollout, config, encoder):
  """RolloutBatch on the devices, and metrics of its packing."""
  rows, metrics = pack(
    rollout.prompts, rollout.samples, group=config.group, merge=encoder.merge,
    minibatch=config.minibatch, microbatch=config.microbatch, row_tokens=config.row_tokens,
    longest=encoder.config.max_tokens[-1] + config.sampling.max_tokens)
  return rollout.batch(rows).to_device(), metrics
