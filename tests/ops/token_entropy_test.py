import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import logprob_and_entropy, token_entropy
from ares_jax.system import mesh as mesh_lib

# token_chunk, vocab_chunk, temperature. (N, V) = (6, 11) in one piece; in pieces of the vocabulary
# with a short last one; of tokens with one token of padding; of both.
CUTS = [(2048, 4096, 0.7), (8, 4, 0.7), (4, 11, 1.0), (4, 4, 0.7)]


def reference(hidden_ND, unembed_VD, token_N, temperature=1.0):
  """float64, the plain formula."""
  logits_NV = np.float64(hidden_ND) @ np.float64(unembed_VD).T / temperature
  logits_NV = logits_NV - logits_NV.max(1, keepdims=True)
  logprob_NV = logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True))
  entropy_N = -(np.exp(logprob_NV) * logprob_NV).sum(1)
  return logprob_NV[np.arange(len(token_N)), token_N], entropy_N


def example(tokens=6, embed=3, vocab=11, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  hidden_ND = np.float32(scale * rng.normal(size=(tokens, embed)))
  unembed_VD = np.float32(rng.normal(size=(vocab, embed)))
  return hidden_ND, unembed_VD, np.int32(rng.integers(0, vocab, tokens))


def finite_differences(function, x, step=1e-5):
  gradient = np.zeros(x.shape)
  for index in np.ndindex(*x.shape):
    up, down = np.float64(x), np.float64(x)
    up[index] += step
    down[index] -= step
    gradient[index] = (function(up) - function(down)) / (2 * step)
  return gradient


def test_entropy_of_n_equal_tokens_is_ln_n():
  logits_BTV = np.zeros((1, 2, 8), np.float32)
  logits_BTV[0, 1, 2:] = -np.inf
  np.testing.assert_allclose(token_entropy(logits_BTV), [[np.log(8), np.log(2)]], rtol=1e-6)


def test_entropy_of_a_coin_with_odds_3_to_1():
  entropy = token_entropy(np.log(np.float32([3, 1])))
  np.testing.assert_allclose(entropy, 0.75 * np.log(4 / 3) + 0.25 * np.log(4), rtol=1e-6)


def test_temperature_divides_the_logits():
  logits_BTV = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  np.testing.assert_allclose(
    token_entropy(logits_BTV, temperature=0.5), token_entropy(2 * logits_BTV), rtol=1e-6
  )


def test_entropy_is_never_negative_and_ignores_a_shift():
  logits_BTV = np.float32([[0, -30, -60], [1000, 999, 0], [-1e4, 0, 1e4]])
  entropy_BT = token_entropy(logits_BTV)
  assert np.all(entropy_BT >= 0) and np.all(np.isfinite(entropy_BT))
  np.testing.assert_allclose(entropy_BT, token_entropy(logits_BTV + 4096), atol=1e-6)


def test_matches_the_release_entropy_of_its_top_10_and_a_tail(release):
  for case in release["release_window_entropy"]:
    logprob_TK = np.float64(case["topk_logprobs"])
    tail_T1 = np.maximum(1e-12, 1 - np.exp(logprob_TK).sum(1, keepdims=True))
    logits_TV = np.zeros((64, logprob_TK.shape[1] + 1), np.float32)
    logits_TV[: len(logprob_TK)] = np.concatenate([logprob_TK, np.log(tail_T1)], 1)
    mean = np.asarray(token_entropy(logits_TV))[: len(logprob_TK)].mean()
    np.testing.assert_allclose(mean, case["mean_tail_corrected_entropy"], atol=1e-5)


def test_entropy_gradient_matches_finite_differences_and_is_0_at_impossible_tokens():
  logits_V = np.float32([0.3, -1.2, 2.0, -np.inf, 0.0])

  def entropy(logits_V):
    p_V = np.exp(logits_V) / np.exp(logits_V).sum()
    return -sum(p * np.log(p) for p in p_V if p > 0)

  gradient_V = jax.grad(lambda x: token_entropy(x))(logits_V)
  assert gradient_V[3] == 0
  possible = [0, 1, 2, 4]
  np.testing.assert_allclose(
    gradient_V[np.array(possible)], finite_differences(entropy, logits_V[possible]), atol=1e-6
  )


def test_logprob_and_entropy_of_odds_3_to_1():
  hidden_ND, unembed_VD = np.float32([[1]]), np.log(np.float32([[3], [1]]))
  for token, p in ((0, 0.75), (1, 0.25)):
    logprob_N, entropy_N = logprob_and_entropy(hidden_ND, unembed_VD, np.int32([token]))
    np.testing.assert_allclose(logprob_N, [np.log(p)], rtol=1e-6)
    np.testing.assert_allclose(entropy_N, token_entropy(np.log(np.float32([[3, 1]]))), rtol=1e-6)


@pytest.mark.parametrize("token_chunk,vocab_chunk,temperature", CUTS)
def test_logprob_and_entropy_match_float64_however_cut(token_chunk, vocab_chunk, temperature):
  case = example(scale=3.0)
  ours = logprob_and_entropy(
    *case, temperature=temperature, token_chunk=token_chunk, vocab_chunk=vocab_chunk
  )
  for value_N, expected_N in zip(ours, reference(*case, temperature), strict=True):
    assert value_N.dtype == np.float32
    np.testing.assert_allclose(value_N, expected_N, atol=3e-6)


@pytest.mark.parametrize("token_chunk,vocab_chunk,temperature", CUTS)
def test_gradients_match_float64_finite_differences(token_chunk, vocab_chunk, temperature):
  hidden_ND, unembed_VD, token_N = example()
  weight_N, other_N = np.random.default_rng(1).normal(size=(2, 6))

  def loss(hidden_ND, unembed_VD, function, **kwargs):
    logprob_N, entropy_N = function(hidden_ND, unembed_VD, token_N, **kwargs)
    return (logprob_N * weight_N).sum() + (entropy_N * other_N).sum()

  ours = functools.partial(
    logprob_and_entropy, temperature=temperature, token_chunk=token_chunk, vocab_chunk=vocab_chunk
  )
  plain = functools.partial(reference, temperature=temperature)
  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  gradient_ND, gradient_VD = gradient(hidden_ND, unembed_VD, ours)
  expected_ND = finite_differences(lambda x: loss(x, unembed_VD, plain), hidden_ND)
  expected_VD = finite_differences(lambda x: loss(hidden_ND, x, plain), unembed_VD)
  np.testing.assert_allclose(gradient_ND, expected_ND, atol=2e-5)
  np.testing.assert_allclose(gradient_VD, expected_VD, atol=2e-5)


@pytest.mark.parametrize("token_chunk,vocab_chunk", [(2048, 4096), (2, 4), (4, 11)])
@pytest.mark.parametrize("wanted", ["010110", "000000", "111111"])
def test_only_wanted_tokens_have_results_and_gradients(token_chunk, vocab_chunk, wanted):
  hidden_ND, unembed_VD, token_N = example()
  wanted_N = np.array(list(wanted)) == "1"
  weight_N, other_N = np.random.default_rng(1).normal(size=(2, 6))

  def loss(hidden_ND, unembed_VD, wanted_N, keep_N):
    both = logprob_and_entropy(hidden_ND, unembed_VD, token_N, wanted_N, token_chunk=token_chunk,
                               vocab_chunk=vocab_chunk)
    both = [jnp.where(keep_N, x, 0) for x in both]
    return both[0] @ weight_N + both[1] @ other_N, both

  pull = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  got = pull(hidden_ND, unembed_VD, wanted_N, np.ones(6, bool))
  for value, expected in zip(jax.tree.leaves(got),
                             jax.tree.leaves(pull(hidden_ND, unembed_VD, None, wanted_N)),
                             strict=True):
    np.testing.assert_allclose(value, expected, atol=2e-6)


def test_chunks_without_wanted_tokens_are_not_computed():
  hidden_ND, unembed_VD, token_N = example(tokens=8)
  wanted_N = np.arange(8) % 4 == 1  # two of 8: one chunk of 2, if they come first

  def finite(bad_N):
    # Nan in what is computed makes the gradient of the unembedding nan, even with a slope of 0.
    hidden = np.where(bad_N[:, None], np.nan, hidden_ND)
    return np.isfinite(jax.grad(lambda unembed_VD: logprob_and_entropy(
      hidden, unembed_VD, token_N, wanted_N, token_chunk=2, vocab_chunk=4)[0].sum())(
        unembed_VD)).all()

  assert finite(~wanted_N)
  assert not finite(wanted_N)


@pytest.mark.parametrize("token_chunk,vocab_chunk", [(2048, 4096), (4, 4)])
def test_far_apart_logits_stay_finite_and_exact(token_chunk, vocab_chunk):
  # The maximum comes first, in the middle and last: the running one must move or stay.
  unembed_VD = np.float32([[300], [0], [-300], [200], [1], [299], [7], [-1], [-2], [5], [3]])
  hidden_ND = np.float32([[1], [-1], [0.01], [0]])
  token_N = np.int32([5, 2, 0, 10])

  def both(hidden_ND):
    return logprob_and_entropy(
      hidden_ND, unembed_VD, token_N, token_chunk=token_chunk, vocab_chunk=vocab_chunk
    )

  for value_N, expected_N in zip(both(hidden_ND), reference(hidden_ND, unembed_VD, token_N),
                                 strict=True):
    np.testing.assert_allclose(value_N, expected_N, atol=2e-5)
  gradient_ND = jax.grad(lambda x: both(x)[0].sum() + both(x)[1].sum())(hidden_ND)
  assert np.all(np.isfinite(gradient_ND))


def test_padding_tokens_change_nothing():
  hidden_ND, unembed_VD, token_N = example()
  padded = logprob_and_entropy(
    np.pad(hidden_ND, ((0, 5), (0, 0))), unembed_VD, np.pad(token_N, (0, 5)),
    token_chunk=4, vocab_chunk=4,
  )
  for value_N, expected_N in zip(
    padded, logprob_and_entropy(hidden_ND, unembed_VD, token_N), strict=True
  ):
    np.testing.assert_allclose(value_N[:6], expected_N, atol=1e-6)


def test_no_tokens_give_no_values():
  hidden_ND, unembed_VD, token_N = example(tokens=0)
  assert [x.shape for x in logprob_and_entropy(hidden_ND, unembed_VD, token_N)] == [(0,), (0,)]


@pytest.mark.parametrize("token_chunk,vocab_chunk", [(2048, 4096), (4, 4)])
def test_bfloat16_in_gives_float32_statistics_and_bfloat16_gradients(token_chunk, vocab_chunk):
  hidden_ND, unembed_VD, token_N = example(tokens=8)
  hidden_ND, unembed_VD = (jnp.asarray(x, jnp.bfloat16) for x in (hidden_ND, unembed_VD))
  wide = (np.asarray(x, np.float32) for x in (hidden_ND, unembed_VD))

  def both(hidden_ND, unembed_VD):
    return logprob_and_entropy(
      hidden_ND, unembed_VD, token_N, token_chunk=token_chunk, vocab_chunk=vocab_chunk
    )

  for value_N, expected_N in zip(
    both(hidden_ND, unembed_VD), reference(*wide, token_N), strict=True
  ):
    assert value_N.dtype == jnp.float32
    np.testing.assert_allclose(value_N, expected_N, atol=3e-6)
  gradients = jax.jit(jax.grad(lambda h, u: both(h, u)[0].sum(), (0, 1)))(hidden_ND, unembed_VD)
  assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.bfloat16]
  # A float32 unembedding is cast chunk by chunk, its gradient is summed in float32.
  entropy = lambda u: both(hidden_ND, u)[1].sum()  # noqa: E731
  gradient_VD = jax.jit(jax.grad(entropy))(np.asarray(unembed_VD, np.float32))
  assert gradient_VD.dtype == jnp.float32
  assert np.any(gradient_VD != gradient_VD.astype(jnp.bfloat16).astype(jnp.float32))
  # CPUs round nothing in between: that every product asks for float32 shows in the program only.
  program = str(jax.make_jaxpr(jax.grad(entropy))(unembed_VD))
  assert program.count("preferred_element_type=float32") == program.count("dot_general") > 0


