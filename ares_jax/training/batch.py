"""Rollouts in packed rows: how the update reads the sequences of a batch.

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, N minibatches of K
microbatches, R rows of a microbatch, C tokens of a row. Prompt p is number p // N of minibatch
p % N, so that each device finds a minibatch's images among its own.
"""


import flax.struct
import jax
import numpy as np

from ares_jax.data.packing import first_fit, lay_out
from ares_jax.models.vision import VisionInput
from ares_jax.system import mesh


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
    """The rows of every microbatch over mesh.ROWS."""
    rows = mesh.put(self.replace(used=None), None, None, mesh.ROWS)
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

  found = [(room, _bins([lengths[of] for of in members], room)) for room in row_tokens]
  room, rows = min(found, key=lambda pair: _padded(pair[1], microbatch, pair[0]))
  rows = [[of[row] for row in part] for of, part in zip(members, rows, strict=True)]
  shape = minibatches, row_capacity(minibatch, microbatch, room, longest), microbatch, room
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
  return packed, {"pack/real": lengths.sum() / _padded(rows, microbatch, room),
                  "pack/rows": sum(map(len, rows)), "pack/row_tokens": room}


def row_capacity(minibatch, microbatch, row_tokens, longest):
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


def balance_minibatches(lengths_PG, *, minibatch, microbatch, row_tokens):
  """Order of prompts in which the minibatches, prompts p % N, fill whole microbatches.

  What is left of a minibatch's last microbatch is padding, so as few microbatches as can be are
  dealt out and every minibatch gets tokens for its own: all as many, or some one more than others,
  evenly between them, with longer sequences. Sizes are those of `pack`.

  Args:
    lengths_PG: int [P, G], tokens of a prompt and each of its responses.
    minibatch: sequences an optimizer update; divides P * G.
    microbatch: R.
    row_tokens: tuple of values of C.

  Returns:
    A list of P places in lengths_PG.
  """
  tokens_P, minibatches = lengths_PG.sum(1), lengths_PG.size // minibatch
  best, least = None, np.inf
  for room in row_tokens:
    whole = microbatch * room
    count = max(minibatches, -(-tokens_P.sum() // whole))
    # Rows are never quite full: mostly one to five counts are tried.
    while count * whole < least:
      share = np.diff(np.arange(minibatches + 1) * count // minibatches)
      members = _shared_out(tokens_P, share * (tokens_P.sum() / count))
      rows = _bins([lengths_PG[of].ravel() for of in members], room)
      if _padded(rows, microbatch, room) < least:
        best, least = members, _padded(rows, microbatch, room)
      count += 1
  return [place for places in zip(*best, strict=True) for place in places]


def _shared_out(tokens_P, wanted_N):
  """As many prompts for each minibatch, with about `wanted_N` tokens: N sorted lists of places.

  The longest goes where most is wanted of each prompt still to come.
  """
  members, left_N = [[] for _ in wanted_N], wanted_N.copy()
  open_N = np.full(len(wanted_N), len(tokens_P) // len(wanted_N))
  for place in np.argsort(-tokens_P, kind="stable"):
    number = int(np.where(open_N > 0, left_N / np.maximum(open_N, 1), -np.inf).argmax())
    members[number].append(int(place))
    left_N[number] -= tokens_P[place]
    open_N[number] -= 1
  return [sorted(of) for of in members]


def _bins(lengths, room):
  """Rows of `room` tokens for each minibatch: lists of lists of indices into its lengths."""
  return [first_fit([(int(size),) for size in of], (room,)) for of in lengths]


def _padded(rows, microbatch, room):
  """Tokens, padding included, of the microbatches that the minibatches' `rows` take."""
  return sum(-(-len(row) // microbatch) for row in rows) * microbatch * room


def split_minibatches(tree, parts):
  """[P, ...] to [parts, P / parts, ...]: part n has every parts-th, from n on."""
  return jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


@flax.struct.dataclass
class RolloutBatch:
  """B = P*G graded responses, and the packed rows in which the update reads them.

  Column t is about response token t: entropy[:, t] is that of the distribution it was drawn from.
  """

  tokens: jax.Array  # int32 [B, T]; 0 outside the response
  response_mask: jax.Array  # bool [B, T]: response, its end-of-turn token included
  entropy: jax.Array  # float32 [B, T] nats: 0 outside the response
  correct: jax.Array  # float32 [B], 0 or 1
  format_ok: jax.Array  # float32 [B], 0 or 1
  vision: VisionInput  # of the P prompts
  rows: PackedRows

  def to_device(self):
    """The batch on the current mesh, sequences and packed rows over mesh.ROWS."""
    return mesh.put(self.replace(rows=None), mesh.ROWS).replace(rows=self.rows.to_device())
