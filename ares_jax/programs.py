"""The programs of one AEPO iteration on shapes alone: what a run compiles, without weights or data.

P prompts, G group, B = P*G rows, Tp prompt tokens, T row tokens, V vocabulary.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ares_jax import aepo, mesh, optimizer, sampler, slots
from ares_jax.models import hf_config, weights
from ares_jax.models.published import BY_NAME
from ares_jax.models.vision import VisionInput
from ares_jax.rollout import RolloutBatch
from ares_jax.shaping import Controllers


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of an iteration."""

  name: str
  calls: int  # an iteration
  trace: Callable  # () -> jax.stages.Traced, on the current mesh
  beside: float  # bytes a device that the run holds meanwhile and the program does not get


def sizes(section):
  """ModelConfig that a config's model section names, from its folder's config.json or by its name.

  Args:
    section: setup.ModelSection whose path is a Hugging Face folder, or ends in the name of a
      published model: its sizes are known, no file is read.

  Raises:
    ValueError: neither.
  """
  how = dict(compute_dtype=section.compute_dtype, remat=section.remat, unroll=section.unroll)
  if os.path.isdir(section.path):
    return hf_config.model_config(section.path, **how)
  name = os.path.basename(section.path)
  if name not in BY_NAME:
    raise ValueError(f"model.path = {section.path!r} is no folder and ends in no name whose sizes "
                     f"are known: {', '.join(BY_NAME)}")
  return dataclasses.replace(BY_NAME[name], **how)


