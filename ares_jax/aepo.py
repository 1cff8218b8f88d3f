"""Stage 2, AEPO: GRPO that explores where window entropy is high (section 3.2, algorithm 1).

`train_aepo` is the host's loop: sample, grade, pack, update, log. The update is one jitted program,
training/aepo_step.py: it shapes the rewards of the rollout batch (shaping.py), scans over its
minibatches, with an optimizer update each, and loops over each one's microbatches of packed rows
(policy_gradient.py).
"""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.data.sharded import sharded_stream
from ares_jax.data.sources import epochs
from ares_jax.models import flops, lora
from ares_jax.run.files import dump_batch
from ares_jax.run.loop import Validation, run_stage
from ares_jax.run.metrics import truncate_lines
from ares_jax.run.responses import GradedResponses, write_rollouts
from ares_jax.sampling.branching import Branching
from ares_jax.sampling.groups import collect
from ares_jax.sampling.sampler import stage_key
from ares_jax.system import hosts, mesh, shares
from ares_jax.training.aepo_step import aepo_step, init_state
from ares_jax.training.batch import AnswerScores, RolloutBatch, pack
from ares_jax.training.gradient_terms import gradient_terms
from ares_jax.training.minibatches import balance_minibatches, shares_prompts
from ares_jax.training.shaping import component_metrics, shape_rewards

# Share of high-window-entropy tokens below which AEPO is GRPO, above which it relaxes everything.
HWE_SHARE = (0.001, 0.2)


def train_aepo(params, source, config, context, *, trigger_V, validation=None):
  """AEPO on the rows of a source, as a resumable stage; returns the trained parameters.

  `params` are weights, or adapters of `context.base`. They are the frozen reference policy too, so
  after a cold start the reference has its adapters. trigger_V, bool, marks the tokens of V_sem.
  `validation`, an evaluation.validate.Validation or None, measures the weights meanwhile.
  """
  stage = _Iterations(source, config, context, params, mesh.put(trigger_V))
  # Every step donates the state, so the state needs weights of its own.
  state = init_state(config, jax.tree.map(jnp.copy, params), context.base)
  measure = validation and Validation(
    validation.every, lambda state: validation.measure(stage.policy(state)))
  return run_stage("aepo", state, stage.begin, steps=config.steps, workdir=context.workdir,
                   config=config.loop, phases=context.generator.phases, validation=measure).params


@dataclasses.dataclass(frozen=True)
class _Iterations:
  """What the iterations have in common."""

  source: object
  config: object  # AepoConfig
  context: object  # StageContext
  reference: dict  # parameters of the reference policy
  trigger_V: jax.Array

  def policy(self, state):
    """The weights that a state samples with."""
    return lora.join(self.context.base, state.params)

  def begin(self, state):
    """The function of a step for `run_stage`, which goes on after the batches of `state`."""
    context, encoder = self.context, self.context.generator.encoder
    hosts.on_process_0(lambda: truncate_lines(os.path.join(context.workdir, "rollouts.jsonl"),
                                              "aepo", int(state.step)))
    first, numbers = int(state.batches), np.arange(self.config.prompts)
    parts = sharded_stream(self.source, batch=self.config.prompts, seed=context.seed, start=first,
                           encode=encoder.encode, threads=context.threads)
    # Unlike a loop's variable, `map` does not keep the last part, with its images, alive.
    batches = map(
      lambda number, part: part.prompts(encoder, number * self.config.prompts + numbers),
      itertools.count(first), parts)
    return functools.partial(self._step, batches)

  def _step(self, batches, state):
    """Samples, grades, logs and packs groups, and updates the policy."""
    config, phases = self.config, self.context.generator.phases
    rollout = self._collect(batches, state)
    responses = GradedResponses(rollout.prompts.rows, rollout.prompts.held, rollout.samples,
                                rollout.texts, rollout.correct, rollout.format_ok, config.group,
                                rollout.scores)
    write_rollouts(self.context.workdir, int(state.step) + 1, responses,
                   self.context.generator.encoder, count=config.log_responses)
    with phases("packing"):
      batch, packing = pack_rollout(rollout, config, self.context.generator.encoder)
    with phases("update"), phases("device"):
      state, metrics = self._update(state.replace(batches=state.batches + rollout.batches), batch)
    if metrics["update/skipped"]:
      dump_batch(self.context.workdir, "aepo", int(state.step),
                 {"batch": batch, "controllers": state.controllers})
    metrics |= rollout.metrics | packing
    metrics |= epochs(self.source, int(state.batches) * config.prompts)
    if rollout.scores is not None:
      metrics |= component_metrics(config.reward, rollout.scores, group=config.group)
    metrics["work/flops"] += self._update_flops(rollout)
    return state, metrics, _note(metrics, config)

  def _collect(self, batches, state):
    config, generator = self.config, self.context.generator
    generator.grader.step = int(state.step)  # for reward functions that ask
    # The threshold of the iterations so far; NaN, at which nothing forks, before the first.
    branching = Branching(state.controllers.threshold, config.branches, config.entropy.window)
    order = functools.partial(
      balance_minibatches, minibatch=config.minibatch, microbatch=config.microbatch,
      row_tokens=config.row_tokens, share_prompts=shares_prompts(config))
    return collect(
      generator, self.policy(state), batches, stage_key(self.context.seed, "aepo"),
      group=config.group, order=order, sampling=config.sampling, config=config.filter,
      branching=branching if config.branches else None,
      rewards=functools.partial(drawn_rewards, config, state.controllers, self.trigger_V))

  def _update(self, state, batch):
    """The next state, and the metrics of the update."""
    config = self.config
    arguments = (self.context.generator.model, config, state, self.reference, batch,
                 self.trigger_V, self.context.base)
    terms = {}
    if config.terms_every and int(state.step) % config.terms_every == 0:
      terms = jax.device_get(gradient_terms(*arguments))
    state, metrics = aepo_step(*arguments)
    return state, jax.device_get(metrics) | terms

  def _update_flops(self, rollout):
    config, model = self.config, self.context.generator.model
    return flops.update_flops(
      dataclasses.replace(config, share_prompts=shares_prompts(config)), model,
      prompts=rollout.prompts.sizes[:, 0], answers=rollout.lengths,
      image=flops.vision_flops(model.images, rollout.prompts.sizes[:, 2:]),
      adapters=self.context.base is not None)


