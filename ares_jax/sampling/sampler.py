"""Samples responses: each prompt is read once, then slots decode its G responses.

P prompts, R prompts in one read, D devices of mesh.ROWS, G group, B = P*G rows (row b = p*G + g), T
response tokens, V vocabulary.
"""

import collections
import contextlib
import dataclasses
import functools
import zlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models import lora
from ares_jax.models.vision import VisionInput
from ares_jax.sampling import branching as branching_lib
from ares_jax.sampling import slots
from ares_jax.sampling.scheduler import History, Scheduler, plan_cache
from ares_jax.sampling.state import empty_state
from ares_jax.system import heartbeat, mesh, shares
from ares_jax.system.config import optional

# Response tokens that attention reads at least where it has no kernel; fewer are not worth a
# program of their own.
MIN_LIVE_TOKENS = 64
FETCH_SIZE = 64  # responses fetched in one transfer for `finished`


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn."""

  temperature: float  # >= 0; 0 takes the most probable token
  top_p: float  # in (0, 1]; 1 keeps the whole vocabulary
  top_k: int  # the most probable tokens, ties included, before top_p; 0 keeps the whole vocabulary
  min_tokens: int  # the end-of-turn token is not drawn before this one; 0, 1 = no limit
  max_tokens: int  # T, the end-of-turn token included

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature = {self.temperature} must be finite and >= 0 (0 is greedy)")
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
  """How many responses are decoded at once; 0 = follows from the sizes (scheduler.plan_cache)."""

  cache_gib: float  # GiB per device for keys and values, prompts and responses together
  slots: int = optional(0)  # rows over all devices that are decoded at once at most
  read: int = optional(0)  # prompts over all devices that are read in one call
  chunk: int = optional(0)  # tokens decoded per slot before the host looks for ended rows
  # Keys and values as int8, half of bfloat16's bytes: other answers, of a policy that is not quite
  # the trainer's (loss/sampler_gap).
  int8_pages: bool = optional(False, free=False, first_read_by="adacs", curation=True)

  def __post_init__(self):
    if min(self.slots, self.read, self.chunk) < 0:
      raise ValueError(f"slots = {self.slots}, read = {self.read} and chunk = {self.chunk} must be "
                       ">= 0 (0 = follows from the sizes)")
    if self.cache_gib <= 0:
      raise ValueError(f"cache_gib = {self.cache_gib} must be > 0")


@flax.struct.dataclass
class Samples:
  """B responses of at most T tokens; 0 outside them."""

  tokens: jax.Array  # int32 [B, T]
  mask: jax.Array  # bool [B, T]: True on response tokens, the end-of-turn token included
  # Of the policy: nats, whole vocabulary, at the sampling temperature (1 where greedy).
  logprob: jax.Array  # float32 [B, T]: log pi(token)
  entropy: jax.Array  # float32 [B, T], eq. 3
  parent: jax.Array  # int32 [B]: sample of the same prompt that it forked from; -1 = none
  fork: jax.Array  # int32 [B]: tokens it has in common with its parent

  def ends_with(self, end):
    """bool [B]: responses whose last token is one of `end`, for samples that are numpy arrays."""
    last_B = np.maximum(self.mask.sum(1), 1) - 1
    return np.isin(self.tokens[np.arange(len(last_B)), last_B], end)


def stage_key(seed, stage):
  """Typed PRNG key of a stage's samples; every stage has its own random numbers."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def sample(model, params, prompts, drawing, engine, *, finished=None, history=None,
           working=contextlib.nullcontext):
  """Draws a group of responses to every prompt.

  The random number of a token depends on (key, prompt id, sample, position) alone. Responses
  therefore do not depend on the rest of the batch, nor on how many slots, pages and devices there
  are.

  Args:
    model, engine: ModelConfig, EngineConfig.
    params: weights, as they are trained.
    prompts: PromptBatch of those of the P prompts that this process's devices answer, in their
      order, and the sizes of all P, which the devices of mesh.ROWS divide. They are copied to the
      devices when they are read.
    drawing: Drawing.
    finished: function of (row, int32 tokens), called with completed responses, in no order, while
      the devices decode others; devices wait for one call at most. It is not called with the
      responses that end last.
    history: History of earlier rollouts, to which this one is added; None knows of none.
    working: returns a context manager that is open while devices decode.

  Returns:
    Samples, B split over mesh.ROWS.

  Raises:
    ValueError: no mesh is current, or keys and values do not fit into engine.cache_gib.
    heartbeat.StopRequested: the run was asked to stop; checked between two chunks.
    Exceptions of `finished`.
  """
  prompts_P, prompt_tokens = len(prompts.sizes), prompts.tokens.shape[1]
  group, tokens, devices = drawing.group, drawing.sampling.max_tokens, mesh.size(*mesh.ROWS)
  history = history or History()
  sizes = plan_cache(model, engine, prompts=prompts_P, prompt_tokens=prompt_tokens, group=group,
                     tokens=tokens, history=history)
  params = rollout_weights(model, params)
  state = empty_state(model, sizes, drawing.branches)
  scheduler, to_fetch = Scheduler(sizes, prompts.sizes[:, 0], history), collections.deque()
  rows = prompts_P * group
  ended_B, length_B = np.zeros(rows, bool), np.zeros(rows, int)
  done_S = np.full(devices * sizes.slots, -1)
  while not ended_B.all():
    heartbeat.heartbeat(collective=True)
    while True:
      limit_D, prompt_DR = scheduler.next_chunk(ended_B, done_S, length_B)
      if prompt_DR is None:
        break
      state = slots.read_prompts(model, params, state, *_read_arrays(prompts, prompt_DR))
    with working():
      state, status = slots.decode(
        model, params, state, drawing, mesh.put(limit_D, mesh.ROWS), tokens=prompt_tokens,
        steps=sizes.chunk, live=_live_tokens(max(done_S.max(), 0) + sizes.chunk, tokens))
      while to_fetch and not status.ended.is_ready():
        row, index, (tokens_RT, length_R) = to_fetch.popleft()
        finished(row, np.asarray(tokens_RT)[index, : np.asarray(length_R)[index]])
      before_B, ended_B = ended_B, np.asarray(status.ended)
      length_B, done_S = np.asarray(status.length), np.asarray(status.done)
    if finished and not ended_B.all():
      to_fetch.extend(_responses(state.slots, np.flatnonzero(ended_B & ~before_B), drawing))
  history.add(sizes, length_B, np.asarray(status.redrawn).sum())
  return _samples(state.slots, group=group, branches=drawing.branches)


