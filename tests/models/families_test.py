"""Text families against transformers (committed references), padded, packed and sharded."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_batch, make_golden, make_text_golden, paging

from ares_jax.models import families, hf, hf_files, qwen25_vl, weights
from ares_jax.system import mesh as mesh_lib

FAMILIES = tuple(make_text_golden.FAMILIES)
TOKENS, _ = make_golden.case("text")


@functools.cache
def load(family):
  """(ModelConfig, weights) of a golden folder."""
  config = golden_batch.config(family)
  return config, golden_batch.read_hf(make_golden.folder(family), config)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, positions, segment):
  embeds = qwen25_vl.embed(config, params, tokens, None, None)
  states = qwen25_vl.hidden(config, params, embeds, positions, segment)
  return states @ qwen25_vl.unembedding(config, params).T


def rows(*lengths, width):
  """tokens, positions, segment of a row that holds the first tokens of the case, several times."""
  tokens, positions, segment = np.zeros((3, 1, width), np.int32)
  start = 0
  for number, length in enumerate(lengths):
    part = slice(start, start + length)
    tokens[0, part], positions[0, part] = TOKENS[:length], range(length)
    segment[0, part] = number + 1
    start += length
  return tokens, np.broadcast_to(positions, (3, *positions.shape)), segment


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_padded_and_packed(family):
  config, params = load(family)
  with golden_batch.references(family) as reference:
    want = reference["logits"]
  padded = logits(config, params, *rows(len(TOKENS), width=48))[0, :len(TOKENS)]
  np.testing.assert_allclose(padded, want, rtol=0, atol=1e-5 * np.abs(want).max())
  packed = logits(config, params, *rows(17, len(TOKENS), 9, width=80))[0]
  np.testing.assert_allclose(packed[17:17 + len(TOKENS)], want, rtol=0,
                             atol=1e-5 * np.abs(want).max())
  np.testing.assert_allclose(packed[:17], want[:17], rtol=0, atol=1e-5 * np.abs(want).max())


def loss(config, params, tokens, positions, segment):
  """Log-likelihood of the second half of each row."""
  first, length = make_golden.response_start(TOKENS), len(TOKENS)
  logprob = jax.nn.log_softmax(logits(config, params, tokens, positions, segment))
  return jnp.take_along_axis(logprob[:, first - 1:length - 1], tokens[:, first:length, None],
                             axis=2).sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_torch(family):
  config, params = load(family)
  grads = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(
    config, params, *rows(len(TOKENS), width=48))
  flat = hf_files.by_name(grads)
  with golden_batch.references(family) as reference:
    for name, (path, layer) in hf_files.sources_of(config).items():
      if config.tied and name == hf_files.HEAD:
        continue
      norm, *spread = reference[f"/gradient/{name}"]
      ours = hf_files.to_theirs(
        np.asarray(flat[path] if layer is None else flat[path][layer]), path).ravel()
      assert abs(np.linalg.norm(ours) - norm) <= 1e-3 * norm + 1e-6, name
      got = ours[np.linspace(0, ours.size - 1, 16).astype(int)]
      np.testing.assert_allclose(got, spread, rtol=1e-3, atol=1e-3 * norm / ours.size**0.5 + 1e-7,
                                 err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family):
  config, params = load(family)
  with golden_batch.references(family) as reference:
    want = reference["greedy"]

  @jax.jit
  def generate(params, tokens, positions, length):
    embeds = qwen25_vl.embed(config, params, tokens, None, None)
    state, k, v = qwen25_vl.prefill(config, params, embeds, positions, length)
    pages, *tables = paging.lay_out(config, k, v, np.int32([len(TOKENS)]), [0], len(want))

    def step(carry, number):
      state, pages = carry
      token = jnp.argmax(state @ qwen25_vl.unembedding(config, params).T, -1).astype(jnp.int32)
      embeds = qwen25_vl.embed(config, params, token[:, None], None, None)
      position = jnp.broadcast_to(length[:, None] + number, (3, 1, 1))
      read = paging.reads(*tables, np.int32([len(TOKENS)]), np.int32([0]), number, group=1,
                          prompt_tokens=tokens.shape[1], live=len(want))
      return qwen25_vl.decode_step(config, params, embeds, position, pages, read), token[0]

    return jax.lax.scan(step, (state, pages), jnp.arange(len(want)))[1]

  tokens, positions, _ = rows(len(TOKENS), width=48)
  np.testing.assert_array_equal(generate(params, tokens, positions, np.int32([len(TOKENS)])), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_gives_the_same_bytes(family, tmp_path):
  config, params = load(family)
  base = make_golden.folder(family)
  hf.to_hf(params, config, tmp_path / "out", base)
  for path in base.glob("*.safetensors"):
    assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
  assert {path.name for path in (tmp_path / "out").iterdir()} \
    == {path.name for path in base.iterdir()} - {"references.npz"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_those_of_transformers(family):
  pytest.importorskip("torch")
  fresh = make_golden.summary(make_text_golden.references(family))
  with golden_batch.references(family) as committed:
    assert fresh.keys() == set(committed.keys())
    for key, value in fresh.items():
      np.testing.assert_allclose(committed[key], value, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3"])
def test_gradients_over_4_devices_equal_those_on_one(family):
  config, params = load(family)
  inputs = [np.repeat(x, 2, axis=x.ndim - 2) for x in rows(len(TOKENS), width=48)]
  gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
  want = gradient(config, params, *inputs)
  mesh = mesh_lib.make_mesh(2, 2)
  with jax.set_mesh(mesh):
    shards = weights.shardings(weights.weight_table(config), mesh)
    got = gradient(config, jax.device_put(params, shards), mesh_lib.put(inputs[0], "data"),
                   mesh_lib.put(inputs[1], None, "data"), mesh_lib.put(inputs[2], "data"))
  for name, theirs in hf_files.by_name(want).items():
    ours = np.asarray(hf_files.by_name(got)[name])
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max()), name


def config_of(tmp_path, family, **changes):
  fields = json.loads((make_golden.folder(family) / "config.json").read_text()) | changes
  (tmp_path / "config.json").write_text(json.dumps(
    {name: value for name, value in fields.items() if value != "left out"}))
  return hf.model_config(tmp_path, compute_dtype="float32", remat="none", unroll=1)


def test_sizes_of_the_families(tmp_path):
  found = {family: load(family)[0] for family in FAMILIES}
  assert [(each.qkv_bias, each.qk_norm, each.head_dim, each.kv_heads, each.tied, each.rope_theta)
          for each in found.values()] == [
    (True, False, 8, 2, True, 1e6), (False, True, 16, 2, False, 1e6),
    (False, False, 8, 4, True, 1e5)]
  assert all(each.vision is None and each.image_token is None for each in found.values())
  # As published: the fields of transformers 4, and some that change nothing.
  published = config_of(tmp_path, "llama", rope_parameters="left out", rope_theta=1e5,
                        rope_scaling=None, is_llama_config=True, rope_interleaved=False,
                        head_dim="left out", **{"transformers.js_config": {"dtype": "q4"}})
  assert published == found["llama"]
  assert config_of(tmp_path, "qwen3", head_dim="left out", num_attention_heads=2).head_dim == 128
  assert config_of(tmp_path, "qwen2", head_dim=16).head_dim == 16


@pytest.mark.parametrize("family, changes, message", [
  ("llama", dict(rope_parameters="left out", rope_theta=5e5, rope_scaling={
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}), "rotary embedding .*llama3.*: only type default"),
  ("llama", dict(attention_bias=True), "attention_bias is True; only False is implemented"),
  ("llama", dict(mlp_bias=True), "mlp_bias is True"),
  ("qwen3", dict(attention_bias=True), "attention_bias is True"),
  ("llama", dict(rope_interleaved=True), "rope_interleaved is True"),
  ("qwen2", dict(use_sliding_window=True), "use_sliding_window is True"),
  ("qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [
    2, 1, 1]}), "rotary embedding .*mrope_section"),
  ("qwen3", dict(head_dim=7), r"must sum to head_dim / 2 = 3.5"),
  ("qwen3", dict(num_experts=8), "num_experts = 8 is unknown"),
  ("qwen3", dict(model_type="qwen3_moe"), "'qwen3_moe', a mixture of experts; implemented"),
])
def test_what_is_not_implemented_is_refused_by_name(tmp_path, family, changes, message):
  with pytest.raises(ValueError, match=message):
    config_of(tmp_path, family, **changes)


def test_absent_fields_have_transformers_values():
  import transformers

  for name in FAMILIES:
    config, family = transformers.AutoConfig.for_model(name), families.FAMILIES[name]
    for field, value in family.text.read.items():
      if hasattr(config, field) and value not in (families.REQUIRED, None):
        assert getattr(config, field) == value, (name, field)
    assert config.rope_parameters["rope_theta"] == family.text.read["rope_theta"]
    for field, values in family.text.fixed.items():
      assert getattr(config, field, values[0]) in values, (name, field)


def test_a_model_has_a_tower_and_an_image_token_or_neither():
  config, _ = load("qwen2")
  with pytest.raises(ValueError, match="a model has both or neither"):
    dataclasses.replace(config, image_token=3)