def programs(config, model):
  """Programs of an iteration of a TrainConfig on the current mesh, in the order they run.

  All shapes are the largest of the config: prompts of the last `prompt.max_tokens` and `windows`,
  answers of `max_tokens`. With online filtering an iteration may sample several batches; here one.

  Raises:
    ValueError: sizes do not divide over the mesh, or keys and values do not fit engine.cache_gib.
  """
  settings, devices = config.aepo, mesh.size("data")
  for key, count in (("prompts", settings.prompts),
                     ("microbatch / aepo.group", settings.microbatch // settings.group)):
    if count % devices:
      raise ValueError(f"config.aepo.{key} = {count} does not divide over {devices} devices of the "
                       "\"data\" axis; change it or config.mesh")
  prompt_tokens, windows = config.prompt.max_tokens[-1], config.prompt.windows[-1]
  prompts, tokens, rows = settings.prompts, settings.sampling.max_tokens, \
    settings.prompts * settings.group
  try:
    count = sampler.plan(model, config.engine, prompts=prompts, prompt_tokens=prompt_tokens,
                         group=settings.group, tokens=tokens)
  except ValueError as error:
    raise ValueError(f"config.aepo.prompts = {prompts}: {error}") from error

  params = weights.abstract(model, _devices(), jnp.float32)
  lowered = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, model.compute_dtype, sharding=sharding),
    params, sampler.rollout_shardings(model))
  vocabulary = _split(jax.ShapeDtypeStruct((model.vocab,), bool))
  asked = _prompts(model, prompts, prompt_tokens, windows)
  read = _laid_out(model, jax.eval_shape(functools.partial(slots.read, model), lowered, asked))
  state = _laid_out(model, jax.eval_shape(functools.partial(
    slots.idle, model, rows=rows, slots=count, tokens=tokens)))
  trained = _state(settings, params)
  held = device_bytes((trained, params))

  def reshard():
    return jax.jit(functools.partial(jax.tree.map, lambda x: x.astype(model.compute_dtype)),
                   out_shardings=sampler.rollout_shardings(model)).trace(params)

  def decode():
    return slots.decode.trace(
      model, lowered, read, state, _split(jax.eval_shape(lambda: jax.random.key(0))), vocabulary,
      group=settings.group, sampling=settings.sampling, end=(0,), steps=config.engine.chunk,
      live=tokens)

  def update():
    batch = _rollout(model, rows, prompts, prompt_tokens + tokens, windows)
    return aepo.aepo_step.trace(model, settings, trained, params, batch, vocabulary)

  chunks = -(-rows // count) * -(-tokens // config.engine.chunk)
  return (
    Program("reshard", 1, reshard, held - device_bytes(params)),
    Program("prefill", 1, lambda: slots.read.trace(model, lowered, asked), held),
    Program("decode", chunks, decode, held),
    Program("aepo_step", 1, update, 0.0))


def device_bytes(tree):
  """Bytes of a tree of shapes that one device holds."""
  return float(sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def model_flops(config, model):
  """FLOPs that an iteration's mathematics needs, by program: no recomputation, no masked scores.

  2 a weight and token forward, 4 more for the gradients of what is trained; scores of causal
  attention over half the square. Rows are as long as the config allows.
  """
  settings = config.aepo
  prompt, answer = config.prompt.max_tokens[-1], settings.sampling.max_tokens
  rows, row = settings.prompts * settings.group, prompt + answer
  heads = 4 * model.layers * model.heads * model.head_dim  # a query and a key, both products
  block = model.embed * model.head_dim * 2 * (model.heads + model.kv_heads) \
    + 3 * model.embed * model.mlp
  token, head = 2 * model.layers * block, 2 * model.vocab * model.embed
  image = settings.prompts * _vision_flops(model.vision, config.prompt.windows[-1])
  sequence = rows * (row * (token + head) + heads * row**2 / 2)
  passes = 2 + (settings.loss.old_logprob == "recompute")  # policy, reference, old
  backward = 2 * sequence + (0 if "vision" in settings.frozen else 2 * image)
  return {
    "reshard": 0.0,
    "prefill": settings.prompts * (prompt * token + heads * prompt**2 / 2) + image,
    "decode": rows * (answer * (token + head) + heads * (prompt * answer + answer**2 / 2)),
    "aepo_step": passes * (sequence + image) + backward}


def _vision_flops(vision, windows):
  """Of one prompt's images, forward."""
  patches = windows * vision.window_patches
  block = 4 * vision.hidden**2 + 3 * vision.hidden * vision.mlp
  full = len(vision.full_attention)
  keys = full * patches + (vision.depth - full) * vision.window_patches
  merged = vision.unit * vision.hidden
  return (2 * patches * (vision.depth * block + vision.patch_dim * vision.hidden)
          + 4 * patches * keys * vision.hidden
          + 2 * patches // vision.unit * (merged**2 + merged * vision.out))


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
  """What `Generator.sample` puts on the devices."""
  ints, one = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((prompts, tokens), (prompts,)))
  positions = jax.ShapeDtypeStruct((3, prompts, tokens), jnp.int32)
  return _split(dict(tokens=ints, length=one, unit=ints, prompt_id=one,
                     vision=_vision(model, prompts, windows)), "data") | {
    "positions": _split(positions, None, "data")}


def _laid_out(model, shapes):
  """`slots.Prompts` or `slots.Slots` as they lie on the mesh."""
  cache = shapes.cache.replace(
    length=_split(shapes.cache.length, "data"),
    **{name: _split(getattr(shapes.cache, name), None, "data", None, slots.kv_axis(model))
       for name in ("k", "v")})
  fields = {field.name: _split(getattr(shapes, field.name), "data")
            for field in dataclasses.fields(shapes) if field.name != "cache"}
  return type(shapes)(cache=cache, **fields)


def _state(config, params):
  """`aepo.init_state` in shapes."""
  tx = optimizer.of(config.optimizer, params, frozen=config.frozen)
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
  return aepo.AepoState(step=count, batches=count, params=params, opt_state=moments,
                        controllers=_split(controllers))


def _rollout(model, rows, prompts, tokens, windows):
  """What `Rollout.to_device` gives `aepo_step`."""
  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  of_row, of_token = (rows,), (rows, tokens)
  return RolloutBatch(
    positions=_split(array(jnp.int32, 3, *of_token), None, "data"),
    **_split(dict(
      tokens=array(jnp.int32, *of_token), mask=array(bool, *of_token),
      response_mask=array(bool, *of_token), unit=array(jnp.int32, *of_token),
      vision=_vision(model, prompts, windows), sampler_logprob=array(jnp.float32, *of_token),
      entropy=array(jnp.float32, *of_token), correct=array(jnp.float32, *of_row),
      formatted=array(jnp.float32, *of_row)), "data"))
