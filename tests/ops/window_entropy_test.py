import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import entropy_threshold, hwe_cover, hwe_flags, token_entropy, window_entropy

B, T = 3, 8
ENTROPY = hnp.arrays(np.float32, (B, T), elements=st.floats(0, 8, width=32))
LENGTHS = hnp.arrays(np.int32, B, elements=st.integers(0, T))
few = settings(max_examples=25, deadline=None)


def prefix(length_B, columns=T):
  return np.arange(columns)[None] < np.asarray(length_B)[:, None]


@jax.jit
def all_ops(entropy_BT, mask_BT, semantic_BT):
  """What a training step takes from this file."""
  mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=3)
  threshold, quantile_B = entropy_threshold(mean_BT, whole_BT)
  median, _ = entropy_threshold(entropy_BT, mask_BT, reduce="median", quantile=0.5)
  flags = {
    name: hwe_flags(
      entropy_BT, mask_BT, jnp.float32(2), window=3, detector=name, semantic_BT=semantic_BT
    )
    for name in ("window", "semantic", "trigger")
  }
  cover = hwe_cover(flags["window"], mask_BT, window=3)
  tokens = dict(mean=mean_BT, whole=whole_BT, cover=cover, **flags)
  return tokens, dict(quantile=quantile_B), dict(threshold=threshold, median=median)


def test_is_the_mean_of_the_next_window_tokens():
  entropy_BT, mask_BT = np.float32([[1, 2, 3, 4, 100]]), np.bool_([[1, 1, 1, 1, 0]])
  mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=2)
  np.testing.assert_allclose(mean_BT, [[1.5, 2.5, 3.5, 0, 0]])
  np.testing.assert_array_equal(whole_BT, [[True, True, True, False, False]])


def test_a_window_never_reaches_back_into_the_prompt():
  entropy_BT, mask_BT = np.float32([[9, 1, 2, 3, 9]]), np.bool_([[0, 1, 1, 1, 0]])
  mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=3)
  np.testing.assert_allclose(mean_BT, [[0, 2, 0, 0, 0]])
  np.testing.assert_array_equal(whole_BT, [[False, True, False, False, False]])


def test_window_of_one_is_the_entropy_itself():
  entropy_BT = np.float32([[1, 2, 3]])
  np.testing.assert_array_equal(
    window_entropy(entropy_BT, prefix([2], 3), window=1)[0], [[1, 2, 0]]
  )


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_rows_shorter_than_the_window_have_none(columns):
  ones_BT = np.ones((2, columns), np.float32)
  mean_BT, whole_BT = window_entropy(ones_BT, ones_BT > 0, window=4)
  assert mean_BT.shape == whole_BT.shape == (2, columns)
  assert not np.any(mean_BT) and not np.any(whole_BT)
  threshold, quantile_B = entropy_threshold(mean_BT, whole_BT)
  assert threshold == 0 and not np.any(quantile_B)
  assert not np.any(hwe_flags(ones_BT, ones_BT > 0, np.float32(0), window=4))


def test_nan_outside_the_response_stays_there():
  entropy_BT, mask_BT = np.float32([[1, 3, np.nan, np.inf]]), prefix([2], 4)
  tokens, rows, scalars = all_ops(entropy_BT, mask_BT, mask_BT)
  assert all(np.all(np.isfinite(x)) for x in (*tokens.values(), *rows.values(), *scalars.values()))
  gradient_BT = jax.grad(lambda x: window_entropy(x, mask_BT, window=2)[0].sum())(entropy_BT)
  np.testing.assert_allclose(gradient_BT, [[0.5, 0.5, 0, 0]])


def test_float32_error_at_16384_tokens_is_what_the_docstring_says():
  entropy_BT = np.random.default_rng(0).uniform(0, 12, (64, 16384)).astype(np.float32)
  for window, error in ((4, 1.2e-6), (32, 2.6e-6)):
    mean_BT, whole_BT = window_entropy(entropy_BT, entropy_BT >= 0, window=window)
    exact = np.lib.stride_tricks.sliding_window_view(np.float64(entropy_BT), window, 1).mean(-1)
    assert np.all(np.asarray(whole_BT).sum(1) == exact.shape[1])
    assert np.abs(np.asarray(mean_BT)[:, : exact.shape[1]] - exact).max() < 1.1 * error


