"""A graded rollout batch, and the packed rows in which the update reads its sequences.

P prompts, G group, B = P*G sequences (b = p*G + g), T response tokens, N minibatches of K
microbatches, R rows of a microbatch, C tokens of a row. Prompt p is number p // N of minibatch
p % N, so that each device holds the images of its part of every minibatch.
"""

import collections
import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

from ares_jax.data.packing import lay_out
from ares_jax.data.prompts import PromptBatch
from ares_jax.data.sharded import deliver
from ares_jax.models.vision import VisionInput
from ares_jax.system import mesh, shares
from ares_jax.training.minibatches import (
  families_of,
  fill_rows,
  padded_tokens,
  row_capacity,
  shares_prompts,
)


@flax.struct.dataclass
class PackedRows:
  """Prompts and responses of B sequences, several in a row; 0 where padding.

  The shape does not depend on the batch: K is enough if all sequences have the greatest length.
  """

  used: jax.Array  # int32 [N]: number of microbatches with tokens; they come first
  tokens: jax.Array  # int32 [N, K, R, C]
  # int32 [N, K, R, C]: 0 = padding, else 1 + index in its row of the sequence, or of its part
  segment: jax.Array
  positions: jax.Array  # int32 [N, K, R, 3, C], M-RoPE
  unit: jax.Array  # int32 [N, K, R, C]: index of the token's unit in its minibatch, -1 for text
  sequence: jax.Array  # int32 [N, K, R, C]: b
  response_index: jax.Array  # int32 [N, K, R, C]: t of a response token, 0 elsewhere
  response_mask: jax.Array  # bool [N, K, R, C]
  sampler_logprob: jax.Array  # float32 [N, K, R, C]: 0 outside the response
  # float32 [N, K, R, C], of the policy before the first update. None with one minibatch, where the
  # gradient's forward pass gives the old log-probabilities.
  old_logprob: jax.Array | None = None
  # int32 [N, K, R, C]: the segment of the shared prompt that a token reads besides its own, its own
  # where there is none. A shared prompt is one segment, without its last token; that token and an
  # answer are another. None = every answer has its own prompt, in one segment.
  prompt_segment: jax.Array | None = None

  @classmethod
  def abstract(cls, minibatches, microbatches, microbatch, row_tokens, *, share_prompts=False):
    """The shapes [N, K, R, C] of `to_device`, on the current mesh."""
    def array(dtype, *shape):
      return mesh.abstract(dtype, shape, None, None, mesh.ROWS)

    shape = minibatches, microbatches, microbatch, row_tokens
    return cls(
      used=mesh.abstract(np.int32, (minibatches,)),
      positions=array(np.int32, *shape[:3], 3, row_tokens), response_mask=array(bool, *shape),
      sampler_logprob=array(np.float32, *shape),
      prompt_segment=array(np.int32, *shape) if share_prompts else None,
      **{name: array(np.int32, *shape) for name in (
        "tokens", "segment", "unit", "sequence", "response_index")})

  def to_device(self, microbatch):
    """The rows on the current mesh, R = `microbatch` of every microbatch split over mesh.ROWS."""
    rows = shares.put_rows(self.replace(used=None), microbatch, None, None, mesh.ROWS)
    return rows.replace(used=mesh.put(self.used))


@flax.struct.dataclass
class AnswerScores:
  """What B responses are worth, where it is more than right or wrong (grading/scoring.py)."""

  accuracy: jax.Array  # float32 [B], in [0, 1]
  reward: jax.Array  # float32 [B], weighted sum of the components

  @classmethod
  def of(cls, scores):
    """The fields of a scoring.Scores; None of None."""
    return scores and cls(scores.accuracy, scores.reward)


