"""What the host decides between two chunks: which prompts are read, how many rows are decoded.

    host    limit, prompts to read  -->  devices   read prompts | decode a chunk | ...
            ended rows, their tokens <--           (pages are given and taken there: pages.py)

Each row grows until it ends, and nobody knows when. `History` estimates from the rows that ended
and those that go on how many pages the rows in the slots will hold at any later time; another row
starts as long as they are expected to fit. Where the estimate was too low, devices put rows back.

P prompts, R prompts in one read, G group, D devices, S slots, T response tokens, M pages of T
tokens, A tokens of a page.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ares_jax.models.paged import BLOCK_PAGES
from ares_jax.sampling import pages as pages_lib
from ares_jax.system import mesh

# All devices read together. Reads wait until every device has rows to start, so that there are few
# of them, unless one lacks more than this share of the rows that it could decode.
MAX_IDLE_SHARE = 0.25
# Tokens of prompts that a device reads in one call at most, unless a single prompt has more.
READ_TOKENS = 4096
# Before any response has ended: lognormal lengths with this median and their 99th percentile at 1,
# in max_tokens, count as much as this many responses.
MEDIAN, PRIOR_ROWS = 0.15, 8
# Earlier rollouts count as much as this many responses.
HISTORY_ROWS = 64
# The first and the last page of a response are partly filled.
PARTIAL_PAGES = 1.5


@dataclasses.dataclass(frozen=True)
class CachePlan:
  """Sizes of what a device holds for a batch of prompts."""

  prompts: int  # P
  group: int  # G
  prompt_tokens: int  # of the longest prompt, padding included
  tokens: int  # T
  page_tokens: int  # A
  pages: int  # of the pool
  slots: int  # S
  read: int  # R, prompts in one read
  chunk: int  # tokens decoded in a slot before the host looks for ended rows
  int8: bool = False  # whether pages hold int8

  @property
  def prompt_pages(self):
    """Pages of the longest prompt."""
    return pages_lib.count(self.page_tokens, self.prompt_tokens)

  @property
  def row_pages(self):
    """Entries of a slot's table: for the longest prompt and response, in blocks of a kernel."""
    count = pages_lib.count(self.page_tokens, self.prompt_tokens + self.tokens)
    return -(-count // BLOCK_PAGES) * BLOCK_PAGES

  def slots_of(self, prompt_tokens, tokens):
    """Rows of such prompts and responses whose pages the pool holds together, at least 1."""
    prompt = pages_lib.count(self.page_tokens, prompt_tokens) / self.group
    return max(1, min(self.slots, int(self.pages // (
      prompt + pages_lib.count(self.page_tokens, tokens) + 1))))


