"""Stage 2, AEPO: GRPO that explores where window entropy is high (section 3.2, algorithm 1).

`aepo_step` is one jitted program: shaping of the whole rollout batch (shaping.py), then a scan over
minibatches, an optimizer update each, and inside it a loop over microbatches of packed rows
(policy_gradient.py). `run` is the host's side: sample, grade, pack, step, log.

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, N minibatches. Names ending
in _3 hold a value for each difficulty bucket: easy, medium, hard.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.data.sharded import sharded_stream
from ares_jax.data.sources import epochs
from ares_jax.models import flops, lora
from ares_jax.run.loop import run_stage
from ares_jax.run.metrics import truncate_lines
from ares_jax.run.nonfinite import dump_batch
from ares_jax.run.responses import write_rollouts
from ares_jax.sampling.branching import Branching
from ares_jax.sampling.rollout import collect
from ares_jax.sampling.sampler import stage_key
from ares_jax.system import hosts, mesh
from ares_jax.training.aepo_step import aepo_step, init_state
from ares_jax.training.batch import balance_minibatches, pack

# Share of high-window-entropy tokens below which AEPO is GRPO, above which it relaxes everything.
HWE_SHARE = (0.001, 0.2)


def train_aepo(params, source, config, *, generator, words, workdir, seed, threads, base=None):
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
  trigger_V, key = mesh.put(words), stage_key(seed, "aepo")

  def collate(rows, encoded, number):
    place = number * config.prompts + np.arange(config.prompts)
    return generator.encoder.batch(rows, place, encoded)

  def begin(state):
    hosts.on_process_0(lambda: truncate_lines(os.path.join(workdir, "rollouts.jsonl"), "aepo",
                                              int(state.step)))
    batches = announced(generator.encoder.config, sharded_stream(
      source, batch=config.prompts, seed=seed, encode=generator.encoder.encode, collate=collate,
      start=int(state.batches), threads=threads))
    order = functools.partial(balance_minibatches, minibatch=config.minibatch,
                              microbatch=config.microbatch, row_tokens=config.row_tokens)

    def step(state):
      # The threshold of the iterations so far: nan, which forks nothing, before the first.
      branching = Branching(state.controllers.threshold, config.branches, config.entropy.window)
      rollout = collect(generator, lora.join(base, state.params), batches, key,
                        group=config.group,
                        order=order, sampling=config.sampling, config=config.filter,
                        branching=branching if config.branches else None)
      hosts.on_process_0(functools.partial(
        write_rollouts, workdir, int(state.step) + 1, rollout, group=config.group,
        count=config.log_responses, chat=generator.encoder.chat))
      with generator.phases("packing"):
        batch, packing = _packed(rollout, config, generator.encoder)
      with generator.phases("update"), generator.phases("device"):
        state = state.replace(batches=state.batches + rollout.batches)
        state, metrics = aepo_step(generator.model, config, state, reference, batch, trigger_V,
                                   base)
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
  return flops.update_flops(
    config, model, prompts=rollout.prompts.length, answers=rollout.samples.mask.sum(1),
    image=flops.vision_flops(model.vision, rollout.prompts.vision["image"]), adapters=adapters)


def _packed(rollout, config, encoder):
  """RolloutBatch on the devices, and metrics of its packing."""
  rows, metrics = pack(
    rollout.prompts, rollout.samples, group=config.group, merge=encoder.merge,
    minibatch=config.minibatch, microbatch=config.microbatch, row_tokens=config.row_tokens,
    longest=encoder.config.max_tokens[-1] + config.sampling.max_tokens)
  return rollout.batch(rows).to_device(), metrics