def test_quantile_is_exact_where_16384_values_jump_by_nats():
  # 0.95 of 16,383 steps is rank 15,563.85: 85% of the way from 0 to 10 nats.
  value_BT = np.float32([[0] * 15564 + [10] * 820])
  quantile_B = entropy_threshold(value_BT, np.ones(value_BT.shape, bool), quantile=0.95)[1]
  np.testing.assert_allclose(quantile_B, [8.5], rtol=1e-6)


def test_threshold_is_the_mean_or_median_of_the_rows_quantiles():
  value_BT = np.float32([[0, 1, 2, 3, 4], [10, 20, 0, 0, 0], [50, 0, 0, 0, 0], [7, 7, 7, 7, 7]])
  mask_BT = np.arange(5)[None] < np.array([[5], [2], [1], [0]])
  threshold, quantile_B = entropy_threshold(value_BT, mask_BT, quantile=0.25)
  np.testing.assert_allclose(quantile_B, [1, 12.5, 50, 0])
  np.testing.assert_allclose(threshold, (1 + 12.5 + 50) / 3, rtol=1e-6)
  assert entropy_threshold(value_BT, mask_BT, quantile=0.25, reduce="median")[0] == 12.5
  assert entropy_threshold(value_BT[[0, 1, 3]], mask_BT[[0, 1, 3]], quantile=0.25,
                           reduce="median")[0] == (1 + 12.5) / 2


@few
@given(ENTROPY, LENGTHS)
def test_threshold_is_numpys_quantile(value_BT, length_B):
  quantile_B = entropy_threshold(value_BT, prefix(length_B), quantile=0.95)[1]
  expected_B = [
    np.quantile(np.float64(row[:length]), 0.95) if length else 0
    for row, length in zip(value_BT, length_B, strict=True)
  ]
  np.testing.assert_allclose(quantile_B, expected_B, rtol=1e-5, atol=1e-5)


def release_case(case, columns=64):
  """Entropies [1, columns] of the release's top 10 and its tail, their mask, the triggers."""
  logprob_TK = np.float64(case["topk_logprobs"])
  length = len(logprob_TK)
  tail_T1 = np.maximum(1e-12, 1 - np.exp(logprob_TK).sum(1, keepdims=True))
  logits_TV = np.float32(np.concatenate([logprob_TK, np.log(tail_T1)], 1))
  logits_TV = np.pad(logits_TV, ((0, columns - length), (0, 0)))
  trigger_BT = np.zeros((1, columns), bool)
  trigger_BT[0, :length] = case["argmax_is_trigger"]
  return np.asarray(token_entropy(logits_TV[None])), prefix([length], columns), trigger_BT


def test_trigger_detector_matches_the_release(release):
  seen = 0
  for case in release["release_window_entropy"]:
    entropy_BT, mask_BT, trigger_BT = release_case(case)
    window, tau = case["window"], case["threshold"]

    def flags(tau, window=window, arrays=(entropy_BT, mask_BT), trigger_BT=trigger_BT):
      return np.asarray(hwe_flags(*arrays, np.float32(tau), window=window, detector="trigger",
                                  semantic_BT=trigger_BT))

    valid_BT = flags(tau)
    assert valid_BT.sum() == case["n_valid"]
    assert flags(0).sum() - valid_BT.sum() == case["n_invalid"]
    mean_BT = np.asarray(window_entropy(entropy_BT, mask_BT, window=window)[0])
    excess = (mean_BT[:, 1:] - tau)[valid_BT[:, :-1]].sum()
    np.testing.assert_allclose(excess, case["soft_cost"], rtol=1e-5, atol=1e-5)
    seen += valid_BT.sum()
  assert seen > 50