class History:
  """How long responses become, as far as this process knows.

  It decides how many rows are decoded at once, never which tokens they have.
  """

  def __init__(self):
    self._shares_M = np.zeros(0)  # of responses of earlier rollouts, by their number of pages
    self._weight = 0
    self.redrawn = 0.0  # tokens of the last rollout that were drawn again, as a share of all
    self.slots = 0  # of a device, in the last rollout whose number was not set

  def survival(self, pages, ended_B=(), going_S=()):
    """float64 [M + 1]: the share of responses that fill more than m pages; the last is 0.

    A Kaplan-Meier estimate: responses that go on count as long as they are known to last.

    Args:
      pages: M.
      ended_B: int, full pages of responses that have ended, < M.
      going_S: int, full pages of those that go on.
    """
    shares_M = self._shares_M if len(self._shares_M) == pages else _lognormal(pages)
    weight = self._weight if len(self._shares_M) == pages else PRIOR_ROWS
    deaths_M = np.bincount(ended_B, minlength=pages) + weight * shares_M
    ends_M = deaths_M + np.bincount(going_S, minlength=pages)[:pages]
    at_risk_M = ends_M[::-1].cumsum()[::-1] - np.bincount(going_S, minlength=pages)[:pages]
    hazard_M = np.minimum(deaths_M / np.maximum(at_risk_M, 1e-9), 1)
    return np.concatenate([[1.0], np.cumprod(1 - hazard_M)[:-1], [0.0]])

  def add(self, sizes, length_B, redrawn):
    """Adds a complete rollout: a CachePlan, tokens of each response, tokens drawn again."""
    pages = pages_lib.count(sizes.page_tokens, sizes.tokens)
    shares_M = np.bincount((length_B - 1) // sizes.page_tokens, minlength=pages) / len(length_B)
    # A hundredth of the first guess: what was not seen yet may still happen.
    self._shares_M, self._weight = 0.99 * shares_M + 0.01 * _lognormal(pages), HISTORY_ROWS
    self.redrawn = redrawn / (redrawn + length_B.sum())


def _lognormal(pages):
  """float64 [M]: shares of lognormal lengths by full pages, those beyond T in the last."""
  deviation = np.log(1 / MEDIAN) / 2.3263
  # The same draws every time, so that every process and every run plans alike.
  draws = np.random.default_rng(0).normal(size=4096)
  lengths = MEDIAN * np.exp(deviation * draws) * pages
  return np.bincount(np.minimum(lengths.astype(int), pages - 1), minlength=pages) / len(draws)


def rows_that_fit(survival_M, free_D, going_DS):
  """int [D]: rows that may start on each device so that the pages are expected to suffice.

  At any time from now on: pages of the rows that go on, where they have not ended by then, and of
  those that start now.

  Args:
    survival_M: from `History.survival`.
    free_D: int, pages that no prompt holds.
    going_DS: int, full pages of the row in each slot; -1 = idle.
  """
  pages = len(survival_M) - 1
  survival, age, later = np.maximum(survival_M, 1e-12), np.arange(pages)[:, None], np.arange(pages)
  at = age + later
  lasting = np.where(at < pages, survival[np.minimum(at, pages)] / survival[age], 0.0)
  held = lasting * (at + PARTIAL_PAGES)
  counts_DM = np.stack([np.bincount(row[row >= 0], minlength=pages)[:pages] for row in going_DS])
  left_DT = np.asarray(free_D)[:, None] - counts_DM @ held
  return np.maximum(np.floor((left_DT / held[0]).min(1)), 0).astype(int)


def token_bytes(model, *, int8):
  """Bytes of a device for the keys and values of a token, in the compute dtype or in int8."""
  split = mesh.size("model") if model.kv_heads % mesh.size("model") == 0 else 1
  width = 1 if int8 else jnp.dtype(model.compute_dtype).itemsize
  return 2 * model.layers * model.kv_heads * model.head_dim * width / split


def plan_cache(model, engine, *, prompts, prompt_tokens, group, tokens, history=None):
  """CachePlan whose keys and values fit into engine.cache_gib on each device.

  Counted are the pages and the prompts of one read, which have the compute dtype. `prompts` counts
  those of all devices; `prompt_tokens` is the length of each, padding included, and `tokens` T.

  Raises:
    ValueError: one prompt and one response do not fit.
  """
  devices = mesh.size(*mesh.ROWS)
  prompts //= devices
  read = -(-engine.read // devices) if engine.read else max(1, READ_TOKENS // prompt_tokens)
  read = min(prompts, read)
  chunk = engine.chunk or min(64, max(8, tokens // 64))
  page_tokens = min(64, max(8, 2 ** round(np.log2(tokens / 16))))
  read_bytes = read * prompt_tokens * token_bytes(model, int8=False)
  page_bytes = page_tokens * token_bytes(model, int8=engine.int8_pages)
  pages = int((engine.cache_gib * 2**30 - read_bytes) // page_bytes)
  sizes = CachePlan(prompts, group, prompt_tokens, tokens, page_tokens, pages, 0, read, chunk,
                    engine.int8_pages)
  response = pages_lib.count(page_tokens, tokens) + 1
  if sizes.pages < sizes.prompt_pages + response:
    needed = (sizes.prompt_pages + response) * page_bytes + read_bytes
    raise ValueError(
      f"keys and values of 1 + {read} prompts x {prompt_tokens} tokens and of a response of "
      f"{tokens} need {needed / 2**30:.3g} GiB on each device, more than engine.cache_gib = "
      f"{engine.cache_gib}; raise engine.cache_gib, or lower the tokens of a prompt, max_tokens or "
      "engine.read")
  slots = (-(-engine.slots // devices) if engine.slots else
           _slots(sizes, (history or History()).survival(response - 1), history))
  slots = min(slots, prompts * group)
  most = prompts * sizes.prompt_pages + slots * response
  return dataclasses.replace(sizes, slots=slots, pages=min(sizes.pages, most))


def _slots(sizes, survival_M, history):
  """A few more rows than a device can decode on average, or all that can start at once.

  Early rows are short, so that more of them fit than later, but a CPU computes idle slots too. For
  7B on v5e:8x8 at the recipe's lengths as many as fit on average take 20,800 steps, 1.4 times as
  many 18,800, twice as many 17,300.
  """
  later = np.arange(len(survival_M) - 1)
  mean = survival_M[:-1] @ (later + PARTIAL_PAGES) / survival_M.sum()
  steady = sizes.pages / (mean + 1.5 * sizes.prompt_pages / sizes.group)
  at_once = rows_that_fit(survival_M, [sizes.pages - sizes.prompt_pages], [np.zeros(0, int)])[0]
  wanted = max(1, min(1.4 * steady, at_once, sizes.prompts * sizes.group))
  # Another number is another program to compile.
  if history and history.slots and 2 / 3 < wanted / history.slots < 1.5:
    return history.slots
  if history:
    history.slots = int(wanted)
  return int(wanted)


class Scheduler:
  """Decides when each of D devices reads prompts, and how many rows it may decode.

  A device reads its own P / D prompts, in order.
  """

  def __init__(self, sizes, length_P, history):
    """Takes a CachePlan, the tokens of all prompts, and a History."""
    self._sizes, self._history = sizes, history
    self._prompt_pages_DP = pages_lib.count(
      sizes.page_tokens, np.asarray(length_P).reshape(-1, sizes.prompts))
    self.read_D = np.zeros(len(self._prompt_pages_DP), int)  # prompts that each device has read

  def next_chunk(self, ended_B, done_S, length_B):
    """What the devices do next.

    Args:
      ended_B: bool, rows that have ended.
      done_S: int, tokens of the row in each slot; -1 = idle.
      length_B: int, tokens of the rows that have ended; others are not read.

    Returns:
      limit_D: int32, rows that each device may decode.
      prompt_DR: int32, numbers of the prompts to read among those of their device, P / D = none; or
        None to go on decoding.
    """
    sizes, devices = self._sizes, len(self.read_D)
    done_DS = np.asarray(done_S).reshape(devices, -1)
    response = pages_lib.count(sizes.page_tokens, sizes.tokens)
    full_DS = np.where(done_DS < 0, -1, np.minimum(done_DS // sizes.page_tokens, response - 1))
    ended_pages = (length_B[ended_B] - 1) // sizes.page_tokens
    survival_M = self._history.survival(response, ended_pages, full_DS[full_DS >= 0])
    unfinished_DP = sizes.group - ended_B.reshape(devices, -1, sizes.group).sum(2)
    number_P = np.arange(sizes.prompts)
    held_DP = (number_P < self.read_D[:, None]) & (unfinished_DP > 0)
    busy_D = (full_DS >= 0).sum(1)
    free_D = sizes.pages - (held_DP * self._prompt_pages_DP).sum(1)
    start_D = np.minimum(rows_that_fit(survival_M, free_D, full_DS), sizes.slots - busy_D)
    limit_D = np.maximum(busy_D + start_D, 1).astype(np.int32)
    waiting_D = (held_DP * unfinished_DP).sum(1) - busy_D
    return limit_D, self._next_read(limit_D - busy_D - waiting_D, limit_D, free_D - response - 1)

  def _next_read(self, lacking_D, limit_D, room_D):
    """`next_chunk`'s prompt_DR, where devices lack rows to decode and have room for prompts.

    The longest row of a device must always find pages, so `room_D` leaves them free.
    """
    sizes, number_R = self._sizes, np.arange(self._sizes.read)
    next_DR = self.read_D[:, None] + number_R
    size_DR = np.take_along_axis(self._prompt_pages_DP, np.minimum(next_DR, sizes.prompts - 1), 1)
    fits_DR = (next_DR < sizes.prompts) & (np.cumsum(size_DR, 1) <= room_D[:, None])
    able_D = fits_DR.any(1) & (lacking_D > 0)
    short_D = able_D & (lacking_D > MAX_IDLE_SHARE * limit_D)
    if not able_D.any() or not (able_D | (self.read_D == sizes.prompts)).all() | short_D.any():
      return None
    self.read_D += fits_DR.sum(1)
    return np.where(fits_DR, next_DR, sizes.prompts).astype(np.int32)
