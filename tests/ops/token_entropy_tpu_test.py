"""The TPU kernels: their numbers on an interpreted TPU, their programs for three real ones."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax import logprob_and_entropy
from ares_jax.ops import token_entropy_tpu


def reference(hidden_ND, unembed_VD, token_N, logprob_slope_N, entropy_slope_N, temperature):
  """float64, the plain formulas: outputs and both gradients."""
  hidden_ND, unembed_VD = np.float64(hidden_ND), np.float64(unembed_VD)
  logits_NV = hidden_ND @ unembed_VD.T / temperature
  logits_NV = logits_NV - logits_NV.max(1, keepdims=True)
  logprob_NV = logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True))
  p_NV = np.exp(logprob_NV)
  entropy_N = -(p_NV * logprob_NV).sum(1)
  chosen_NV = np.arange(len(unembed_VD)) == token_N[:, None]
  slope_NV = (
    np.float64(logprob_slope_N)[:, None] * (chosen_NV - p_NV)
    - np.float64(entropy_slope_N)[:, None] * p_NV * (logprob_NV + entropy_N[:, None])
  ) / temperature
  logprob_N = logprob_NV[np.arange(len(token_N)), token_N]
  return logprob_N, entropy_N, slope_NV @ unembed_VD, slope_NV.T @ hidden_ND


def example(tokens, embed, vocab, scale=0.3):
  rng = np.random.default_rng(0)
  hidden_ND = np.float32(scale * rng.normal(size=(tokens, embed)))
  unembed_VD = np.float32(rng.normal(size=(vocab, embed)))
  return hidden_ND, unembed_VD, np.int32(rng.integers(0, vocab, tokens)), *np.float32(
    rng.normal(size=(2, tokens))
  )


def kernels(hidden_ND, unembed_VD, token_N, *slopes_N, temperature):
  with pltpu.force_tpu_interpret_mode():
    max_N, total_N, weighted_N, chosen_N = token_entropy_tpu.statistics(
      hidden_ND, unembed_VD, token_N, temperature=temperature
    )
    lse_N, entropy_N = max_N + np.log(total_N), np.log(total_N) - weighted_N / total_N
    gradients = token_entropy_tpu.gradients(
      hidden_ND, unembed_VD, token_N, lse_N, entropy_N, *slopes_N, temperature=temperature,
      hidden_dtype=hidden_ND.dtype, unembed_dtype=unembed_VD.dtype,
    )
  return chosen_N - lse_N, entropy_N, *gradients


def test_two_tokens_of_equal_logits_have_one_bit():
  hidden_ND, unembed_VD = np.zeros((1, 128), np.float32), np.zeros((128, 128), np.float32)
  hidden_ND[0, 0] = 1
  unembed_VD[2:, 0] = -1000
  token_N, slope_N = np.int32([1]), np.float32([1])
  logprob_N, entropy_N, _, gradient_VD = kernels(
    hidden_ND, unembed_VD, token_N, slope_N, 0 * slope_N, temperature=1.0
  )
  np.testing.assert_allclose(logprob_N, [-np.log(2)], rtol=1e-6)
  np.testing.assert_allclose(entropy_N, [np.log(2)], rtol=1e-6)
  # Raising the log-probability: half up for the token, half down for the other.
  np.testing.assert_allclose(gradient_VD[:3, 0], [-0.5, 0.5, 0], atol=1e-6)


# Whole blocks; a short last block of the vocabulary and padding tokens; several of both.
@pytest.mark.parametrize(
  "tokens,vocab,temperature", [(128, 256, 1.0), (9, 300, 0.7), (150, 700, 1.0)]
)
def test_matches_float64(tokens, vocab, temperature):
  case = example(tokens, 128, vocab)
  ours, expected = kernels(*case, temperature=temperature), reference(*case, temperature)
  for value, correct in zip(ours, expected, strict=True):
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, correct, atol=3e-5)


def test_bfloat16_in_gives_float32_statistics_and_bfloat16_gradients():
  hidden_ND, unembed_VD, token_N, *slopes_N = example(130, 256, 200)
  hidden_ND, unembed_VD = (jnp.asarray(x, jnp.bfloat16) for x in (hidden_ND, unembed_VD))
  ours = kernels(hidden_ND, unembed_VD, token_N, *slopes_N, temperature=1.0)
  expected = reference(hidden_ND, unembed_VD, token_N, *slopes_N, 1.0)
  assert [x.dtype for x in ours] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
  for value, correct, atol in zip(ours, expected, (1e-4, 1e-4, 0.05, 0.05), strict=True):
    np.testing.assert_allclose(np.float32(value), correct, rtol=0.02, atol=atol)


def test_far_apart_logits_stay_finite_and_exact():
  hidden_ND, unembed_VD, token_N, *slopes_N = example(8, 128, 300, scale=20.0)
  ours = kernels(hidden_ND, unembed_VD, token_N, *slopes_N, temperature=1.0)
  expected = reference(hidden_ND, unembed_VD, token_N, *slopes_N, 1.0)
  assert np.all(ours[1] >= 0)
  for value, correct in zip(ours, expected, strict=True):
    np.testing.assert_allclose(value, correct, rtol=1e-4, atol=3e-3)


def test_public_function_over_4_devices_with_kernels(monkeypatch):
  hidden_ND, unembed_VD, token_N, *slopes_N = example(30, 128, 512)
  # As if lowered for a TPU. The interpreted TPU runs in host callbacks, which wait for each other
  # when there are more devices than cores; interpret=True makes plain XLA of a kernel.
  monkeypatch.setattr(lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
  monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
  for name in ("statistics", "gradients"):  # not their cached programs
    monkeypatch.setattr(token_entropy_tpu, name, getattr(token_entropy_tpu, name).__wrapped__)

  def outputs(hidden_ND, unembed_VD):
    return logprob_and_entropy.__wrapped__(
      hidden_ND, unembed_VD, token_N, token_chunk=8, vocab_chunk=64, axes=("data", "model")
    )

  @jax.jit
  def both(hidden_ND, unembed_VD):
    values, pull = jax.vjp(outputs, hidden_ND, unembed_VD)
    return *values, *pull(tuple(jnp.asarray(x) for x in slopes_N))

  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    split = jax.block_until_ready(both(hidden_ND, unembed_VD))
  expected = reference(hidden_ND, unembed_VD, token_N, *slopes_N, 1.0)
  for value, correct in zip(split, expected, strict=True):
    np.testing.assert_allclose(value, correct, atol=3e-5)


def test_only_shapes_of_the_matrix_unit_suit():
  suits = lambda embed, vocab, dtype: token_entropy_tpu.suits(  # noqa: E731
    jax.ShapeDtypeStruct((8, embed), dtype), jax.ShapeDtypeStruct((vocab, embed), dtype)
  )
  assert suits(3584, 152064, jnp.bfloat16) and suits(8192, 152064, jnp.float32)
  assert not suits(100, 152064, jnp.bfloat16)
  assert not suits(128, 64, jnp.bfloat16)
  assert not suits(128, 256, jnp.float16)


TOKENS, EMBED, VOCAB = 4096, 3584, 152064


def compiled_gradient(topology, chips, monkeypatch):
  """Gradients of both inputs through both outputs, compiled for a (data, model) mesh of chips."""
  pytest.importorskip("libtpu", reason="needs `pip install libtpu`")
  # Compiling asks for no TPU; without this libtpu looks for one in the cloud's metadata.
  monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  devices = np.array(devices[: chips[0] * chips[1]]).reshape(chips)
  mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  array = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(  # noqa: E731
    shape, dtype, sharding=NamedSharding(mesh, P(*spec))
  )
  arguments = (
    array((TOKENS, EMBED), jnp.bfloat16, "data"),
    array((VOCAB, EMBED), jnp.bfloat16, "model", "data"),
    array((TOKENS,), jnp.int32, "data"),
  )

  def loss(hidden_ND, unembed_VD, token_N):
    both = logprob_and_entropy(hidden_ND, unembed_VD, token_N, axes=("data", "model"))
    return both[0].sum() + both[1].sum()

  shardings = tuple(x.sharding for x in arguments[:2])
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=shardings)
    compiled = gradient.lower(*arguments).compile()
  program = compiled.as_text()
  for kernel in ("statistics", "hidden", "unembed"):
    assert f"token_entropy_{kernel}" in program
  return compiled


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.slow
def test_compiles_for_a_7b_model_on(topology, monkeypatch):
  compiled = compiled_gradient(topology, (1, 1), monkeypatch)
  # One [N, V] of bfloat16 would be 1188 MiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20


@pytest.mark.slow
def test_compiles_for_a_7b_model_split_over_4_chips(monkeypatch):
  compiled = compiled_gradient("v5e:2x2", (2, 2), monkeypatch)
  # Half of the unembedding, its float32 gradient and little else.
  half = VOCAB // 2 * EMBED
  assert compiled.memory_analysis().temp_size_in_bytes < half * (2 + 4) + 128 * 2**20