def _responses(state, rows, drawing):
  """(row, its index in the arrays, arrays on the devices) of rows that have ended."""
  found = []
  for start in range(0, len(rows), FETCH_SIZE):
    part = rows[start : start + FETCH_SIZE]
    arrays = slots.responses(state, np.resize(part, FETCH_SIZE), group=drawing.group,
                             branches=drawing.branches)
    found += [(row, index, arrays) for index, row in enumerate(part.tolist())]
  return found


@functools.partial(jax.jit, static_argnames=("group", "branches"))
def _samples(state, *, group, branches):
  mask = jnp.arange(state.tokens.shape[1]) < state.length[:, None]
  parent = jnp.tile(branching_lib.parents(group, branches), len(mask) // group)
  tokens, logprob, entropy = (branching_lib.join_forks(x, state.fork, group, branches)
                              for x in (state.tokens, state.logprob, state.entropy))
  samples = Samples(tokens, mask, logprob, entropy, jnp.where(state.fork > 0, parent, -1),
                    state.fork)
  return jax.tree.map(lambda x: mesh.shard(x, mesh.ROWS), samples)


def rollout_weights(model, params):
  """Weights to decode with: in the compute dtype, split over "model" only.

  Decoding one token per slot is too little work to gather weights over "data" for every token.
  """
  return jax.tree.map(
    lambda x, sharding: jax.device_put(x.astype(model.compute_dtype), sharding),
    params, rollout_shardings(model, params))


def rollout_shardings(model, params):
  """`NamedSharding` of every tensor of `rollout_weights`."""
  without_data = {"data": None, ("data", "model"): "model"}
  return jax.tree.map(lambda spec: mesh.sharding(*(without_data.get(axis, axis) for axis in spec)),
                      lora.joined_specs(model, params))


def _read_arrays(prompts, prompt_DR):
  """The prompts and prompt_R of `slots.read_prompts`, on the devices."""
  shards, total = shares.local_shards(), prompt_DR.size
  of_device = len(prompts.length) // len(shards)
  row = (np.arange(len(shards))[:, None] * of_device
         + np.minimum(prompt_DR[shards], of_device - 1)).ravel()
  arrays = {name: getattr(prompts, name)[row] for name in ("tokens", "length", "unit", "prompt_id")}
  arrays["vision"] = VisionInput(**prompts.vision(row))
  arrays = shares.put_rows(arrays, total, mesh.ROWS)
  arrays["positions"] = shares.put_rows(prompts.positions[:, row], total, None, mesh.ROWS)
  return arrays, mesh.put(prompt_DR.ravel(), mesh.ROWS)


def _live_tokens(tokens, limit):
  """`tokens` rounded up to MIN_LIVE_TOKENS doubled n times, or to `limit`: few programs compile."""
  live = MIN_LIVE_TOKENS
  while live < tokens:
    live *= 2
  return min(live, limit)
