"""The programs that a run compiles, traced on shapes alone, without weights or data.

P prompts, G group, V vocabulary.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models import flops, lora, paged, weights
from ares_jax.sampling import sampler, scheduler, slots
from ares_jax.sampling.branching import Branching
from ares_jax.sampling.state import Drawing, abstract_state
from ares_jax.system import mesh
from ares_jax.training import aepo_step, sft_step
from ares_jax.training.batch import RolloutBatch


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of an iteration."""

  name: str
  calls: int  # per iteration
  trace: Callable  # () -> jax.stages.Traced, on the current mesh
  beside: float  # bytes of a device for arrays that the run holds and the program does not get
  # FLOPs of all devices and bytes of one that kernels of paged attention take: their lengths, which
  # only a run knows, say how much they read.
  paged: tuple[float, float] = (0.0, 0.0)
  rare_loops: bool = False  # whether loops of unknown length hardly ever run
  # Times that the pages are filled in a rollout whose prompts and answers are all the longest; 1
  # also where engine.slots has fewer rows than they hold.
  rounds: int = 1


class Policy(typing.NamedTuple):
  """A policy in shapes."""

  params: dict  # trained parameters: weights, or adapters
  base: lora.Base | None  # under the adapters
  weights: dict  # all weights, adapters attached


def aepo_programs(config, model, end=(0,)):
  """Programs of an iteration of a TrainConfig on the current mesh, in the order they run.

  All shapes are the largest of the config: prompts of the last `prompt.max_tokens` and `windows`,
  answers of `max_tokens`. Online filtering may sample several batches in an iteration; one counts.
  `end` are token ids that end an answer; they hardly change the cost. Raises ValueError if sizes do
  not divide over the mesh, or keys and values do not fit engine.cache_gib.
  """
  settings = config.aepo
  check_divides(settings, "prompts", "microbatch")
  policy = abstract_policy(config.model.lora, model)
  state = aepo_step.abstract_state(settings, policy.params, policy.base)
  rollout = _Rollout(config, model, policy, end)

  def update():
    batch = RolloutBatch.abstract(model, settings, config.prompt.max_tokens[-1],
                                  config.prompt.windows[-1],
                                  scores=not config.reward.is_default)
    return aepo_step.aepo_step.trace(model, settings, state, policy.params, batch,
                                     mesh.abstract(bool, (model.vocab,)), policy.base)

  held = device_bytes((state, policy.params, policy.base))
  return (*rollout.programs(held), Program("aepo_step", 1, update, 0.0))


def check_divides(settings, *names):
  """Raises ValueError if sizes of an AepoConfig do not divide over the devices of mesh.ROWS."""
  devices = mesh.size(*mesh.ROWS)
  for name in names:
    if getattr(settings, name) % devices:
      raise ValueError(f"config.aepo.{name} = {getattr(settings, name)} does not divide over "
                       f"{devices} devices of the \"slice\" and \"data\" axes; change it or "
                       "config.mesh")


