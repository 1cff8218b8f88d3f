"""Sampling responses: every prompt is read once, then slots decode its G samples.

P prompts, C places for prompts that have been read, G group, B = P*G rows (row b = p*G + g), T new
tokens, V vocabulary.
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
from ares_jax.sampling import branching as branching_lib
from ares_jax.sampling import slots
from ares_jax.system import heartbeat, mesh

SHORTEST_LIVE = 512  # tokens: attention over fewer is not worth a program of its own
# Places, in units of the prompts whose G rows fill all slots. A place is taken until the longest of
# its rows ends: at skewed lengths 1 idles a third of the slots' steps, 3 as few as all prompts do.
PLACES = 3
# All devices read together: one reads before the others have room when this share of its slots has
# no row; until then reads wait for room on all, and are fewer.
STARVED = 0.25
HANDED = 64  # responses fetched in one transfer for whoever takes them while others are decoded


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn."""

  temperature: float  # >= 0; 0 takes the most probable token
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
  read: int  # prompts over all devices that are read in one call
  chunk: int  # tokens a slot between two looks of the host
  cache_gib: float  # GiB a device may hold of keys and values, prompts and responses together

  def __post_init__(self):
    if self.slots < 0:
      raise ValueError(f"slots = {self.slots} must be >= 0 (0 = as many as fit)")
    if self.read < 1 or self.chunk < 1:
      raise ValueError(f"read = {self.read} and chunk = {self.chunk} must be >= 1")
    if self.cache_gib <= 0:
      raise ValueError(f"cache_gib = {self.cache_gib} must be > 0")


@flax.struct.dataclass
class Samples:
  """B responses of at most T tokens; 0 outside them."""

  tokens: jax.Array  # int32 [B, T]
  mask: jax.Array  # bool [B, T]: True on response tokens, the end-of-turn token included
  logprob: jax.Array  # float32 [B, T]: log pi(token), temperature 1, whole vocabulary
  entropy: jax.Array  # float32 [B, T]: nats, whole vocabulary, at the sampling temperature (eq. 3)
  parent: jax.Array  # int32 [B]: sample of the same prompt that it forked from; -1 = from none
  fork: jax.Array  # int32 [B]: tokens it has in common with its parent


