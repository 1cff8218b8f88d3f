"""Simulates the sampler's scheduler for a distribution of lengths: steps, bytes and the floor.

Each device decodes its own prompts' rows as `sampling/` does: the same Scheduler, the same rule for
pages, the youngest rows put back where none is free. Only tokens are not drawn. Counted for one
device, at published peaks: weights read once a step, the keys and values that the kernel reads, and
the FLOPs of every token.

P prompts, B rows, S slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models import flops
from ares_jax.plan import programs
from ares_jax.sampling import sampler
from ares_jax.sampling import scheduler as scheduler_lib
from ares_jax.sampling.pages import count
from ares_jax.system import chips, mesh


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Work of one device, in steps and tokens."""

  steps: int
  tokens: int  # decoded, those drawn again included
  redrawn: int  # decoded for rows that were put back
  read: int  # cached tokens that rows read: each its own prompt and response
  read_once: int  # the same if each prompt were read once a step for all its rows
  most_busy: int  # rows decoded at once


def lengths(words, rows, most, seed=0):
  """int [rows]: lengths "lognormal:MEDIAN", "equal" or "FILE", which has a length a line.

  MEDIAN is a share of `most`, which is the 99th percentile and where longer ones are cut.

  Raises:
    ValueError: the words are none of these.
  """
  kind, _, median = words.partition(":")
  random = np.random.default_rng(seed)
  if kind == "equal":
    return np.full(rows, most)
  if kind != "lognormal":
    with open(words) as lines:
      return np.clip(random.choice([int(line) for line in lines if line.strip()], rows), 1, most)
  try:
    share = float(median)
  except ValueError:
    share = 0.0
  if not 0 < share < 1:
    raise ValueError(f"--lengths={words}: the median is a share of max_tokens, 0 < median < 1")
  deviation = np.log(1 / share) / 2.3263
  drawn = share * np.exp(deviation * random.normal(size=rows)) * most
  return np.clip(np.ceil(drawn), 1, most).astype(int)


def rollout_table(config, model, topology, words):
  """Markdown about a rollout of a TrainConfig on a slice whose answers have lengths of `words`.

  Prompts are as skewed, up to the longest of the config. All devices are like the first; so is the
  second rollout, which knows the lengths of the one before. The ideal decodes all answers at once,
  has no pages, and reads each prompt once a step for all its rows.
  """
  settings, (chip, devices) = config.aepo, chips.describe_slice(topology)
  with jax.set_mesh(mesh.make_mesh(config.mesh.data, config.mesh.model, devices,
                                   slices=config.mesh.slice)):
    programs.check_divides(settings, "prompts")
    rows = settings.prompts // mesh.size(*mesh.ROWS) * settings.group
    token_bytes = scheduler_lib.token_bytes(model, int8=config.engine.int8_pages)
    policy = programs.abstract_policy(config.model.lora, model)
    weights = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.compute_dtype),
                                               sharding=sharding),
      policy.weights, sampler.rollout_shardings(model, policy.weights))
    # Each step reads the blocks and the unembedding, a few rows of other embeddings.
    weight_bytes = programs.device_bytes({
      name: part for name, part in weights.items()
      if name != "vision" and (name != "embed" or model.tied)})
    length_B = lengths(words, rows, settings.sampling.max_tokens)
    prompt_P = lengths("lognormal:0.15" if words == "equal" else words, rows // settings.group,
                       config.prompt.max_tokens[-1], seed=1)
    history = scheduler_lib.History()
    for _ in range(2):
      sizes = scheduler_lib.plan_cache(
        model, config.engine, prompts=settings.prompts, group=settings.group, history=history,
        prompt_tokens=config.prompt.max_tokens[-1], tokens=settings.sampling.max_tokens)
      found = simulate(sizes, prompt_P, length_B, history=history)
    parts = mesh.size("model")
  longest_PG = length_B.reshape(-1, settings.group)
  ideal_read = (length_B.astype(float)**2).sum() / 2 + (prompt_P * longest_PG.max(1)).sum()
  work = flops.rollout_flops(model, prompts=np.repeat(prompt_P, settings.group), answers=length_B,
                             shared=0, image=0)["decode"] / parts

  def line(name, steps, tokens, read):
    seconds = {"memory": (steps * weight_bytes + read * token_bytes) / chip.memory_rate,
               "compute": work * tokens / length_B.sum() / chip.flops}
    limit = max(seconds, key=seconds.get)
    return (f"| {name} | {steps} | {steps * weight_bytes / 1e9:.0f} | "
            f"{read * token_bytes / 1e9:.0f} | {seconds[limit]:.1f} ({limit}) |")

  return "\n".join([
    f"A rollout on {topology}, answers {words}: {len(prompt_P)} prompts of {prompt_P.mean():.0f} "
    f"tokens x {settings.group} answers of {length_B.mean():.0f} a device of \"data\"; "
    f"{sizes.pages} pages of {sizes.page_tokens} tokens, at most {found.most_busy} rows at once, "
    f"{found.redrawn / found.tokens:.1%} of the tokens drawn again. GB of a chip:", "",
    "| | steps | weights, GB | keys and values, GB | floor of decoding, s |", "| --- " * 5 + "|",
    line("pages", found.steps, found.tokens, found.read),
    line("the same, each prompt read once for its rows", found.steps, found.tokens,
         found.read_once),
    line("ideal", int(length_B.max()), length_B.sum(), ideal_read)])


