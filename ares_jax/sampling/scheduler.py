"""Prompt slots on the host: how many fit into memory, and which prompt is read into which slot.

A prompt slot holds the keys and values of one prompt until all G responses to it have ended.
P prompts, C prompt slots, R prompts in one read, G group, T response tokens.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ares_jax.system import mesh

# Prompt slots of a device, as a multiple of the prompts whose G responses fill its decoding slots.
# A prompt slot is in use until the longest response to its prompt ends: at skewed lengths a factor
# of 1 leaves a third of the decoding steps idle, 3 as few as a slot for every prompt.
PROMPT_SLOT_FACTOR = 3
# All devices read together. Reads wait until every device has free prompt slots, so that there are
# few of them, unless more than this share of a device's decoding slots has no response to decode.
MAX_IDLE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class CachePlan:
  """Numbers of slots on each device."""

  slots: int  # decoding slots
  prompt_slots: int  # C
  read: int  # R, prompts in one read


def plan_cache(model, engine, *, prompts, prompt_tokens, group, tokens):
  """CachePlan whose keys and values fit into engine.cache_gib on each device.

  Counted are the prompts in prompt slots, the prompts of one read, and the responses in decoding
  slots. `prompts` counts those of all devices; `prompt_tokens` is the length of each, padding
  included, and `tokens` T.

  Raises:
    ValueError: they do not fit; names the largest engine.slots that does.
  """
  devices = mesh.size(*mesh.ROWS)
  split = mesh.size("model") if model.kv_heads % mesh.size("model") == 0 else 1
  width = jnp.dtype(model.compute_dtype).itemsize
  token_bytes = 2 * model.layers * model.kv_heads * model.head_dim * width / split
  prompts //= devices
  read = min(prompts, -(-engine.read // devices))

  def prompt_slots(slots):
    return min(prompts, PROMPT_SLOT_FACTOR * -(-slots // group) + read)

  def gib(slots):
    cached = (prompt_slots(slots) + read) * prompt_tokens + slots * tokens
    return cached * token_bytes / 2**30

  rows = prompts * group
  fits = next((slots for slots in range(rows, 0, -1) if gib(slots) <= engine.cache_gib), 0)
  wanted = min(rows, -(-engine.slots // devices)) if engine.slots else max(1, fits)
  if wanted > fits:
    remedy = (f"set engine.slots to {fits * devices} or less, or raise engine.cache_gib" if fits
              else "raise engine.cache_gib, or lower the tokens of a prompt, max_tokens or "
                   f"engine.read = {engine.read}")
    raise ValueError(
      f"keys and values of {prompt_slots(wanted)} + {read} prompts x {prompt_tokens} tokens and "
      f"{wanted} slots x {tokens} tokens on each device need {gib(wanted):.3g} GiB, more than "
      f"engine.cache_gib = {engine.cache_gib}; {remedy}")
  return CachePlan(wanted, prompt_slots(wanted), read)


class PromptScheduler:
  """Decides when each of D devices reads prompts, and into which prompt slots.

  A device reads its own P / D prompts, in order.
  """

  def __init__(self, devices, prompts, plan):
    """Takes D, P / D and a CachePlan."""
    self._prompts, self._plan = prompts, plan
    self._prompt_DC = np.full((devices, plan.prompt_slots), -1)  # prompt in each slot; -1 = none
    self.read_D = np.zeros(devices, int)  # prompts that each device has read

  def next_read(self, unfinished_P):
    """The prompts to read now, or None to go on decoding.

    All devices read when each of them has free slots for a complete read or for the rest of its
    prompts, or when one that has is short of rows to decode.

    Args:
      unfinished_P: int, rows of each prompt that have not ended.

    Returns:
      prompt_DR: int32, numbers of the prompts among those of their device; P / D = none.
      slot_DR: int32, the prompt slots they are read into; C = none.
    """
    # Rows of the prompt in each slot that have not ended; 0 = the slot is free.
    unfinished_DP = unfinished_P.reshape(len(self._prompt_DC), -1)
    unfinished_DC = np.where(self._prompt_DC < 0, 0, np.take_along_axis(
      unfinished_DP, np.maximum(self._prompt_DC, 0), 1))
    remaining_D = np.minimum(self._plan.read, self._prompts - self.read_D)
    free_D = (unfinished_DC == 0).sum(1)
    ready_D = (remaining_D > 0) & (free_D >= remaining_D)
    short_D = unfinished_DC.sum(1) < (1 - MAX_IDLE_SHARE) * self._plan.slots
    all_ready = (ready_D | (remaining_D == 0)).all()
    if not remaining_D.any() or not (all_ready or (ready_D & short_D).any()):
      return None
    return self._assign(unfinished_DC == 0, np.minimum(remaining_D, free_D))

  def _assign(self, free_DC, count_D):
    """`next_read`'s arrays for the next `count_D` prompts of each device."""
    prompt_DR = np.full((len(free_DC), self._plan.read), self._prompts, np.int32)
    slot_DR = np.full_like(prompt_DR, self._plan.prompt_slots)
    for device, count in enumerate(count_D):
      prompt_DR[device, :count] = self.read_D[device] + np.arange(count)
      slot_DR[device, :count] = np.flatnonzero(free_DC[device])[:count]
      self._prompt_DC[device, slot_DR[device, :count]] = prompt_DR[device, :count]
    self.read_D += count_D
    return prompt_DR, slot_DR