@pytest.mark.parametrize("token_chunk,vocab_chunk", [(2048, 4096), (4, 4)])
@pytest.mark.parametrize("spec", [("data", None), (None, "data")])
def test_sharded_over_4_devices_equals_unsharded(mesh, spec, token_chunk, vocab_chunk):
  hidden_ND, unembed_VD, token_N = example(tokens=16, embed=4, vocab=12)

  def loss(hidden_ND, unembed_VD, token_N):
    both = logprob_and_entropy(
      hidden_ND, unembed_VD, token_N, token_chunk=token_chunk, vocab_chunk=vocab_chunk
    )
    return both[0].sum() - 2 * both[1].sum(), both

  step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  expected = step(hidden_ND, unembed_VD, token_N)
  put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
  sharded = step(put(hidden_ND, spec[0]), put(unembed_VD, spec[1]), put(token_N, spec[0]))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), sharded, expected)


def test_no_program_holds_all_logits():
  tokens, embed, vocab = 512, 8, 4096
  shapes = [((tokens, embed), jnp.float32), ((vocab, embed), jnp.float32), ((tokens,), jnp.int32)]
  arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

  def loss(hidden_ND, unembed_VD, token_N):
    logprob_N, entropy_N = logprob_and_entropy(
      hidden_ND, unembed_VD, token_N, token_chunk=64, vocab_chunk=256
    )
    return logprob_N.sum() + entropy_N.sum()

  for function in (loss, jax.grad(loss, (0, 1))):
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    # 4 chunks of 64 KiB; one [N, V] would be 8 MiB.
    assert memory.temp_size_in_bytes < 4 * 64 * 256 * 4


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(hidden_ND=np.zeros((2, 3, 4), np.float32)), r"\(2, 3, 4\).*flatten"),
    (dict(token_N=np.zeros(5, np.int32)), r"token \(5,\)"),
    (dict(unembed_VD=np.zeros((11, 4), np.float32)), r"\(11, 4\) must share D"),
    (dict(hidden_ND=np.zeros((6, 3), np.int32)), "hidden_ND has dtype int32; pass float32"),
    (dict(token_N=np.zeros(6, np.float32)), "token_N has dtype float32; pass integers"),
    (dict(temperature=0.0), "temperature = 0.0 must be > 0"),
    (dict(token_chunk=0), "token_chunk = 0 must be > 0"),
  ],
)
def test_wrong_arguments_of_logprob_and_entropy(change, message):
  hidden_ND, unembed_VD, token_N = example()
  arguments = dict(hidden_ND=hidden_ND, unembed_VD=unembed_VD, token_N=token_N) | change
  with pytest.raises(ValueError, match=message):
    logprob_and_entropy(**arguments)


