"""The programs of one AEPO iteration on shapes alone: what a run compiles, without weights or data.

P prompts, G group, B = P*G sequences, Tp prompt tokens, T response tokens, V vocabulary; N
minibatches of K microbatches of R packed rows of C tokens (training/batch.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models import flops, lora, weights
from ares_jax.models.vision import VisionInput
from ares_jax.sampling import sampler, scheduler, slots
from ares_jax.sampling.branching import Branching
from ares_jax.system import mesh
from ares_jax.training import aepo_step, optimizer
from ares_jax.training.batch import PackedRows, RolloutBatch, row_capacity
from ares_jax.training.sft_step import SftState, sft_step
from ares_jax.training.shaping import Controllers


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of an iteration."""

  name: str
  calls: int  # an iteration
  trace: Callable  # () -> jax.stages.Traced, on the current mesh
  beside: float  # bytes a device that the run holds meanwhile and the program does not get


def aepo_programs(config, model, end=(0,)):
  """Programs of an iteration of a TrainConfig on the current mesh, in the order they run.

  All shapes are the largest of the config: prompts of the last `prompt.max_tokens` and `windows`,
  answers of `max_tokens`. With online filtering an iteration may sample several batches; here one.
  `end`, token ids that end an answer, are part of what is compiled, but hardly of its cost.

  Raises:
    ValueError: sizes do not divide over the mesh, or keys and values do not fit engine.cache_gib.
  """
  settings, devices = config.aepo, mesh.size(*mesh.ROWS)
  for key, count in (("prompts", settings.prompts), ("microbatch", settings.microbatch)):
    if count % devices:
      raise ValueError(f"config.aepo.{key} = {count} does not divide over {devices} devices of the "
                       "\"slice\" and \"data\" axes; change it or config.mesh")
  prompt_tokens, windows = config.prompt.max_tokens[-1], config.prompt.windows[-1]
  prompts, tokens = settings.prompts, settings.sampling.max_tokens
  try:
    held = scheduler.plan_cache(model, config.engine, prompts=prompts, prompt_tokens=prompt_tokens,
                              group=settings.group, tokens=tokens)
  except ValueError as error:
    raise ValueError(f"config.aepo.prompts = {prompts}: {error}") from error

  params, base, whole = _policy(config.model.lora, model)
  lowered = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, model.compute_dtype, sharding=sharding),
    whole, sampler.rollout_shardings(model, whole))
  # On one device of "data" rollouts read the base itself, where it is.
  shared = device_bytes(base) if base is not None and mesh.size("data") == 1 else 0.0
  vocabulary = _split(jax.ShapeDtypeStruct((model.vocab,), bool))
  asked, number = _prompts(model, held.read * devices, prompt_tokens, windows)
  read = _laid_out(model, jax.eval_shape(functools.partial(
    slots.empty_prompt_slots, model, prompts=prompts, prompt_slots=held.prompt_slots * devices,
    tokens=prompt_tokens)))
  state = _laid_out(model, jax.eval_shape(functools.partial(slots.idle_slots, model, rows=prompts *
                                                            settings.group, slots=held.slots *
                                                            devices, tokens=tokens,
                                                            group=settings.group,
                                                            branches=settings.branches)))
  branching = Branching(_split(jax.ShapeDtypeStruct((), jnp.float32)), settings.branches,
                        settings.entropy.window) if settings.branches else None
  trained = _state(settings, params, base)
  beside = device_bytes((trained, params, base))

  def reshard():
    moved = params if shared else whole
    return jax.jit(
      functools.partial(jax.tree.map, lambda x: x.astype(model.compute_dtype)),
      out_shardings=sampler.rollout_shardings(model, whole) if moved is whole else None,
    ).trace(moved)

  def decode():
    return slots.decode.trace(
      model, lowered, read, state, _split(jax.eval_shape(lambda: jax.random.key(0))), vocabulary,
      branching, group=settings.group, sampling=settings.sampling, end=end,
      steps=config.engine.chunk, live=tokens)

  def update():
    batch = _rollout(model, settings, prompt_tokens, windows)
    return aepo_step.aepo_step.trace(model, settings, trained, params, batch, vocabulary, base)

  rounds = -(-prompts * settings.group // (held.slots * devices))
  return (
    Program("reshard", 1, reshard, beside - device_bytes(params if shared else whole)),
    Program("prefill", -(-prompts // (held.read * devices)),
            lambda: slots.read_prompts.trace(model, lowered, read, asked, number, number),
            beside - shared + device_bytes(state)),
    # Decoding is not given the vision tower, which rollouts hold all the same.
    Program("decode", rounds * -(-tokens // config.engine.chunk), decode,
            beside - shared + device_bytes(lowered["vision"])),
    Program("aepo_step", 1, update, 0.0))


def _policy(section, model):
  """(what is trained, lora.Base or None, weights that they make) in shapes."""
  if not section.rank:
    params = weights.abstract(model, _devices(), jnp.float32)
    return params, None, params
  base = lora.Base(weights.abstract(model, _devices(), jnp.dtype(model.compute_dtype)),
                   section.alpha / section.rank)
  params = lora.abstract(model, section, _devices())
  return params, base, lora.attach(base.weights, params)


def sft_program(config, model, stage):
  """The Program of a step of `stage`, "warmup" or "adacs": every example in a row of its own."""
  settings = getattr(config, stage)
  rows = -(-settings.batch // settings.microbatch) * settings.microbatch

  def trace():
    params, base, _ = _policy(config.model.lora, model)
    trained = _state(settings, params, base)
    ints, mask = (jax.ShapeDtypeStruct((rows, max(settings.row_tokens)), dtype)
                  for dtype in (jnp.int32, bool))
    batch = _split(dict(tokens=ints, segment=ints, unit=ints, loss_mask=mask,
                        vision=_vision(model, rows, settings.row_windows)), mesh.ROWS)
    batch["positions"] = _split(
      jax.ShapeDtypeStruct((3, *ints.shape), jnp.int32), None, mesh.ROWS)
    return sft_step.trace(
      model, settings, SftState(trained.step, trained.params, trained.opt_state), batch,
      base)

  return Program(stage, 1, trace, 0.0)


def device_bytes(tree):
  """Bytes of a tree of shapes that one device holds."""
  return float(sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def needed_flops(config, model):
  """FLOPs that an iteration's mathematics needs, by program (model_flops.py): every prompt, image
  and answer as long as the config allows."""
  settings, size = config.aepo, model.vision
  patches = config.prompt.windows[-1] * size.window_patches
  prompts = np.full(settings.prompts, config.prompt.max_tokens[-1])
  answers = np.full(settings.prompts * settings.group, settings.sampling.max_tokens)
  image = settings.prompts * flops.tower_flops(size, patches, patches**2)
  sizes = dict(prompts=prompts, answers=answers, image=image)
  return {"reshard": 0.0, **flops.rollout_flops(model, shared=0, **sizes),
          "aepo_step": flops.update_flops(settings, model, adapters=bool(config.model.lora.rank),
                                          **sizes)}


def _devices():
  return jax.sharding.get_mesh()


def _split(tree, *spec):
  """The shapes of `tree`, laid out on the current mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.sharding(*spec)), tree)


def _vision(model, prompts, windows):
  cells = prompts, windows, model.vision.window_patches
  return VisionInput(
    patches=jax.ShapeDtypeStruct((*cells, model.vision.patch_dim), jnp.uint8),
    hw=jax.ShapeDtypeStruct((*cells, 2), jnp.int32), image=jax.ShapeDtypeStruct(cells, jnp.int32))


def _prompts(model, prompts, tokens, windows):
  """What `slots.read` is given of the prompts it reads, and their numbers."""
  ints, one = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((prompts, tokens), (prompts,)))
  positions = jax.ShapeDtypeStruct((3, prompts, tokens), jnp.int32)
  return _split(dict(tokens=ints, length=one, unit=ints, prompt_id=one,
                     vision=_vision(model, prompts, windows)), mesh.ROWS) | {
    "positions": _split(positions, None, mesh.ROWS)}, _split(one, mesh.ROWS)


def _laid_out(model, shapes):
  """`slots.Prompts` or `slots.Slots` as they lie on the mesh."""
  cache = shapes.cache.replace(
    length=_split(shapes.cache.length, mesh.ROWS),
    **{name: _split(getattr(shapes.cache, name), None, mesh.ROWS, None, slots.kv_axis(model))
       for name in ("k", "v")})
  fields = {field.name: _split(getattr(shapes, field.name), mesh.ROWS)
            for field in dataclasses.fields(shapes) if field.name != "cache"}
  return type(shapes)(cache=cache, **fields)


def _state(config, params, base):
  """`aepo.init_state` in shapes."""
  tx = optimizer.stage_optimizer(config, params, base)
  layouts = []
  # Inside a trace: optax makes small arrays on the way, and described devices hold none.
  jax.eval_shape(lambda: layouts.append(
    optimizer.state_shardings(tx, params, jax.tree.map(lambda x: x.sharding, params))))
  moments = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(tx.init, params), layouts[0])
  three, one = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3,), ()))
  controllers = Controllers(threshold=one, hwe_target=three, multiplier=three, kappa=three,
                            alpha=three)
  count = _split(jax.ShapeDtypeStruct((), jnp.int32))
  return aepo_step.AepoState(step=count, batches=count, params=params, opt_state=moments,
                             controllers=_split(controllers))


def _rollout(model, config, prompt_tokens, windows):
  """What `RolloutBatch.to_device` gives `aepo_step`: sequences and rows as long as they may be."""
  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  tokens, count = config.sampling.max_tokens, config.prompts * config.group
  room = max(config.row_tokens)
  microbatches = row_capacity(config.minibatch, config.microbatch, room, prompt_tokens + tokens)
  of_row = count // config.minibatch, microbatches, config.microbatch, room
  rows = PackedRows(
    used=_split(array(jnp.int32, of_row[0])),
    **_split(dict(
      positions=array(jnp.int32, *of_row[:3], 3, of_row[3]), response_mask=array(bool, *of_row),
      sampler_logprob=array(jnp.float32, *of_row),
      **{name: array(jnp.int32, *of_row)
         for name in ("tokens", "segment", "unit", "sequence", "response_index")}),
             None, None, mesh.ROWS))
  of_token = count, tokens
  return RolloutBatch(rows=rows, **_split(dict(
    tokens=array(jnp.int32, *of_token), response_mask=array(bool, *of_token),
    entropy=array(jnp.float32, *of_token), correct=array(jnp.float32, count),
    format_ok=array(jnp.float32, count),
    vision=_vision(model, config.prompts, windows)), mesh.ROWS))
