import dataclasses
import types

import jax
import numpy as np
import pytest

from ares_jax.data.images import VisionShape
from ares_jax.data.prompts import PromptBatch
from ares_jax.models.codes import step_of
from ares_jax.sampling.sampler import Samples
from ares_jax.training.batch import pack
from ares_jax.training.minibatches import balance_minibatches, shares_prompts


def prompts(lengths, images=True):
  """Prompt p has `lengths[p]` tokens 10 p + 1, ...; its second token is an image's unit 3."""
  lengths = np.int32(lengths)
  column, sizes = np.arange(lengths.max()), np.zeros((len(lengths), 4), np.int64)
  sizes[:, 0] = lengths
  real = column < lengths[:, None]
  tokens = np.where(real, 10 * np.arange(len(lengths))[:, None] + 1 + column, 0).astype(np.int32)
  # The image's token has a larger height than the text behind it.
  positions = np.where(real, column + np.int32([0, 5, 0])[:, None, None] * (column == 1), 0)
  return PromptBatch(tokens, lengths, positions.astype(np.int32),
                     np.where(real & (column == 1) & images, 3, -1).astype(np.int32),
                     [[]] * len(lengths), VisionShape(1, window=56, patch=14, merge=2),
                     np.arange(len(lengths), dtype=np.int32), [{}] * len(lengths),
                     np.arange(len(lengths)), sizes)


def samples(lengths):
  """Response b has `lengths[b]` tokens 100 (b + 1), ..."""
  lengths = np.int32(lengths)
  column = np.arange(lengths.max())
  mask = column < lengths[:, None]
  tokens = np.where(mask, 100 * (1 + np.arange(len(lengths)))[:, None] + column, 0)
  value = np.where(mask, tokens / 1000, 0).astype(np.float32)
  return Samples(tokens.astype(np.int32), mask, -value, value,
                 np.full(len(mask), -1), np.zeros(len(mask), int))


def packed(prompt_lengths, lengths, **changes):
  sizes = dict(group=2, minibatch=len(lengths), microbatch=2, row_tokens=(8,), longest=6)
  return pack(prompts(prompt_lengths), samples(lengths), np.array(lengths), **sizes | changes)


def test_prompt_and_response_share_a_row_with_others():
  rows, metrics = packed([3, 2], [2, 1, 3, 1])
  # Sequences of 5, 4, 5, 3 tokens: the first two of length 5 stand with one of 3 and one alone.
  assert rows.tokens.shape == (1, 2, 2, 8) and rows.used.tolist() == [2]
  np.testing.assert_array_equal(rows.tokens[0, 0], [[1, 2, 3, 100, 101, 11, 12, 400],
                                                    [11, 12, 300, 301, 302, 0, 0, 0]])
  np.testing.assert_array_equal(rows.tokens[0, 1], [[1, 2, 3, 200, 0, 0, 0, 0], [0] * 8])
  np.testing.assert_array_equal(rows.segment[0, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2])
  np.testing.assert_array_equal(rows.sequence[0, 0, 0], [0, 0, 0, 0, 0, 3, 3, 3])
  np.testing.assert_array_equal(rows.response_index[0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0])
  np.testing.assert_array_equal(rows.response_mask[0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 1])
  # Height of the image's token is 6: the responses go on at 7 on all axes.
  np.testing.assert_array_equal(rows.positions[0, 0, 0, 1], [0, 6, 2, 7, 8, 0, 6, 7])
  np.testing.assert_array_equal(rows.positions[0, 0, 0, 0], [0, 1, 2, 7, 8, 0, 1, 7])
  np.testing.assert_allclose(rows.sampler_logprob[0, 0, 0], [0, 0, 0, -.1, -.101, 0, 0, -.4])
  # A window of 16 slots is 4 units a prompt: prompt 1's unit 3 is the minibatch's unit 7.
  np.testing.assert_array_equal(rows.unit[0, 0, 0], [-1, 3, -1, -1, -1, -1, 7, -1])
  assert metrics == {"pack/real": 17 / 32, "pack/rows": 3, "pack/row_tokens": 8}


def test_responses_in_one_row_share_their_prompt():
  rows, metrics = packed([3, 2], [2, 1, 3, 1], share_prompts=True)
  # Both groups fit a row each: the prompt without its last token, then that token and a response.
  np.testing.assert_array_equal(rows.tokens[0, 0], [[1, 2, 3, 100, 101, 3, 200, 0],
                                                    [11, 12, 300, 301, 302, 12, 400, 0]])
  np.testing.assert_array_equal(rows.segment[0, 0], [[1, 1, 2, 2, 2, 3, 3, 0],
                                                     [1, 2, 2, 2, 2, 3, 3, 0]])
  np.testing.assert_array_equal(rows.prompt_segment[0, 0], [[1, 1, 1, 1, 1, 1, 1, 0],
                                                            [1, 1, 1, 1, 1, 1, 1, 0]])
  np.testing.assert_array_equal(rows.sequence[0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0])
  np.testing.assert_array_equal(rows.response_index[0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0])
  np.testing.assert_array_equal(rows.response_mask[0, 0, 0], [0, 0, 0, 1, 1, 0, 1, 0])
  # Every response goes on where the prompt ends, and its first token has the prompt's last before.
  np.testing.assert_array_equal(rows.positions[0, 0, 0, 1], [0, 6, 2, 7, 8, 2, 7, 0])
  np.testing.assert_allclose(rows.sampler_logprob[0, 0, 0], [0, 0, 0, -.1, -.101, 0, -.2, 0])
  # The last token of prompt 1 is its image's.
  np.testing.assert_array_equal(rows.unit[0, 0], [[-1, 3, -1, -1, -1, -1, -1, -1],
                                                  [-1, 7, -1, -1, -1, 7, -1, -1]])
  assert rows.used.tolist() == [1]
  assert metrics == {"pack/real": 14 / 16, "pack/rows": 2, "pack/row_tokens": 8,
                     "pack/shared": 3 / 17}