def test_wrong_arguments_of_token_entropy():
  with pytest.raises(ValueError, match="last axis must be the vocabulary"):
    token_entropy(np.float32(1))
  with pytest.raises(ValueError, match="dtype int32"):
    token_entropy(np.zeros((2, 3), np.int32))
  with pytest.raises(ValueError, match="temperature = -1"):
    token_entropy(np.zeros((2, 3), np.float32), temperature=-1.0)


def test_token_entropy_of_bfloat16_is_float32_and_sharded_equals_unsharded(mesh):
  logits_BTV = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)), jnp.bfloat16)
  entropy_BT = token_entropy(logits_BTV)
  assert entropy_BT.dtype == jnp.float32
  np.testing.assert_array_equal(entropy_BT, token_entropy(logits_BTV.astype(jnp.float32)))
  sharded = token_entropy(jax.device_put(logits_BTV, NamedSharding(mesh, P("data"))))
  assert sharded.sharding.spec[0] == "data"
  np.testing.assert_allclose(sharded, entropy_BT, atol=1e-6)


def test_runs_under_a_two_axis_mesh():
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  hidden_ND, unembed_VD, token_N = example(tokens=8, embed=4, vocab=12)
  expected = logprob_and_entropy(hidden_ND, unembed_VD, token_N)
  put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
  sharded = logprob_and_entropy(
    put(hidden_ND, "data"), put(unembed_VD, "model", "data"), put(token_N, "data"),
    token_chunk=4, vocab_chunk=4,
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), sharded, expected)


