"""Supervised fine-tuning on packed rows: stage 1 learns what AdaCS selected, the warm-up lessons.

R packed rows, T tokens a row.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ares_jax import mesh, model_flops, optimizer, shares
from ares_jax.data.sources import epochs
from ares_jax.data.traces import encode_example, trace_batch
from ares_jax.loop import LoopConfig, run_stage
from ares_jax.models import lora, qwen25_vl
from ares_jax.models.vision import VisionInput
from ares_jax.optimizer import OptimizerConfig
from ares_jax.run_folder import dump_batch


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """Supervised fine-tuning."""

  steps: int  # 0 leaves the stage out
  batch: int  # examples a step
  shuffle: bool  # False takes the rows in their order, a curriculum
  row_tokens: tuple[int, ...]  # T, tokens of a packed row: of these, what pads a batch least
  row_windows: int  # vision windows a packed row has room for
  microbatch: int  # packed rows a gradient; a step accumulates over its rows
  frozen: tuple[str, ...]  # parts of the weights that are not trained, e.g. ("vision",); LoRA: all
  optimizer: OptimizerConfig
  loop: LoopConfig

  def __post_init__(self):
    if self.steps < 0 or self.batch < 1 or self.microbatch < 1:
      raise ValueError(f"steps = {self.steps} must be >= 0, batch = {self.batch} and "
                       f"microbatch = {self.microbatch} >= 1")
    if min(self.row_windows, *self.row_tokens, len(self.row_tokens)) < 1:
      raise ValueError(f"row_windows = {self.row_windows} must be >= 1, row_tokens = "
                       f"{self.row_tokens} one size or more, >= 1")


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
  tx = optimizer.of(config.optimizer, state.params, frozen=frozen)
  # Entropy is a function of all logits: where one is not finite, it is not.
  faults = {"fault/logits": ~jnp.isfinite(entropy), "fault/logprob": ~jnp.isfinite(loss)}
  params, opt_state, metrics = optimizer.apply(
    tx, grads, state.opt_state, state.params, rate, ~jnp.any(jnp.stack([*faults.values()])))
  params, opt_state = optimizer.keep_layout(tx, params, opt_state, lora.specs(model, base, params))
  metrics |= faults | {"loss": loss, "entropy": entropy, "tokens": tokens, "learning_rate": rate,
                       "rows": jnp.float32(len(batch["tokens"])),
                       "pack/real": (batch["segment"] > 0).mean()}
  return SftState(state.step + 1, params, opt_state), metrics


def fine_tune(params, source, config, *, stage, generator, workdir, seed, threads, base=None):
  """Supervised fine-tuning as a resumable stage.

  Args:
    params: what is trained, as the stage starts: weights, or adapters of `base`; donated.
    source: rows with a "response".
    config: SftConfig.
    stage: name of the stage.
    generator: rollout.Generator.
    workdir, seed, threads: folder, shuffle seed, reading threads.
    base: lora.Base, or None.

  Returns:
    `params`, trained.
  """
  opt_state = optimizer.start(optimizer.of(
    config.optimizer, params, frozen=lora.trained_frozen(base, config.frozen)), params)

  encode = functools.partial(encode_example, generator.encoder)

  def collate(rows, examples, _):
    return trace_batch(generator.encoder, rows, row_tokens=config.row_tokens,
                       row_windows=config.row_windows, row_multiple=config.microbatch,
                       examples=examples)

  def begin(state):
    batches = shares.stream(source, batch=config.batch, seed=seed, encode=encode, collate=collate,
                            start=int(state.step), threads=threads, shuffle=config.shuffle)

    def step(state):
      with generator.phases("data"):
        traces = next(batches)
        batch = to_device(traces)
      with generator.phases("update"), generator.phases("device"):
        state, metrics = sft_step(generator.model, config, state, batch, base)
        metrics = jax.device_get(metrics) | epochs(source, int(state.step) * config.batch)
      metrics |= _work(traces, config, generator.model, base is not None)
      if metrics["skipped"]:
        dump_batch(workdir, stage, int(state.step), {"batch": batch})
      return state, metrics, f"loss {metrics['loss']:.3f}"

    return step

  state = SftState(mesh.put(jnp.int32(0)), params, opt_state)
  return run_stage(stage, state, begin, steps=config.steps, workdir=workdir,
                   config=config.loop, phases=generator.phases).params


def _work(batch, config, model, adapters):
  """Tokens of a TraceBatch, prompts too, and FLOPs that learning them needs."""
  image = model_flops.vision(model.vision, batch.vision["image"])
  return {"work/tokens": (batch.segment > 0).sum(),
          "work/flops": model_flops.fine_tuning(config, model, batch.segment, batch.loss_mask.sum(),
                                               image, adapters=adapters)}


def to_device(batch):
  """The arrays of a data.traces.TraceBatch on the current mesh, rows over mesh.ROWS."""
  arrays = mesh.put({
    "tokens": batch.tokens, "segment": batch.segment, "unit": batch.unit,
    "loss_mask": batch.loss_mask, "vision": VisionInput(**batch.vision)}, mesh.ROWS)
  arrays["positions"] = mesh.put(batch.positions, None, mesh.ROWS)
  return arrays