def simulate(sizes, prompt_P, length_B, *, history):
  """Rollout of one device with a CachePlan, tokens of its prompts, lengths of their responses."""
  scheduler = scheduler_lib.Scheduler(sizes, prompt_P, history)
  slots = _Slots(sizes, np.asarray(prompt_P), np.asarray(length_B))
  while not slots.ended_B.all():
    while True:
      limit_D, read = scheduler.next_chunk(
        slots.ended_B, np.where(slots.row_S < 0, -1, slots.done_S), slots.length_B)
      if read is None:
        break
      slots.read(read[read < sizes.prompts])
    slots.limit = limit_D[0]
    for _ in range(sizes.chunk):
      if not slots.step():
        break
    slots.release_prompts()
  history.add(sizes, slots.length_B, slots.redrawn)
  return Rollout(slots.steps, slots.tokens, slots.redrawn, slots.cached, slots.cached_once,
                 slots.most_busy)


class _Slots:
  """What sampling/slots.py does to pages, counted."""

  def __init__(self, sizes, prompt_P, length_B):
    self.sizes, self.prompt_P, self.length_B = sizes, prompt_P, length_B
    self.row_S, self.done_S = np.full(sizes.slots, -1), np.zeros(sizes.slots, int)
    self.waiting_B = np.zeros(len(length_B), bool)
    self.ended_B = np.zeros(len(length_B), bool)
    self.held_P = np.zeros(len(prompt_P), bool)
    self.limit = self.steps = self.tokens = self.redrawn = self.cached = self.cached_once = 0
    self.most_busy = 0

  def read(self, prompts):
    self.held_P[prompts] = True
    self.waiting_B.reshape(len(self.held_P), -1)[prompts] = True

  def release_prompts(self):
    self.held_P &= ~self.ended_B.reshape(len(self.held_P), -1).all(1)

  def step(self):
    """One token in every busy slot; False if there is nothing to decode."""
    busy_S = self._refill()
    if not busy_S.any():
      return False
    tokens, prompt_S = self.sizes.page_tokens, self.prompt_P[self.row_S // self.sizes.group]
    prompts = count(tokens, self.prompt_P[self.held_P]).sum()
    while True:
      # Full pages of a prompt are shared; all others are a row's own, that of the next token too.
      own_S = count(tokens, prompt_S % tokens + self.done_S + 1)
      if prompts + own_S[busy_S].sum() <= self.sizes.pages or busy_S.sum() == 1:
        break
      youngest = np.flatnonzero(busy_S)[::-1][self.done_S[busy_S][::-1].argmin()]
      self.redrawn += self.done_S[youngest]
      self.waiting_B[self.row_S[youngest]] = True
      self.row_S[youngest], busy_S[youngest] = -1, False
      self.limit = busy_S.sum()
    self.done_S += busy_S
    rows = self.row_S[busy_S]
    self.steps, self.tokens = self.steps + 1, self.tokens + len(rows)
    self.most_busy = max(self.most_busy, len(rows))
    done, prompt = self.done_S[busy_S].sum(), prompt_S[busy_S].sum()
    self.cached += done + prompt
    self.cached_once += done + self.prompt_P[np.unique(rows // self.sizes.group)].sum()
    ended = rows[self.done_S[busy_S] >= self.length_B[rows]]
    self.ended_B[ended] = True
    self.row_S[np.isin(self.row_S, ended)] = -1
    return True

  def _refill(self):
    busy_S = self.row_S >= 0
    room = self.limit - busy_S.sum()
    if room > 0 and self.waiting_B.any():
      idle = np.flatnonzero(~busy_S)[:room]
      rows = np.flatnonzero(self.waiting_B)[: len(idle)]
      idle = idle[: len(rows)]
      self.row_S[idle], self.done_S[idle], self.waiting_B[rows] = rows, 0, False
      busy_S[idle] = True
    return busy_S
