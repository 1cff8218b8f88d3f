import functools

import jax
import numpy as np
import pytest

from ares_jax.ops.sampling import next_token

LAST = np.nextafter(np.float32(1), np.float32(0))


@functools.partial(jax.jit, static_argnames=("temperature", "top_p", "top_k"))
def drawn(logits, uniform, allowed, **how):
  return next_token(logits, uniform, allowed, **how)


def draw(prob, uniform, *, allowed=None, temperature=1.0, top_p=1.0, top_k=0):
  """What several uniforms draw from one distribution."""
  uniform = np.float32(uniform)
  logits = np.tile(np.log(np.float32(prob)), (len(uniform), 1))
  allowed = np.ones((1, len(prob)), bool) if allowed is None else np.bool_([allowed])
  return jax.tree.map(np.asarray, drawn(logits, uniform, allowed, temperature=temperature,
                                        top_p=top_p, top_k=top_k))


def test_inverts_the_cumulative_distribution():
  assert draw([0.5, 0.3, 0.2], [0.0, 0.49, 0.51, 0.79, 0.81]).token.tolist() == [0, 0, 1, 1, 2]


def test_the_second_level_continues_where_the_first_stopped():
  # 300 equal tokens, three blocks of 128, 128 and 44: token v for uniforms in [v, v+1) / 300.
  token = draw(np.full(300, 1 / 300), (np.arange(300) + 0.5) / 300).token
  np.testing.assert_array_equal(token, np.arange(300))


def test_statistics_are_of_the_whole_policy_whatever_may_be_drawn():
  entropy = -sum(p * np.log(p) for p in (0.5, 0.3, 0.2))
  for options in ({"top_p": 0.1}, {"top_k": 1}, {"allowed": [0, 1, 0]}, {"temperature": 0}):
    got = draw([0.5, 0.3, 0.2], [0.9], **options)
    np.testing.assert_allclose(got.logprob, np.log([0.5, 0.3, 0.2])[got.token], rtol=1e-5)
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-5)


@pytest.mark.parametrize("options, want", [
  ({}, {0: 0.5, 1: 0.3, 2: 0.2}), ({"top_p": 0.6}, {0: 0.625, 1: 0.375}),
  ({"top_k": 1}, {0: 1}), ({"allowed": [0, 1, 1]}, {1: 0.6, 2: 0.4}),
  ({"temperature": 0.5}, {0: 25 / 38, 1: 9 / 38, 2: 4 / 38}), ({"temperature": 0}, {0: 1})])
def test_tokens_are_drawn_with_the_shares_of_what_may_be_drawn(options, want):
  token = draw([0.5, 0.3, 0.2], (np.arange(1000) + 0.5) / 1000, **options).token
  share = np.bincount(token, minlength=3) / 1000
  np.testing.assert_allclose(share, [want.get(index, 0) for index in range(3)], atol=2e-3)


def test_a_forbidden_token_far_above_leaves_the_others_their_shares():
  prob = np.full(300, 1e-9)
  prob[:3] = 1, 6e-6, 4e-6  # 12 nats below the first: at temperature 0.1 exp(-120), 0 in float32
  token = draw(prob, (np.arange(1000) + 0.5) / 1000, allowed=[0, 1, 1] + [0] * 297,
               temperature=0.1).token
  share = 1 / (1 + (4 / 6) ** 10)
  assert set(token.tolist()) == {1, 2}
  np.testing.assert_allclose((token == 1).mean(), share, atol=2e-3)


def test_statistics_are_at_the_sampling_temperature():
  prob = np.array([0.5, 0.3, 0.2]) ** 2
  prob /= prob.sum()
  got = draw([0.5, 0.3, 0.2], [0.0], temperature=0.5)
  np.testing.assert_allclose(got.entropy, -(prob * np.log(prob)).sum(), rtol=1e-5)
  np.testing.assert_allclose(got.logprob, np.log(25 / 38), rtol=1e-5)
  greedy = draw([0.5, 0.3, 0.2], [0.0], temperature=0)
  np.testing.assert_allclose(greedy.logprob, np.log(0.5), rtol=1e-5)