def test_quantile_of_window_means_matches_the_release(release):
  # The release leaves the tail out of this one entropy, starts each window at the next token and
  # counts zeros past the end: windows 1..T of the response and `window` zeros.
  for case in release["release_window_entropy"]:
    logprob_TK, window = np.float64(case["topk_logprobs"]), case["window"]
    length = len(logprob_TK)
    entropy_BT = np.zeros((1, 80), np.float32)
    entropy_BT[0, :length] = -(np.exp(logprob_TK) * logprob_TK).sum(1)
    mask_BT = prefix([length + window], 80)
    mean_BT, whole_BT = map(np.asarray, window_entropy(entropy_BT, mask_BT, window=window))
    threshold, _ = entropy_threshold(mean_BT[:, 1:], whole_BT[:, 1:])
    np.testing.assert_allclose(
      threshold, case["percentile95_of_following_window_mean"], rtol=1e-5
    )


def test_three_detectors_on_one_sentence():
  entropy_BT = np.float32([[0, 3, 1, 2, 2, 0, 3, 3]])
  mask_BT, semantic_BT = prefix([7]), np.bool_([[1, 1, 1, 0, 0, 0, 1, 1]])

  def flags(detector, tau=2):
    return hwe_flags(entropy_BT, mask_BT, np.float32(tau), window=2, detector=detector,
                     semantic_BT=semantic_BT)[0].astype(int).tolist()

  # Means from each token: 1.5 2 1.5 2 1 1.5, then no window.
  assert flags("window") == [0, 1, 0, 1, 0, 0, 0, 0]
  assert flags("semantic") == [0, 1, 0, 0, 0, 0, 1, 0]
  assert flags("trigger") == [1, 0, 1, 0, 0, 0, 0, 0]
  # At tau 0 every token that can be flagged is: windows must still be whole.
  assert flags("window", 0) == [1, 1, 1, 1, 1, 1, 0, 0]
  assert flags("trigger", 0) == [1, 1, 1, 0, 0, 0, 0, 0]


def test_threshold_may_differ_by_row():
  entropy_BT = np.ones((2, 3), np.float32)
  flag_BT = hwe_flags(entropy_BT, entropy_BT > 0, np.float32([0.5, 1.5]), window=2)
  np.testing.assert_array_equal(flag_BT, [[True, True, False], [False] * 3])


def test_a_mean_hardly_exceeds_the_quantile_of_single_tokens():
  # Why tau is a quantile of window means: 4 independent tokens rarely average to a top 5% one.
  entropy_BT = np.random.default_rng(0).gamma(0.25, 1.0, (16, 512)).astype(np.float32)
  mask_BT = entropy_BT >= 0
  mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=4)
  printed, _ = entropy_threshold(entropy_BT, mask_BT)
  ours, _ = entropy_threshold(mean_BT, whole_BT)
  shares = [hwe_flags(entropy_BT, mask_BT, tau, window=4).mean() for tau in (printed, ours)]
  assert shares[0] < 0.015 and 0.04 < shares[1] < 0.06


def test_cover_is_the_union_of_flagged_windows_within_the_response():
  flag_BT = np.bool_([[1, 0, 0, 0, 1, 1, 0, 0]])
  cover_BT = hwe_cover(flag_BT, prefix([7]), window=3)
  np.testing.assert_array_equal(cover_BT, np.bool_([[1, 1, 1, 0, 1, 1, 1, 0]]))
  np.testing.assert_array_equal(hwe_cover(flag_BT, prefix([7]), window=1), flag_BT)
  assert not np.any(hwe_cover(flag_BT, prefix([0]), window=3))


@few
@given(ENTROPY, LENGTHS, st.integers(1, 5))
def test_padding_columns_and_rows_change_nothing(entropy_BT, length_B, seed):
  mask_BT = prefix(length_B)
  semantic_BT = np.random.default_rng(seed).random((B, T)) < 0.5
  tokens, rows, scalars = all_ops(entropy_BT, mask_BT, semantic_BT)
  pad = ((0, 2), (0, 5))
  wide, more, same = all_ops(
    np.pad(entropy_BT, pad, constant_values=7), np.pad(mask_BT, pad), np.pad(semantic_BT, pad)
  )
  for name in tokens:
    np.testing.assert_array_equal(wide[name][:B, :T], tokens[name], err_msg=name)
    assert not np.any(wide[name][B:]) and not np.any(wide[name][:, T:])
  np.testing.assert_array_equal(more["quantile"][:B], rows["quantile"])
  for name in scalars:
    np.testing.assert_allclose(same[name], scalars[name], rtol=1e-6)