def test_a_vocabulary_split_over_two_devices_by_hand():
  # Odds 3 to 1, one of the two tokens on each device.
  mesh = jax.make_mesh((1, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:2])
  hidden_ND, unembed_VD = np.ones((2, 1), np.float32), np.log(np.float32([[3], [1]]))
  with jax.set_mesh(mesh):
    logprob_N, entropy_N = logprob_and_entropy(
      hidden_ND, unembed_VD, np.int32([0, 1]), axes=("data", "model")
    )
  np.testing.assert_allclose(logprob_N, np.log([0.75, 0.25]), rtol=1e-6)
  np.testing.assert_allclose(entropy_N, [0.5623351] * 2, rtol=1e-6)


@pytest.mark.parametrize("token_chunk,vocab_chunk", [(2048, 4096), (3, 4)])
@pytest.mark.parametrize(
  "shape,axes",
  [
    ((1, 1), ("data", "model")),
    ((1, 2), ("data", "model")),
    ((1, 4), ("data", "model")),
    ((2, 2), ("data", "model")),
    ((4, 1), ("data", "model")),
    ((2, 2), (None, "model")),
    ((4, 1), ("data", None)),
  ],
)
def test_split_over_1_2_and_4_devices_equals_unsplit(shape, axes, token_chunk, vocab_chunk):
  # 14 tokens over 4 devices need padding; 5 columns do not divide over 2 devices.
  for embed in (4, 5) if axes[0] and shape == (2, 2) else (4,):
    hidden_ND, unembed_VD, token_N = example(tokens=14, embed=embed, vocab=20)
    weight_N, other_N = np.float32(np.random.default_rng(1).normal(size=(2, 14)))

    def loss(hidden_ND, unembed_VD, token_N, axes, weight_N=weight_N, other_N=other_N):
      both = logprob_and_entropy(
        hidden_ND, unembed_VD, token_N, temperature=0.7, token_chunk=token_chunk,
        vocab_chunk=vocab_chunk, axes=axes,
      )
      return (both[0] * weight_N + both[1] * other_N).sum(), both

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=3)
    expected = step(hidden_ND, unembed_VD, token_N, None)
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices)
    with jax.set_mesh(mesh):
      split = step(hidden_ND, unembed_VD, token_N, axes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), split, expected)