@pytest.mark.parametrize("top_p, kept", [
  (1e-9, {1}), (0.4, {1}), (0.45, {1, 3}), (0.7, {1, 3}), (0.75, {0, 1, 3}),
  (0.99, {0, 1, 2, 3})])
def test_nucleus_is_the_smallest_set_that_holds_top_p(top_p, kept):
  token = draw([0.2, 0.4, 0.1, 0.3], np.linspace(0, 0.9999, 101), top_p=top_p).token
  assert set(token.tolist()) == kept


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_nucleus_is_that_of_sorting(scale):
  logits = scale * np.random.default_rng(0).normal(size=1000)
  prob = np.sort(np.exp(logits) / np.exp(logits).sum())[::-1]
  size = np.searchsorted(np.cumsum(prob), 0.9) + 1
  # The last uniform draws the last kept token in the order of ids: try each kept one as the last.
  order = np.argsort(-logits)
  for place in (size - 1, size):  # The least probable kept token, and the first that is not.
    allowed = np.ones((1, 1000), bool)
    moved = np.concatenate([np.delete(logits, order[place]), logits[order[place], None]])
    token = drawn(np.float32(moved[None]), np.float32([LAST]), allowed, temperature=1.0, top_p=0.9,
                  top_k=0).token
    assert (token[0] == 999) == (place < size)


@pytest.mark.parametrize("options", [{"top_p": 0.3}, {"top_k": 1}, {"top_k": 2}])
def test_ties_at_the_edge_are_all_kept(options):
  token = draw([0.3, 0.1, 0.3, 0.3], np.linspace(0, 0.9999, 41), **options).token
  assert set(token.tolist()) == {0, 2, 3}


def test_top_p_is_a_share_of_what_top_k_leaves():
  # Of 0.4 and 0.3, 0.4 alone holds 4/7 > 0.55.
  token = draw([0.2, 0.4, 0.1, 0.3], np.linspace(0, 0.9999, 41), top_k=2, top_p=0.55).token
  assert set(token.tolist()) == {1}


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_tokens_that_are_not_allowed_are_never_drawn(top_p):
  got = draw([0.9, 0.05, 0.05], [0.0, 0.5, LAST], allowed=[0, 1, 0], top_p=top_p)
  assert got.token.tolist() == [1, 1, 1]
  got = draw([0.9, 0.04, 0.06], [0.3], allowed=[0, 1, 1], temperature=0)
  assert got.token.tolist() == [2]


@pytest.mark.parametrize("options, kept", [({}, 300), ({"top_p": 0.8}, None), ({"top_k": 7}, 7)])
def test_frequencies_match_the_distribution(options, kept):
  draws = 40_000
  logits = 2 * np.random.default_rng(1).normal(size=300)
  want = np.exp(logits) / np.exp(logits).sum()
  order = np.argsort(-want)
  kept = kept or np.searchsorted(np.cumsum(want[order]), 0.8) + 1
  want[order[kept:]] = 0
  want /= want.sum()
  uniform = jax.random.uniform(jax.random.key(0), draws)
  counts = np.zeros(300)
  for part in uniform.reshape(8, -1):
    counts += np.bincount(draw(np.exp(logits), part, **options).token, minlength=300)
  assert not counts[want == 0].any()
  # Rare tokens together: the statistic needs 5 expected of each kind.
  rare = draws * want < 5
  expected = np.append(draws * want[~rare], draws * want[rare].sum() + 1e-9)
  got = np.append(counts[~rare], counts[rare].sum())
  freedom = len(expected) - 1
  chi_square = ((got - expected) ** 2 / expected)[expected > 1].sum()
  # Wilson and Hilferty: 0.999 quantile.
  assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
