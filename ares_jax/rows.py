"""Rollouts in packed rows: how the update reads the sequences of a batch.

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, N minibatches of K
microbatches, R rows of a microbatch, C tokens of a row. Prompt p is number p // N of minibatch
p % N, so that each device finds a minibatch's images among its own.
"""

import flax.struct
import jax
import numpy as np

from ares_jax import mesh
from ares_jax.data.packing import first_fit, lay_out


@flax.struct.dataclass
class PackedRows:
  """Prompts and responses of B sequences, several a row; 0 where padding.

  K is enough for sequences that all have the greatest length: the shape does not depend on the
  batch, `used` does.
  """

  used: jax.Array  # int32 [N]: how many microbatches hold anything; they are the first ones
  tokens: jax.Array  # int32 [N, K, R, C]
  segment: jax.Array  # int32 [N, K, R, C]: 0 = padding, else 1 + place of the sequence in its row
  positions: jax.Array  # int32 [N, K, R, 3, C], M-RoPE
  unit: jax.Array  # int32 [N, K, R, C]: which of the minibatch's units feeds a token, -1 for text
  sequence: jax.Array  # int32 [N, K, R, C]: b
  place: jax.Array  # int32 [N, K, R, C]: t of a response token, 0 elsewhere
  response_mask: jax.Array  # bool [N, K, R, C]
  sampler_logprob: jax.Array  # float32 [N, K, R, C]: 0 outside the response

  def to_device(self):
    """The rows of every microbatch over "data"."""
    rows = mesh.put(self.replace(used=None), None, None, "data")
    return rows.replace(used=mesh.put(self.used))


def pack(prompts, samples, *, group, merge, minibatch, microbatch, row_tokens, longest):
  """Packs prompts and their responses, minibatch by minibatch.

  Args:
    prompts: data.prompts.PromptBatch.
    samples: sampler.Samples of numpy arrays.
    group: G.
    merge: patches per side of an image unit.
    minibatch: sequences an optimizer update; divides B.
    microbatch: R.
    row_tokens: tuple of values of C; the one is taken whose rows hold the least padding. One
      program is compiled for each that ever is.
    longest: tokens of a prompt and its response, at most.

  Returns:
    PackedRows of numpy arrays.
    metrics: "pack/real", share of real tokens in the microbatches that are used; "pack/rows", rows
      in use over all minibatches; "pack/row_tokens", C.

  Raises:
    ValueError: `longest` does not fit a row, or a sequence exceeds it. No sequence is cut or lost.
  """
  lengths = np.repeat(prompts.length, group) + samples.mask.sum(1)
  if longest > min(row_tokens):
    raise ValueError(f"a prompt and its response have up to {longest} tokens, packed rows "
                     f"{min(row_tokens)}; raise row_tokens")
  if lengths.max() > longest:
    raise ValueError(f"sequence {lengths.argmax()} has {lengths.max()} tokens, the limit is "
                     f"{longest}; raise prompt.max_tokens")
  minibatches = len(lengths) // minibatch
  member = np.arange(len(lengths)) // group % minibatches
  members = [np.flatnonzero(member == number) for number in range(minibatches)]

  def bins(room):
    return [[of[row] for row in first_fit([(int(size),) for size in lengths[of]], (room,))]
            for of in members]

  def padded(room, rows):
    return sum(-(-len(row) // microbatch) for row in rows) * microbatch * room

  room, rows = min(((room, bins(room)) for room in row_tokens), key=lambda pair: padded(*pair))
  shape = minibatches, row_room(minibatch, microbatch, room, longest), microbatch, room
  packed = PackedRows(
    used=np.int32([-(-len(row) // microbatch) for row in rows]),
    **{name: np.zeros(shape, np.int32) for name in ("tokens", "segment", "sequence", "place")},
    positions=np.zeros((*shape[:3], 3, room), np.int32), unit=np.full(shape, -1, np.int32),
    response_mask=np.zeros(shape, bool), sampler_logprob=np.zeros(shape, np.float32))
  units = prompts.vision["image"][0].size // merge**2
  for number, row in enumerate(rows):
    values = _arrays(prompts, samples, lay_out(row, lengths, room), group)
    first = values["sequence"] // (group * minibatches) * units
    values["unit"] += np.where(values["unit"] >= 0, first, 0)
    for name, value in values.items():
      array = getattr(packed, name)[number]
      array.reshape(-1, *array.shape[2:])[: len(row)] = value
  return packed, {"pack/real": lengths.sum() / padded(room, rows),
                  "pack/rows": sum(map(len, rows)), "pack/row_tokens": room}


def row_room(minibatch, microbatch, row_tokens, longest):
  """K: microbatches of a minibatch whose sequences are all of the greatest length.

  First-fit opens a row when no other has room for the longest: all rows but the last hold at least
  row_tokens // longest sequences.
  """
  rows = -(-minibatch // (row_tokens // longest))
  return -(-rows // microbatch)


def _arrays(prompts, samples, layout, group):
  """Fields of PackedRows for a minibatch's rows in use."""
  real, b = layout.segment > 0, layout.sequence
  p = b // group
  t = layout.place - prompts.length[p]
  response = real & (t >= 0)
  column = np.minimum(layout.place, prompts.tokens.shape[1] - 1)
  t = np.where(response, t, 0)
  # M-RoPE counts on from the largest prompt position on all three axes.
  after = prompts.positions.max((0, 2))[p] + 1 + t
  positions = np.where(response, after, prompts.positions[:, p, column])
  tokens = np.where(response, samples.tokens[b, t], prompts.tokens[p, column])
  return {
    "tokens": np.where(real, tokens, 0),
    "segment": layout.segment,
    "positions": np.moveaxis(np.where(real, positions, 0), 0, 1),
    "unit": np.where(real & ~response, prompts.unit[p, column], -1),
    "sequence": b,
    "place": t,
    "response_mask": response,
    "sampler_logprob": np.where(response, samples.logprob[b, t], 0),
  }


def balance(tokens_P, minibatches):
  """Order of prompts in which all minibatches, prompts p % N, hold about as many tokens.

  Where one has few tokens more than a microbatch holds, the next one is nearly all padding.

  Args:
    tokens_P: tokens of each prompt's sequences.
    minibatches: N; divides P.

  Returns:
    A list of P places in tokens_P.
  """
  members, totals = [[] for _ in range(minibatches)], np.zeros(minibatches)
  for place in np.argsort(-np.asarray(tokens_P), kind="stable"):
    number = int(totals.argmin())
    members[number].append(int(place))
    full = len(members[number]) == len(tokens_P) // minibatches
    totals[number] = np.inf if full else totals[number] + tokens_P[place]
  return [place for places in zip(*map(sorted, members), strict=True) for place in places]


def deal(tree, parts):
  """[P, ...] to [parts, P / parts, ...]: part n has every parts-th, from n on."""
  return jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)
