"""Sampling responses: every prompt is read once, then slots decode its G samples.

P prompts, G group, B = P*G rows (row b = p*G + g), T new tokens, V vocabulary.
"""

import dataclasses
import zlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax import mesh, pulse, slots
from ares_jax.models import weights

SHORTEST_LIVE = 512  # tokens: attention over fewer is not worth a program of its own


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn."""

  temperature: float  # > 0; 0 takes the most probable token
  top_p: float  # in (0, 1]; 1 keeps the whole vocabulary
  top_k: int  # the most probable tokens, ties included, before top_p; 0 keeps the whole vocabulary
  min_tokens: int  # the end-of-turn token comes at this one or later; 0 and 1: anywhere
  max_tokens: int  # T, the end-of-turn token included

  def __post_init__(self):
    if self.temperature < 0:
      raise ValueError(f"temperature = {self.temperature} must be >= 0 (0 is greedy)")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p = {self.top_p} is outside (0, 1]")
    if self.top_k < 0:
      raise ValueError(f"top_k = {self.top_k} must be >= 0 (0 keeps the whole vocabulary)")
    if self.max_tokens < 1:
      raise ValueError(f"max_tokens = {self.max_tokens} must be >= 1")
    if not 0 <= self.min_tokens <= self.max_tokens:
      raise ValueError(f"min_tokens = {self.min_tokens} is outside 0..max_tokens = "
                       f"{self.max_tokens}")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How many responses are decoded at once."""

  slots: int  # over all devices; 0 = one a row, or as many as cache_gib holds
  chunk: int  # tokens a slot between two looks of the host
  cache_gib: float  # GiB a device may hold of keys and values, prompts and responses together

  def __post_init__(self):
    if self.slots < 0:
      raise ValueError(f"slots = {self.slots} must be >= 0 (0 = as many as fit)")
    if self.chunk < 1:
      raise ValueError(f"chunk = {self.chunk} must be >= 1")
    if self.cache_gib <= 0:
      raise ValueError(f"cache_gib = {self.cache_gib} must be > 0")


@flax.struct.dataclass
class Samples:
  """B responses of at most T tokens; 0 outside them."""

  tokens: jax.Array  # int32 [B, T]
  mask: jax.Array  # bool [B, T]: True on response tokens, the end-of-turn token included
  logprob: jax.Array  # float32 [B, T]: log pi(token), temperature 1, whole vocabulary
  drawn_logprob: jax.Array  # float32 [B, T]: log-prob. of the distribution it was drawn from
  entropy: jax.Array  # float32 [B, T]: nats, whole vocabulary, at the sampling temperature (eq. 3)


def stage_key(seed, stage):
  """Typed PRNG key of a stage's samples: no two stages draw the same numbers."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def sample(model, params, prompts, key, allowed_V, *, group, sampling, engine, end):
  """Draws `group` responses to every prompt.

  The random number of a token depends on (key, prompt id, sample, position) alone: the same answers
  come out whatever else is in the batch, however many slots and devices there are.

  Args:
    model: ModelConfig.
    params: weights, as they are trained.
    prompts: dict with tokens int32 [P, Tp], length int32 [P], positions int32 [3, P, Tp],
      unit int32 [P, Tp], prompt_id int32 [P], vision VisionInput; P divides over "data".
    key: typed PRNG key.
    allowed_V: bool, tokens that may be drawn. Statistics are of the policy, over all of V.
    group: G.
    sampling: SamplingConfig.
    engine: EngineConfig.
    end: tuple of end-of-turn token ids.

  Returns:
    Samples, B split over "data".

  Raises:
    ValueError: no mesh is current, or keys and values do not fit into engine.cache_gib.
    pulse.Stopped: the run was asked to stop; seen between two chunks.
  """
  prompts_P, prompt_tokens = prompts["tokens"].shape
  rows, tokens = prompts_P * group, sampling.max_tokens
  count = plan(model, engine, prompts=prompts_P, prompt_tokens=prompt_tokens, group=group,
               tokens=tokens)
  params = rollout_weights(model, params)
  state = slots.idle(model, rows=rows, slots=count, tokens=tokens)
  read = slots.read(model, params, prompts)
  longest = 0
  while True:
    pulse.beat()
    state, status = slots.decode(
      model, params, read, state, key, allowed_V, group=group, sampling=sampling, end=end,
      steps=engine.chunk, live=_live(longest + engine.chunk, tokens))
    waiting, longest = np.asarray(status).max(0)
    if not waiting:
      break
  mask = jnp.arange(tokens) < state.length[:, None]
  return Samples(state.tokens, mask, state.logprob, state.drawn_logprob, state.entropy)


def rollout_weights(model, params):
  """Weights to decode with: in the compute dtype, split over "model" only.

  A token of each slot is too little work to fetch weights for from other devices of "data".
  """
  return jax.tree.map(
    lambda x, sharding: jax.device_put(x.astype(model.compute_dtype), sharding),
    params, rollout_shardings(model))


def rollout_shardings(model):
  """`NamedSharding` of every tensor of `rollout_weights`."""
  return jax.tree.map(
    lambda spec: mesh.sharding(*(None if axis == "data" else axis for axis in spec)),
    weights.specs(model))


def plan(model, engine, *, prompts, prompt_tokens, group, tokens):
  """Slots over all devices, such that keys and values fit into engine.cache_gib on each.

  Args:
    model: ModelConfig.
    engine: EngineConfig.
    prompts: P.
    prompt_tokens: Tp, padding included.
    group: G.
    tokens: T.

  Raises:
    ValueError: they do not fit, or do not divide over the devices; names the largest that fits.
  """
  devices = mesh.size("data")
  split = mesh.size("model") if model.kv_heads % mesh.size("model") == 0 else 1
  width = jnp.dtype(model.compute_dtype).itemsize
  token = 2 * model.layers * model.kv_heads * model.head_dim * width / split
  most = prompts * group // devices
  room = engine.cache_gib * 2**30 - prompts // devices * prompt_tokens * token
  fits = int(room // (tokens * token))
  wanted = min(most, -(-engine.slots // devices)) if engine.slots else min(most, max(1, fits))
  if wanted > fits:
    remedy = (f"set engine.slots to {fits * devices} or less, or raise engine.cache_gib" if fits > 0
              else "raise engine.cache_gib, or lower the prompts of a batch or max_tokens")
    raise ValueError(
      f"keys and values of {prompts // devices} prompts x {prompt_tokens} tokens and {wanted} "
      f"slots x {tokens} tokens a device need more than engine.cache_gib = {engine.cache_gib}; "
      f"{remedy}")
  return wanted * devices


def _live(tokens, most):
  """`tokens`, rounded up so that few programs are compiled: to SHORTEST_LIVE doubled, or `most`."""
  live = SHORTEST_LIVE
  while live < tokens:
    live *= 2
  return min(live, most)