def drawn_rewards(config, controllers, trigger_V, samples, grades):
  """float32 [B]: rewards of Samples and their Grades, as drawn, before groups are filtered."""
  parts = shares.put_rows((samples.tokens, samples.mask, samples.entropy), len(grades.correct),
                          mesh.ROWS)
  correct, format_ok, scores = mesh.put(
    (grades.correct, grades.format_ok, AnswerScores.of(grades.scores)), mesh.ROWS)
  batch = RolloutBatch(*parts, correct, format_ok, vision=None, rows=None, scores=scores)
  return mesh.fetch(_rewards(config, controllers, batch, trigger_V))


@functools.partial(jax.jit, static_argnames="config")
def _rewards(config, controllers, batch, trigger_V):
  batch = jax.tree.map(mesh.shard, batch)
  return shape_rewards(config.entropy, config.reward, controllers, batch, trigger_V,
                       group=config.group)[0].reward


def pack_rollout(rollout, config, encoder):
  """RolloutBatch of a Rollout on the devices, and metrics of its packing."""
  rows, metrics = pack(
    rollout.prompts, rollout.samples, rollout.lengths, group=config.group,
    minibatch=config.minibatch, microbatch=config.microbatch, row_tokens=config.row_tokens,
    longest=encoder.config.max_tokens[-1] + config.sampling.max_tokens,
    share_prompts=shares_prompts(config))
  return rollout.batch(rows).to_device(config.prompts, config.microbatch), metrics


def _note(metrics, config):
  """The text beside the progress bar: the main metrics, and warnings about two of them."""
  drawn = ("" if "rollout/accuracy" not in metrics else
           f"(of all drawn {metrics['rollout/accuracy']:.2f}) ")
  note = (f"accuracy {metrics['reward/accuracy']:.2f} {drawn}"
          f"tokens {metrics['response/tokens']:.1f} hwe {metrics['hwe/share']:.1%}")
  # Outside this band windows say nothing about when to explore (section 3.2.1).
  if not HWE_SHARE[0] <= metrics["hwe/share"] <= HWE_SHARE[1]:
    note += f" (outside {HWE_SHARE[0]:.1%}..{HWE_SHARE[1]:.0%}: change entropy.quantile)"
  if metrics["loss/sampler_gap"] > config.loss.sampler_gap[0]:
    note += (f" (sampler and trainer are {metrics['loss/sampler_gap']:.2g} nats a token apart: "
             "they compute differently)")
  return note