@pytest.fixture(scope="module")
def far_apart():
  """Arrays of 16 tokens, all 5 wanted ones in the first half, and their results on one device."""
  case = example(tokens=16, embed=4, vocab=24)
  wanted_N, slopes_2N = np.isin(np.arange(16), (0, 1, 2, 3, 5)), np.random.default_rng(1).normal(
    size=(2, 16))
  arrays = *case, wanted_N, *np.float32(slopes_2N)
  return arrays, jax.jit(functools.partial(pull_wanted, None))(*arrays)


def pull_wanted(axes, hidden_ND, unembed_VD, token_N, wanted_N, weight_N, other_N):
  """Both outputs and gradients, in chunks of two tokens."""
  def loss(hidden_ND, unembed_VD):
    both = logprob_and_entropy(hidden_ND, unembed_VD, token_N, wanted_N, token_chunk=2,
                               vocab_chunk=4, axes=axes)
    return both[0] @ weight_N + both[1] @ other_N, both

  gradients, both = jax.grad(loss, (0, 1), has_aux=True)(hidden_ND, unembed_VD)
  return both, gradients


def test_devices_with_other_numbers_of_wanted_tokens_equal_one(far_apart):
  arrays, expected = far_apart
  with jax.set_mesh(mesh_lib.make_mesh(2, 2)):
    got = jax.jit(functools.partial(pull_wanted, ("data", "model")))(*arrays)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