def stage_key(seed, stage):
  """Typed PRNG key of a stage's samples: no two stages draw the same numbers."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def sample(model, params, prompts, key, allowed_V, *, group, sampling, engine, end, branching=None,
           finished=None, working=contextlib.nullcontext):
  """Draws `group` responses to every prompt.

  The random number of a token depends on (key, prompt id, sample, position) alone: the same answers
  come out whatever else is in the batch, however many slots and devices there are.

  Args:
    model: ModelConfig.
    params: weights, as they are trained.
    prompts: dict of numpy arrays: tokens int32 [P, Tp], length int32 [P], positions int32
      [3, P, Tp], unit int32 [P, Tp], prompt_id int32 [P], vision VisionInput; P divides over
      mesh.ROWS. They go to the devices as they are read.
    key: typed PRNG key.
    allowed_V: bool, tokens that may be drawn. Statistics are of the policy, over all of V.
    group: G.
    sampling: SamplingConfig.
    engine: EngineConfig.
    end: tuple of end-of-turn token ids.
    branching: Branching, or None where every response starts at its prompt.
    finished: function of (row, int32 tokens) that takes responses as their slots become free, in no
      order, while the devices decode others: the devices wait for one call at most. Those that
      ended last are not among them.
    working: makes a context that is open while devices decode.

  Returns:
    Samples, B split over mesh.ROWS.

  Raises:
    ValueError: no mesh is current, or keys and values do not fit into engine.cache_gib.
    pulse.Stopped: the run was asked to stop; seen between two chunks.
    Whatever `finished` raises.
  """
  prompts_P, prompt_tokens = prompts["tokens"].shape
  rows, tokens, devices = prompts_P * group, sampling.max_tokens, mesh.size(*mesh.ROWS)
  sizes = plan_cache(model, engine, prompts=prompts_P, prompt_tokens=prompt_tokens, group=group,
                     tokens=tokens)
  params = rollout_weights(model, params)
  branches = branching.branches if branching else 0
  state = slots.idle_slots(model, rows=rows, slots=sizes.slots * devices, tokens=tokens,
                           group=group, branches=branches)
  read = slots.empty_prompts(model, prompts=prompts_P, places=sizes.places * devices,
                             tokens=prompt_tokens)
  places = PromptScheduler.free(devices, prompts_P // devices, sizes)
  ended_B, longest, queue = np.zeros(rows, bool), 0, collections.deque()
  while not ended_B.all():
    heartbeat.heartbeat(collective=True)
    while (next_read := places.next_read(_left(ended_B, group))) is not None:
      read = slots.read_prompts(model, params, read, *_arrays(prompts, *next_read))
    with working():
      state, now_B, longest = slots.decode(
        model, params, read, state, key, allowed_V, branching, group=group, sampling=sampling,
        end=end, steps=engine.chunk, live=_live(longest + engine.chunk, tokens))
      while queue and not now_B.is_ready():
        row, (tokens_RT, length_R), place = queue.popleft()
        finished(row, np.asarray(tokens_RT)[place, : np.asarray(length_R)[place]])
      before_B, ended_B, longest = ended_B, np.asarray(now_B), np.asarray(longest).max()
    if finished and not ended_B.all():
      queue.extend(_responses(state, np.flatnonzero(ended_B & ~before_B), group, branches))
  return _samples(state, group=group, branches=branches)


def _left(ended_B, group):
  """Rows of each prompt that have not ended."""
  return group - ended_B.reshape(-1, group).sum(1)


def _responses(state, rows, group, branches):
  """(row, arrays that hold it, its place in them) of rows that ended; to be fetched when needed."""
  found = []
  for start in range(0, len(rows), HANDED):
    part = rows[start : start + HANDED]
    arrays = slots.responses(state, np.resize(part, HANDED), group=group, branches=branches)
    found += [(row, arrays, place) for place, row in enumerate(part.tolist())]
  return found


@functools.partial(jax.jit, static_argnames=("group", "branches"))
def _samples(state, *, group, branches):
  mask = jnp.arange(state.tokens.shape[1]) < state.length[:, None]
  parent = jnp.tile(branching_lib.parents(group, branches), len(mask) // group)
  tokens, logprob, entropy = (branching_lib.join_forks(x, state.fork, group, branches)
                              for x in (state.tokens, state.logprob, state.entropy))
  return Samples(tokens, mask, logprob, entropy, jnp.where(state.fork > 0, parent, -1), state.fork)


def rollout_weights(model, params):
  """Weights to decode with: in the compute dtype, split over "model" only.

  A token of each slot is too little work to fetch weights for from other devices of "data".
  """
  return jax.tree.map(
    lambda x, sharding: jax.device_put(x.astype(model.compute_dtype), sharding),
    params, rollout_shardings(model, params))


def rollout_shardings(model, params):
  """`NamedSharding` of every tensor of `rollout_weights`."""
  whole = {"data": None, ("data", "model"): "model"}
  return jax.tree.map(lambda spec: mesh.sharding(*(whole.get(axis, axis) for axis in spec)),
                      lora.joined_specs(model, params))


@dataclasses.dataclass(frozen=True)
class CachePlan:
  """What a device holds."""

  slots: int
  places: int  # C, prompts that have been read
  read: int  # prompts a call


def plan_cache(model, engine, *, prompts, prompt_tokens, group, tokens):
  """Plan of each device, such that its keys and values fit into engine.cache_gib.

  Those of the prompts in places, of the prompts of one read on their way there, and of the
  responses in slots.

  Args:
    model: ModelConfig.
    engine: EngineConfig.
    prompts: P, over all devices.
    prompt_tokens: Tp, padding included.
    group: G.
    tokens: T.

  Raises:
    ValueError: they do not fit; names the largest engine.slots that does.
  """
  devices = mesh.size(*mesh.ROWS)
  split = mesh.size("model") if model.kv_heads % mesh.size("model") == 0 else 1
  width = jnp.dtype(model.compute_dtype).itemsize
  token = 2 * model.layers * model.kv_heads * model.head_dim * width / split
  prompts //= devices
  read = min(prompts, -(-engine.read // devices))

  def places(count):
    return min(prompts, PLACES * -(-count // group) + read)

  def gib(count):
    return ((places(count) + read) * prompt_tokens + count * tokens) * token / 2**30

  most = prompts * group
  fits = next((count for count in range(most, 0, -1) if gib(count) <= engine.cache_gib), 0)
  wanted = min(most, -(-engine.slots // devices)) if engine.slots else max(1, fits)
  if wanted > fits:
    remedy = (f"set engine.slots to {fits * devices} or less, or raise engine.cache_gib" if fits
              else "raise engine.cache_gib, or lower the tokens of a prompt, max_tokens or "
                   f"engine.read = {engine.read}")
    raise ValueError(
      f"keys and values of {places(wanted)} + {read} prompts x {prompt_tokens} tokens and {wanted} "
      f"slots x {tokens} tokens a device need {gib(wanted):.3g} GiB, more than engine.cache_gib = "
      f"{engine.cache_gib}; {remedy}")
  return CachePlan(wanted, places(wanted), read)


@dataclasses.dataclass
class PromptScheduler:
  """The host's account of which prompt is in which place of which device."""

  held: np.ndarray  # int [devices, C]: number of the prompt among those of its device; -1 = none
  begun: np.ndarray  # int [devices]: prompts of each that were read, in their order
  prompts: int  # of a device
  read: int  # of a device, a call
  slots: int  # of a device

  @classmethod
  def free(cls, devices, prompts, sizes):
    return cls(np.full((devices, sizes.places), -1), np.zeros(devices, int), prompts, sizes.read,
               sizes.slots)

  def next_read(self, left_P):
    """Gives free places to prompts as soon as a whole read of them, or the rest, has room.

    On all devices, or on one whose slots are short of rows.

    Args:
      left_P: int, rows of each prompt that have not ended.

    Returns:
      prompt, place: int32 [devices, R]; as many as a device has of both where it reads fewer. None
      while the places are taken, or everything was read.
    """
    left_DP = left_P.reshape(len(self.held), -1)
    left_DC = np.where(self.held < 0, 0, np.take_along_axis(left_DP, np.maximum(self.held, 0), 1))
    taken_DC = left_DC > 0
    full_D = np.minimum(self.read, self.prompts - self.begun)
    free_D = (~taken_DC).sum(1)
    ready_D = (full_D > 0) & (free_D >= full_D)
    starved_D = left_DC.sum(1) < (1 - STARVED) * self.slots
    if not full_D.any() or not (ready_D | (full_D == 0)).all() and not (ready_D & starved_D).any():
      return None
    prompt = np.full((len(self.held), self.read), self.prompts, np.int32)
    place = np.full_like(prompt, self.held.shape[1])
    for device, count in enumerate(np.minimum(full_D, free_D)):
      prompt[device, :count] = self.begun[device] + np.arange(count)
      place[device, :count] = np.flatnonzero(~taken_DC[device])[:count]
      self.held[device, place[device, :count]] = prompt[device, :count]
    self.begun += np.minimum(full_D, free_D)
    return prompt, place


def _arrays(prompts, prompt, place):
  """Arguments of `slots.read` on the devices: their next prompts, and where they go."""
  devices, most = len(prompt), len(prompts["length"]) // len(prompt)
  row = (np.arange(devices)[:, None] * most + np.minimum(prompt, most - 1)).ravel()
  positions = mesh.put(prompts["positions"][:, row], None, mesh.ROWS)
  arrays = {name: jax.tree.map(lambda x: x[row], array) for name, array in prompts.items()
            if name != "positions"}
  return mesh.put(arrays, mesh.ROWS) | {"positions": positions}, *mesh.put(
    (prompt.ravel(), place.ravel()), mesh.ROWS)


def _live(tokens, most):
  """`tokens`, rounded up so that few programs are compiled: to SHORTEST_LIVE doubled, or `most`."""
  live = SHORTEST_LIVE
  while live < tokens:
    live *= 2
  return min(live, most)