def test_responses_behind_a_shared_prompt_begin_where_attention_can_tell():
  rows, metrics = packed([12, 11], [3, 4, 5, 6], row_tokens=(300, 600), longest=20, microbatch=1,
                         share_prompts=True)
  segment, prompt = rows.segment[0, 0, 0], rows.prompt_segment[0, 0, 0]
  begins = np.flatnonzero((segment != prompt) & (np.roll(segment, 1) != segment))
  assert metrics["pack/row_tokens"] == 300 and len(begins) == 4
  assert (begins % step_of(600) == 0).all() and step_of(600) == 4


def test_gpus_repeat_prompts(monkeypatch):
  config = types.SimpleNamespace(share_prompts=True)
  assert shares_prompts(config)
  device = types.SimpleNamespace(platform="gpu")
  monkeypatch.setattr(jax.sharding, "get_mesh", lambda: types.SimpleNamespace(
    empty=False, devices=np.array([device])))
  assert not shares_prompts(config)


def test_every_nth_prompt_is_in_a_minibatch():
  rows, _ = packed([3, 2, 4, 2], [1] * 8, minibatch=4)
  assert [sorted(set(part[mask].tolist())) for part, mask in zip(
    rows.sequence, rows.response_mask, strict=True)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
  # Prompts 0 and 2 are numbers 0 and 1 of the first minibatch.
  assert sorted(set(rows.unit[0].ravel().tolist())) == [-1, 3, 7]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_no_token_is_lost_and_the_shape_holds_the_worst_case(share_prompts):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    size, lengths = int(rng.integers(12, 30)), rng.integers(1, 9, 16)
    before = rng.integers(2, 5, 8)
    rows, metrics = packed(before, lengths, minibatch=8, row_tokens=(size,), longest=12,
                           share_prompts=share_prompts)
    total = lengths.sum() + 2 * before.sum()
    if share_prompts:
      total = round(total * (1 - metrics["pack/shared"]))
    assert (rows.segment > 0).sum() == total
    assert sorted(rows.tokens[rows.response_mask]) == sorted(samples(lengths).tokens[
      samples(lengths).mask])
    assert metrics["pack/real"] == total / (rows.used.sum() * 2 * size)
  full, _ = packed([4] * 8, [8] * 16, minibatch=8, row_tokens=(30,), longest=12,
                   share_prompts=share_prompts)
  assert full.tokens.shape[1] == 2 and full.used.tolist() == [2, 2]  # 2 sequences a row of 30


def test_of_several_row_lengths_the_one_that_pads_least_is_taken():
  _, metrics = packed([2] * 2, [4] * 4, row_tokens=(8, 12, 16), microbatch=1)
  assert metrics["pack/row_tokens"] == 12 and metrics["pack/real"] == 1


@pytest.mark.parametrize("median", [0.1, 0.15])
def test_rows_of_skewed_lengths_are_nearly_full(median):
  """The recipe of 7B with a sixteenth of its tokens: 512 prompts x 8, 128 sequences an update."""
  rng = np.random.default_rng(0)
  sizes = dict(minibatch=128, microbatch=16, row_tokens=(1280, 1408, 1536))
  # Half of a length's variance is the prompt's; the median's 99th percentile is the most at 0.15.
  normal = np.sqrt(0.5) * (rng.normal(size=(512, 1)) + rng.normal(size=(512, 8)))
  lengths_PG = np.clip(1024 * median * np.exp(0.815 * normal), 1, 1024).astype(int)
  before = np.clip(rng.lognormal(np.log(44), 0.6, 512), 2, 256).astype(int)
  order = balance_minibatches(before, lengths_PG, **sizes)
  assert sorted(order) == list(range(512))
  _, metrics = packed(before[order], lengths_PG[order].ravel(), group=8, longest=1280, **sizes)
  # Equal minibatches would leave half of their second microbatch empty at a median of 0.15.
  assert metrics["pack/real"] >= 0.95


def test_minibatches_fill_complete_microbatches():
  def split(lengths):  # of two responses of one token to each prompt
    return np.array(lengths) - 1, np.ones((len(lengths), 2), int)

  sizes = dict(minibatch=4, microbatch=1, row_tokens=(12,))
  # 24 tokens: two rows are full, however the four prompts of 2 x (5, 4, 2, 1) are split.
  assert balance_minibatches(*split([5, 4, 2, 1]), **sizes) == [0, 1, 3, 2]
  # 36 tokens are three rows: the second minibatch gets two, and the longer prompts.
  assert balance_minibatches(*split([6, 5, 4, 3]), **sizes) == [2, 0, 3, 1]
  assert balance_minibatches(*split([1, 1, 1]), **sizes | {"minibatch": 6}) == [0, 1, 2]


def test_a_sequence_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="up to 9 tokens, packed rows 8; raise row_tokens"):
    packed([3, 2], [2, 1, 3, 1], longest=9)
  with pytest.raises(ValueError, match="sequence 2 has 7 tokens, the limit is 6; raise prompt.max"):
    packed([3, 2], [2, 1, 5, 1])


def test_a_prompt_without_images_has_no_unit():
  batch = dataclasses.replace(prompts([3, 2]), unit=np.full((2, 3), -1, np.int32))
  rows, _ = pack(batch, samples([1] * 4), np.ones(4, int), group=2, minibatch=4, microbatch=2,
                 row_tokens=(8,), longest=6)
  assert (rows.unit == -1).all()
