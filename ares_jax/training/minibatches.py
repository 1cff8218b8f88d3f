"""Which prompts make a minibatch of stage 2, and which of its sequences share a packed row.

P prompts, G group, B = P*G sequences (b = p*G + g), N minibatches. Prompt p is number p // N of
minibatch p % N.
"""

import jax
import numpy as np

from ares_jax.data.packing import Families, first_fit, fit_families
from ares_jax.models.codes import step_of


def shares_prompts(config):
  """Whether answers share prompts in the update of an AepoConfig on the current mesh."""
  devices = jax.sharding.get_mesh()
  platform = jax.default_backend() if devices.empty else devices.devices.flat[0].platform
  # The kernel of attention on NVIDIA GPUs cannot (models/attention.py).
  return config.share_prompts and platform not in ("gpu", "cuda")


def balance_minibatches(prompts_P, answers_PG, *, minibatch, microbatch, row_tokens,
                        share_prompts=False):
  """Orders prompts so that minibatch n, the prompts at n, n + N, ..., fills complete microbatches.

  The unused rest of a minibatch's last microbatch is padding. So the tokens are spread over as few
  microbatches as possible, and each minibatch gets enough tokens to fill its share. If their number
  does not divide, some minibatches get one microbatch more, and with it the longer sequences.
  `prompts_P` and `answers_PG` are tokens of prompts and of responses to them; the other arguments
  are as for `batch.pack`.
  """
  group, minibatches = answers_PG.shape[1], answers_PG.size // minibatch
  lengths_PG = prompts_P[:, None] + answers_PG
  tokens_P, families = lengths_PG.sum(1), None
  if share_prompts:
    families = families_of(prompts_P, group, row_tokens)
    tokens_P = tokens_P - (group - 1) * (prompts_P - 1)  # if all of a group are in one row
  best, least = None, np.inf
  for size in row_tokens:
    capacity = microbatch * size
    count = max(minibatches, -(-tokens_P.sum() // capacity))
    # Rows are never quite full: mostly one to five counts are tried.
    while count * capacity < least:
      microbatches_N = np.diff(np.arange(minibatches + 1) * count // minibatches)
      members = _assign_prompts(tokens_P, microbatches_N * (tokens_P.sum() / count))
      sequences = [np.add.outer(np.multiply(of, group), np.arange(group)).ravel() for of in members]
      padded = padded_tokens(fill_rows(sequences, lengths_PG.ravel(), size, families), microbatch,
                             size)
      if padded < least:
        best, least = members, padded
      count += 1
  return [prompt for prompts in zip(*best, strict=True) for prompt in prompts]


def _assign_prompts(tokens_P, wanted_N):
  """Equally many prompts for each minibatch, with about `wanted_N` tokens: N sorted lists.

  Prompts are assigned from the longest to the shortest, each to the minibatch that still wants most
  tokens for each prompt it has yet to get.
  """
  members, left_N = [[] for _ in wanted_N], wanted_N.copy()
  open_N = np.full(len(wanted_N), len(tokens_P) // len(wanted_N))
  for prompt in np.argsort(-tokens_P, kind="stable"):
    number = int(np.where(open_N > 0, left_N / np.maximum(open_N, 1), -np.inf).argmax())
    members[number].append(int(prompt))
    left_N[number] -= tokens_P[prompt]
    open_N[number] -= 1
  return [sorted(of) for of in members]


def families_of(prompts_P, group, row_tokens):
  """Families of the responses to prompts of `prompts_P` tokens.

  A prompt's last token is not shared: its hidden state predicts the first token of every response,
  so each response begins with a copy of it.
  """
  return Families(np.repeat(np.arange(len(prompts_P)), group), np.repeat(prompts_P - 1, group),
                  step_of(max(row_tokens)))


def fill_rows(minibatches, lengths, row_tokens, families=None):
  """The rows of each minibatch, arrays of sequences that stand in one row.

  `minibatches` are arrays of sequences, `lengths` the tokens of all sequences.
  """
  def fit(of):
    if families is None:
      return first_fit([(int(length),) for length in lengths[of]], (row_tokens,))
    return fit_families(lengths[of], families.take(of), row_tokens)

  return [[of[row] for row in fit(of)] for of in minibatches]


def padded_tokens(rows, microbatch, row_tokens):
  """Tokens, padding included, of the microbatches that the minibatches' `rows` take."""
  return sum(-(-len(part) // microbatch) for part in rows) * microbatch * row_tokens


def row_capacity(minibatch, microbatch, row_tokens, longest):
  """K: microbatches of a minibatch whose sequences all have the greatest length."""
  # First-fit leaves no row but the last with fewer sequences than row_tokens // longest.
  rows = -(-minibatch // (row_tokens // longest))
  return -(-rows // microbatch)