class _Rollout:
  """The programs of an iteration's rollout, and what they get, in shapes."""

  def __init__(self, config, model, policy, end):
    self.config, self.model, self.policy, self.end = config, model, policy, end
    settings, self.devices = config.aepo, mesh.size(*mesh.ROWS)
    self.prompts, self.rows = settings.prompts, settings.prompts * settings.group
    self.tokens, self.prompt_tokens = settings.sampling.max_tokens, config.prompt.max_tokens[-1]
    try:
      self.sizes = scheduler.plan_cache(model, config.engine, prompts=self.prompts,
                                        tokens=self.tokens, prompt_tokens=self.prompt_tokens,
                                        group=settings.group)
    except ValueError as error:
      raise ValueError(f"config.aepo.prompts = {self.prompts}: {error}") from error
    self.shardings = sampler.rollout_shardings(model, policy.weights)
    self.weights = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, model.compute_dtype, sharding=sharding),
      policy.weights, self.shardings)
    # With a single device of "data", rollouts read the base's own weights.
    self.shares_base = policy.base is not None and mesh.size("data") == 1
    self.state = abstract_state(model, self.sizes, settings.branches)

  def programs(self, held):
    """The Programs of a rollout beside which the run holds `held` bytes of a device."""
    policy, sizes = self.policy, self.sizes
    resharded = policy.params if self.shares_base else policy.weights
    in_rollouts = held - (device_bytes(policy.base) if self.shares_base else 0.0)
    reads = -(-self.prompts // (sizes.read * self.devices))
    # Of the longest prompts and answers, whose pages are all taken at the end.
    at_once = sizes.slots_of(self.prompt_tokens, self.tokens)
    rounds = -(-self.rows // (at_once * self.devices))
    by_pages = rounds if at_once < sizes.slots else 1
    return (
      Program("reshard", 1, self._reshard, held - device_bytes(resharded)),
      Program("prefill", reads, self._prefill, in_rollouts),
      # decode does not get the vision tower, which rollouts still hold.
      Program("decode", rounds * -(-self.tokens // sizes.chunk), self._decode,
              in_rollouts + device_bytes(self.weights.get("vision", {})), self._paged(), True,
              by_pages))

  def _paged(self):
    """`Program.paged` of a chunk: every step reads all pages of the pool once."""
    steps, model = self.sizes.chunk, self.model
    if not paged.has_kernel("tpu", model.head_dim, self.state.pool.pages.k.dtype,
                            self.sizes.page_tokens):
      return 0.0, 0.0
    tokens = self.sizes.pages * self.sizes.page_tokens
    flops_of_device = 4 * model.layers * model.heads * model.head_dim * tokens
    return (float(steps * flops_of_device * self.devices),
            steps * device_bytes(self.state.pool.pages))

  def _reshard(self):
    cast = functools.partial(jax.tree.map, lambda x: x.astype(self.model.compute_dtype))
    if self.shares_base:
      return jax.jit(cast).trace(self.policy.params)
    return jax.jit(cast, out_shardings=self.shardings).trace(self.policy.weights)

  def _prefill(self):
    count = self.sizes.read * self.devices
    number = mesh.abstract(jnp.int32, (count,), mesh.ROWS)
    prompts = slots.abstract_prompts(self.model, count, self.prompt_tokens,
                                     self.config.prompt.windows[-1])
    return slots.read_prompts.trace(self.model, self.weights, self.state, prompts, number)

  def _decode(self):
    settings, key = self.config.aepo, jax.eval_shape(lambda: jax.random.key(0))
    branching = Branching(mesh.abstract(jnp.float32, ()), settings.branches,
                          settings.entropy.window) if settings.branches else None
    drawing = Drawing(
      mesh.abstract(key.dtype, key.shape), mesh.abstract(bool, (self.model.vocab,)), branching,
      settings.group, settings.sampling, self.end)
    return slots.decode.trace(
      self.model, self.weights, self.state, drawing,
      mesh.abstract(jnp.int32, (self.devices,), mesh.ROWS), tokens=self.prompt_tokens,
      steps=self.sizes.chunk, live=self.tokens)


def sft_program(config, model, stage):
  """The Program of a step of `stage`, "warmup" or "adacs", with every example in its own row."""
  settings = getattr(config, stage)

  def trace():
    params, base, _ = abstract_policy(config.model.lora, model)
    return sft_step.sft_step.trace(
      model, settings, sft_step.abstract_state(settings, params, base),
      sft_step.abstract_batch(model, settings), base)

  return Program(stage, 1, trace, 0.0)


def abstract_policy(section, model):
  """Policy of a LoraConfig and a ModelConfig on the current mesh."""
  devices = jax.sharding.get_mesh()
  table = weights.weight_table(model)
  if not section.rank:
    params = weights.abstract(table, devices, jnp.float32)
    return Policy(params, None, params)
  base = lora.Base(weights.abstract(table, devices, jnp.dtype(model.compute_dtype)),
                   section.alpha / section.rank)
  params = lora.abstract(model, section, devices)
  return Policy(params, base, lora.attach(base.weights, params))


def device_bytes(tree):
  """Bytes of a tree of shapes that one device holds."""
  return float(sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def needed_flops(config, model):
  """{program: FLOPs that the mathematics of an iteration needs} (models/flops.py).

  Every prompt, image and answer counts as the longest that the config allows.
  """
  settings, size = config.aepo, model.images
  patches = config.prompt.windows[-1] * size.window_patches
  sizes = dict(
    prompts=np.full(settings.prompts, config.prompt.max_tokens[-1]),
    answers=np.full(settings.prompts * settings.group, settings.sampling.max_tokens),
    image=settings.prompts * flops.tower_flops(size, patches, patches**2))
  return {"reshard": 0.0, **flops.rollout_flops(model, shared=0, **sizes),
          "aepo_step": flops.update_flops(settings, model, adapters=bool(config.model.lora.rank),
                                          **sizes)}