@flax.struct.dataclass
class RolloutBatch:
  """B graded responses, and their packed rows.

  Column t is about response token t: entropy[:, t] belongs to the distribution it was drawn from.
  """

  tokens: jax.Array  # int32 [B, T]; 0 outside the response
  response_mask: jax.Array  # bool [B, T]: response, its end-of-turn token included
  entropy: jax.Array  # float32 [B, T] nats: 0 outside the response
  correct: jax.Array  # float32 [B], 0 or 1
  format_ok: jax.Array  # float32 [B], 0 or 1
  vision: VisionInput  # of the P prompts
  rows: PackedRows
  scores: AnswerScores | None = None  # None: the accuracy and the reward are `correct`

  @property
  def accuracy(self):
    """float32 [B] in [0, 1], whose mean over a group decides its difficulty."""
    return self.correct if self.scores is None else self.scores.accuracy

  @property
  def reward(self):
    """float32 [B], before the reward is shaped."""
    return self.correct if self.scores is None else self.scores.reward

  @classmethod
  def abstract(cls, model, config, prompt_tokens, windows, *, scores=False):
    """The largest shapes of an AepoConfig's batch on the current mesh.

    `prompt_tokens` and vision `windows` are those of a prompt; `scores` says whether responses have
    AnswerScores.
    """
    count, tokens = config.prompts * config.group, config.sampling.max_tokens
    longest = max(config.row_tokens)
    capacity = row_capacity(config.minibatch, config.microbatch, longest, prompt_tokens + tokens)
    grade = mesh.abstract(np.float32, (count,), mesh.ROWS)
    tokens_BT, mask_BT, entropy_BT = (mesh.abstract(dtype, (count, tokens), mesh.ROWS)
                                      for dtype in (np.int32, bool, np.float32))
    return cls(
      tokens_BT, mask_BT, entropy_BT, correct=grade, format_ok=grade,
      vision=VisionInput.abstract(model.images, config.prompts, windows),
      rows=PackedRows.abstract(count // config.minibatch, capacity, config.microbatch, longest,
                               share_prompts=shares_prompts(config)),
      scores=AnswerScores(grade, grade) if scores else None)

  def to_device(self, prompts, microbatch):
    """The batch on the current mesh: prompts, sequences and packed rows split over mesh.ROWS.

    P is `prompts`, R `microbatch`. Each process has the grades of all sequences, but only the
    prompts, sequences and rows of its own devices, or all of them.
    """
    grades = mesh.put((self.correct, self.format_ok), mesh.ROWS)
    scores = mesh.put(self.scores, mesh.ROWS)
    parts = shares.put_rows((self.tokens, self.response_mask, self.entropy), len(self.correct),
                            mesh.ROWS)
    return RolloutBatch(*parts, *grades, shares.put_rows(self.vision, prompts, mesh.ROWS),
                        self.rows.to_device(microbatch), scores)