@few
@given(ENTROPY, LENGTHS, st.permutations(range(B)))
def test_permuting_rows_permutes_results(entropy_BT, length_B, order):
  mask_BT, order = prefix(length_B), np.array(order)
  semantic_BT = entropy_BT > 1
  tokens, rows, scalars = all_ops(entropy_BT, mask_BT, semantic_BT)
  moved, moved_rows, same = all_ops(entropy_BT[order], mask_BT[order], semantic_BT[order])
  for name in tokens:
    np.testing.assert_array_equal(moved[name], tokens[name][order])
  np.testing.assert_array_equal(moved_rows["quantile"], rows["quantile"][order])
  for name in scalars:
    np.testing.assert_allclose(same[name], scalars[name], rtol=1e-6)


def test_sharded_over_4_devices_equals_unsharded(mesh):
  rng = np.random.default_rng(0)
  entropy_BT = rng.gamma(1.0, 2.0, (8, 16)).astype(np.float32)
  arguments = entropy_BT, prefix(rng.integers(0, 17, 8), 16), rng.random((8, 16)) < 0.5
  expected = all_ops(*arguments)
  sharded = all_ops(*(jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arguments))
  for x in (*sharded[0].values(), sharded[1]["quantile"]):
    assert x.sharding.spec[0] == "data"
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), sharded, expected)


def test_bfloat16_entropies_give_float32_statistics():
  entropy_BT = jnp.asarray(np.random.default_rng(0).gamma(1.0, 2.0, (B, T)), jnp.bfloat16)
  mask_BT, semantic_BT = prefix([8, 5, 2]), prefix([3, 2, 8])
  narrow = all_ops(entropy_BT, mask_BT, semantic_BT)
  assert narrow[0]["mean"].dtype == narrow[1]["quantile"].dtype == jnp.float32
  assert narrow[2]["threshold"].dtype == jnp.float32
  wide = all_ops(entropy_BT.astype(jnp.float32), mask_BT, semantic_BT)
  jax.tree.map(np.testing.assert_array_equal, narrow, wide)


VALUE, MASK = np.zeros((2, 3), np.float32), np.zeros((2, 3), bool)


@pytest.mark.parametrize(
  "call,message",
  [
    (lambda: window_entropy(VALUE, MASK, window=0), "window = 0 must be an integer >= 1"),
    (lambda: window_entropy(VALUE, MASK, window=2.0), "window = 2.0"),
    (lambda: window_entropy(VALUE, VALUE, window=2), r"float32\(2, 3\); pass bool\(2, 3\)"),
    (lambda: window_entropy(VALUE, MASK[:1], window=2), r"bool\(1, 3\); pass bool\(2, 3\)"),
    (lambda: window_entropy(VALUE[0], MASK[0], window=2), r"float32\(3,\); pass floating \[B, T"),
    (lambda: window_entropy(MASK, MASK, window=2), "values are bool"),
    (lambda: entropy_threshold(VALUE, MASK, quantile=95), r"quantile = 95 must be in \[0, 1\]"),
    (lambda: entropy_threshold(VALUE, MASK, reduce="max"), "reduce = 'max' must be"),
    (lambda: hwe_flags(VALUE, MASK, 1.0, window=2, detector="word"), "detector = 'word' must be"),
    (lambda: hwe_flags(VALUE, MASK, 1.0, window=2, detector="trigger"), "needs semantic_BT"),
    (lambda: hwe_flags(VALUE, MASK, np.ones(3), window=2), r"shape \(3,\).*2 rows"),
    (
      lambda: hwe_flags(VALUE, MASK, 1.0, window=2, detector="semantic", semantic_BT=MASK[:1]),
      r"semantic_BT is bool\(1, 3\)",
    ),
    (lambda: hwe_cover(VALUE, MASK, window=2), "flag_BT is float32"),
    (lambda: hwe_cover(MASK, MASK, window=0), "window = 0"),
  ],
)
def test_wrong_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