def test_slices_with_other_numbers_of_wanted_tokens_equal_one(far_apart):
  (hidden_ND, unembed_VD, *of_tokens), expected = far_apart

  def own(hidden_ND, *of_tokens):
    axes = mesh_lib.unmapped(mesh_lib.ROWS), "model"
    both, gradients = pull_wanted(axes, hidden_ND, unembed_VD, *of_tokens)
    return gradients[1], both[1].max()

  with jax.set_mesh(mesh_lib.make_mesh(1, 2, slices=2)):
    traced = jax.jit(mesh_lib.sum_of_slices(own, (0,) * 5)).trace(hidden_ND, *of_tokens)
    gradient_VD, entropy = traced.lower().compile()(hidden_ND, *of_tokens)
  np.testing.assert_allclose(gradient_VD, expected[1][1], atol=1e-5)
  np.testing.assert_allclose(entropy, expected[0][1].max(), atol=1e-6)
  # A loop with an end for each slice would choose between whole gradients after every chunk.
  assert "while[" in str(traced.jaxpr) and "bool[1] = lt" not in str(traced.jaxpr)


def test_split_bfloat16_has_float32_statistics_and_gradients_of_its_inputs_dtype():
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  hidden_ND, unembed_VD, token_N = example(tokens=8, embed=4, vocab=20)
  hidden_ND = jnp.asarray(hidden_ND, jnp.bfloat16)

  def loss(hidden_ND, unembed_VD, axes):
    both = logprob_and_entropy(
      hidden_ND, unembed_VD, token_N, token_chunk=2, vocab_chunk=4, axes=axes
    )
    return both[0].sum() + both[1].sum(), both

  step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
  (_, expected), expected_gradients = step(hidden_ND, unembed_VD, None)
  with jax.set_mesh(mesh):
    (_, split), gradients = step(hidden_ND, unembed_VD, ("data", "model"))
  for value_N, expected_N in zip(split, expected, strict=True):
    assert value_N.dtype == jnp.float32
    np.testing.assert_allclose(value_N, expected_N, atol=3e-6)
  assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]
  for gradient, expected in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(np.float32(gradient), np.float32(expected), rtol=0.02, atol=0.02)


def test_split_statistics_meet_once_and_hidden_states_never():
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  tokens, embed, vocab = 512, 8, 4096
  specs = [((tokens, embed), P("data")), ((vocab, embed), P("model")), ((tokens,), P("data"))]
  arguments = [
    jax.ShapeDtypeStruct(
      shape, jnp.int32 if len(shape) == 1 else jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    for shape, spec in specs
  ]

  def both(hidden_ND, unembed_VD, token_N):
    return logprob_and_entropy(
      hidden_ND, unembed_VD, token_N, token_chunk=64, vocab_chunk=256, axes=("data", "model")
    )

  with jax.set_mesh(mesh):
    forward = jax.jit(both).lower(*arguments).compile()
    backward = jax.jit(jax.grad(lambda *x: sum(y.sum() for y in both(*x)), (0, 1)))
    backward = backward.lower(*arguments).compile()
  program = forward.as_text()
  assert program.count(" all-reduce(") == 2  # a maximum; three sums in one
  assert "all-gather" not in program and "all-gather" not in backward.as_text()
  for compiled in (forward, backward):
    # Chunks of 64 KiB, of what a device holds: without `axes` they would be of the whole array.
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 64 * 256 * 4


def test_wrong_axes():
  case = example(vocab=11)
  with pytest.raises(ValueError, match="current mesh has none; .*enter jax.set_mesh"):
    logprob_and_entropy(*case, axes=("data", "model"))
  with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)):
    with pytest.raises(ValueError, match="axes = .'data', 'tensor'.*'data', 'model'"):
      logprob_and_entropy(*case, axes=("data", "tensor"))
    with pytest.raises(ValueError, match="need different axes"):
      logprob_and_entropy(*case, axes=("data", "data"))
    with pytest.raises(ValueError, match="11 rows, which do not divide over 2 devices of 'model'"):
      logprob_and_entropy(*case, axes=("data", "model"))