def pack(prompts, samples, lengths, *, group, minibatch, microbatch, row_tokens, longest,
         share_prompts=False):
  """Packs a PromptBatch and its responses, Samples in numpy, minibatch by minibatch; collective.

  Args:
    lengths: int [B], tokens of each response; those of other processes are not in `samples`.
    group, microbatch: G and R.
    minibatch: sequences of an optimizer update; divides B.
    row_tokens: values that C may have. The one with the least padding is taken; each that is ever
      taken compiles one program.
    longest: most tokens that a prompt and its response may have.
    share_prompts: whether responses to one prompt that stand in one row share it.

  Returns:
    PackedRows of numpy arrays, of the rows of this process's devices.
    metrics: "pack/real", share of real tokens in the used microbatches; "pack/rows", used rows of
      all minibatches; "pack/row_tokens", C; with `share_prompts` also "pack/shared", the share of
      the tokens of prompts and responses that need not be computed.

  Raises:
    ValueError: `longest` does not fit a row, or a sequence exceeds it. No sequence is cut or lost.
  """
  families = families_of(prompts.sizes[:, 0], group, row_tokens) if share_prompts else None
  lengths = np.repeat(prompts.sizes[:, 0], group) + lengths
  if longest > min(row_tokens):
    raise ValueError(f"a prompt and its response have up to {longest} tokens, packed rows "
                     f"{min(row_tokens)}; raise row_tokens")
  if lengths.max() > longest:
    raise ValueError(f"sequence {lengths.argmax()} has {lengths.max()} tokens, the limit is "
                     f"{longest}; raise prompt.max_tokens")
  minibatches = len(lengths) // minibatch
  minibatch_B = np.arange(len(lengths)) // group % minibatches
  members = [np.flatnonzero(minibatch_B == number) for number in range(minibatches)]

  packings = {size: fill_rows(members, lengths, size, families) for size in row_tokens}
  size = min(packings, key=lambda size: padded_tokens(packings[size], microbatch, size))
  rows = packings[size]
  share = shares.share(microbatch)
  shape = (minibatches, row_capacity(minibatch, microbatch, size, longest), len(share.held), size)
  tokens, segment, sequence, response_index = np.zeros((4, *shape), np.int32)
  packed = PackedRows(
    used=np.int32([-(-len(part) // microbatch) for part in rows]), tokens=tokens, segment=segment,
    sequence=sequence, response_index=response_index,
    positions=np.zeros((*shape[:3], 3, size), np.int32), unit=np.full(shape, -1, np.int32),
    response_mask=np.zeros(shape, bool), sampler_logprob=np.zeros(shape, np.float32),
    prompt_segment=np.zeros(shape, np.int32) if share_prompts else None)
  sequences = _Sequences.of(prompts, samples, rows, share, group)
  for number, part in enumerate(rows):
    held = [index for index in range(len(part)) if index % microbatch in share.held]
    layout = lay_out([part[index] for index in held], lengths, size, families)
    values = _row_values(sequences, layout, group)
    if share_prompts:
      values["prompt_segment"] = layout.head
    first_unit = values["sequence"] // (group * minibatches) * prompts.shape.units
    values["unit"] += np.where(values["unit"] >= 0, first_unit, 0)
    k, r = np.divmod(np.array(held, int), microbatch)
    for name, value in values.items():
      getattr(packed, name)[number, k, np.searchsorted(share.held, r)] = value
  shared = sum(families.shared_tokens(row) for part in rows for row in part) if families else 0
  metrics = {"pack/real": (lengths.sum() - shared) / padded_tokens(rows, microbatch, size),
             "pack/rows": sum(map(len, rows)), "pack/row_tokens": size}
  return packed, metrics | ({"pack/shared": shared / lengths.sum()} if share_prompts else {})


class _Sequences(NamedTuple):
  """Sequence b is row sample_B[b] of `samples`, after row prompt_P[b // G] of `prompts`."""

  prompts: PromptBatch
  samples: object  # Samples, without entropies
  prompt_P: np.ndarray  # int [P]
  sample_B: np.ndarray  # int [B]

  @classmethod
  def of(cls, prompts, samples, rows, row_share, group):
    """Those of the packed `rows` of this process's devices, from the processes that hold them."""
    count = len(prompts.sizes)
    places = np.arange(count), np.arange(count * group)
    if jax.process_count() == 1:
      return cls(prompts, samples, *places)
    # Prompt p has the key p, sequence b the key P + b.
    receivers, values = collections.defaultdict(set), {}
    for part in rows:
      for index, row in enumerate(part):
        for b in row.tolist():
          for key in (b // group, count + b):
            receivers[key].update(row_share.holders[index % len(row_share.holders)])
    for index, prompt in enumerate(prompts.held.tolist()):
      values[prompt] = dataclasses.replace(prompts.take([index]), images=[[]], rows=[{}])
      for sample, row in enumerate(range(index * group, (index + 1) * group)):
        values[count + prompt * group + sample] = samples.tokens[row], samples.logprob[row]
    owner = shares.share(count).owner
    owner = np.concatenate([owner, np.repeat(owner, group)]).tolist()
    found = deliver(values, {key: owner[key] for key in receivers}, receivers, at_once=256)
    if not found:  # all packed rows of this process are padding
      return cls(prompts, samples, *places)
    here_P, here_B = ([key for key in sorted(found) if (key < count) == is_prompt]
                      for is_prompt in (True, False))
    for place, here in zip(places, (here_P, np.array(here_B) - count), strict=True):
      place[here] = np.arange(len(here))
    tokens, logprob = (np.stack([found[key][field] for key in here_B]) for field in (0, 1))
    return cls(PromptBatch.join([found[key] for key in here_P], prompts.tokens.shape[1],
                                prompts.shape.windows),
               samples.replace(tokens=tokens, logprob=logprob), *places)


def _row_values(sequences, layout, group):
  """Fields of PackedRows for used rows of a minibatch; units are counted within the prompt."""
  prompts, samples = sequences.prompts, sequences.samples
  real, b = layout.segment > 0, layout.sequence
  p, row = sequences.prompt_P[b // group], sequences.sample_B[b]
  t = layout.index - prompts.length[p]
  response = real & (t >= 0)
  column = np.minimum(layout.index, prompts.tokens.shape[1] - 1)
  t = np.where(response, t, 0)
  # M-RoPE counts on from the largest prompt position on all three axes.
  after = prompts.positions.max((0, 2))[p] + 1 + t
  positions = np.where(response, after, prompts.positions[:, p, column])
  tokens = np.where(response, samples.tokens[row, t], prompts.tokens[p, column])
  return {
    "segment": layout.segment, "sequence": b, "response_index": t, "response_mask": response,
    "tokens": np.where(real, tokens, 0),
    "positions": np.moveaxis(np.where(real, positions, 0), 0, 1),
    "unit": np.where(real & ~response, prompts.unit[p, column], -1),
    "sampler_logprob": np.where(response, samples.logprob[row, t], 0)}


def split_minibatches(tree, parts):
  """Splits [P, ...] into [parts, P / parts, ...]; part n has rows n, n + parts, ..."""
  return jax.tree.map(
    lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)
