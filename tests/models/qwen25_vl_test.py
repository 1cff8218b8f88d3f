"""Against transformers (committed references), padded, packed and sharded."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_batch, make_golden

from ares_jax.data import images
from ares_jax.models import attention, hf_files, weights
from ares_jax.models.qwen25_vl import (
  embed,
  hidden,
  unembedding,
  vision_features,
)
from ares_jax.system import mesh as mesh_lib

VARIANTS = (*make_golden.VARIANTS, *make_golden.FAMILIES)


@functools.cache
def load(variant):
  return golden_batch.read_hf(make_golden.folder(variant), golden_batch.config(variant))


def forward(config, params, tokens, unit, positions, segment, vision):
  features = vision_features(config, params, vision)
  states = hidden(config, params, embed(config, params, tokens, unit, features), positions, segment)
  return features, states @ unembedding(config, params).astype(states.dtype).T


@functools.partial(jax.jit, static_argnums=0)
def gradient(config, params, weight_B, batch):
  return jax.grad(logprob, argnums=1)(config, params, weight_B, batch)


def logprob(config, params, weight_B, batch):
  """Log-likelihood of the responses, weighted by row."""
  _, logits = forward(config, params, batch.tokens, batch.unit, batch.positions, batch.segment,
                      batch.vision)
  each = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)[:, :-1]),
                             batch.tokens[:, 1:, None], axis=2)[..., 0]
  return jnp.sum(weight_B[:, None] * jnp.where(batch.response[:, 1:], each, 0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_logits_equal_transformers(variant):
  config = golden_batch.config(variant)
  batch = golden_batch.batch_for(config)
  features, logits = jax.jit(functools.partial(forward, config))(
    load(variant), batch.tokens, batch.unit, batch.positions, batch.segment, batch.vision)
  with golden_batch.references(variant) as reference:
    for b, name in enumerate(golden_batch.NAMES):
      want = reference[f"{name}/logits"]
      np.testing.assert_allclose(logits[b, :len(want)], want, rtol=0,
                                 atol=1e-5 * np.abs(want).max())
      if batch.units[b]:
        got = np.asarray(features[b])[np.concatenate(batch.units[b])]
        want = reference[f"{name}/features"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_torch(variant):
  config = golden_batch.config(variant)
  inputs = golden_batch.batch_for(config).replace(units=())
  with golden_batch.references(variant) as reference:
    for b, name in enumerate(golden_batch.NAMES):
      grads = gradient(config, load(variant), jnp.eye(len(golden_batch.NAMES))[b], inputs)
      flat = {weights.name_of(path): np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
      for key, (path, layer) in hf_files.sources_of(config).items():
        if config.tied and key == "lm_head.weight":
          continue
        key = key.replace("model.", "model.language_model.").replace("visual.", "model.visual.")
        norm, *spread = reference[f"{name}/gradient/{key}"]
        ours = hf_files.to_theirs(flat[path] if layer is None else flat[path][layer], path).ravel()
        got = ours[np.linspace(0, ours.size - 1, 16).astype(int)]
        np.testing.assert_allclose(np.linalg.norm(ours), norm, rtol=1e-3, atol=1e-6, err_msg=key)
        # Entries against the size of a typical one: the smallest are sums that nearly cancel.
        np.testing.assert_allclose(got, spread, rtol=1e-3, atol=1e-3 * norm / ours.size**0.5,
                                   err_msg=key)


@pytest.mark.parametrize("variant", ["tied", "qwen3_vl"])
def test_rows_packed_behind_each_other_do_not_see_each_other(variant):
  config, params = golden_batch.config(variant), load(variant)
  batch, size = golden_batch.batch_for(config), config.vision
  names = ("images", "image")
  packed = golden_batch.batch_for(config, names[:1], length=128, windows=30)
  rows = [make_golden.case(name, 2 * size.patch) for name in names]
  cut = [[images.patchify(picture, patch=size.patch) for picture in pictures]
         for _, pictures in rows]
  vision, units = images.pack_rows([cut[0] + cut[1]], windows=30, window=size.window,
                                   patch=size.patch)
  start, end = len(rows[0][0]), len(rows[0][0]) + len(rows[1][0])
  packed.tokens[0, start:end] = rows[1][0]
  packed.positions[:, 0, start:end] = batch.positions[:, 1, :end - start]
  packed.segment[0, start:end] = 2
  packed.unit[0][packed.tokens[0] == make_golden.IMAGE] = np.concatenate(units[0])
  _, logits = jax.jit(functools.partial(forward, config))(
    params, packed.tokens, packed.unit, packed.positions, packed.segment,
    type(packed.vision)(**vision))
  with golden_batch.references(variant) as reference:
    np.testing.assert_allclose(logits[0, :start], reference["images/logits"], atol=1e-4)
    np.testing.assert_allclose(logits[0, start:end], reference["image/logits"], atol=1e-4)


def over_mesh(data, model, heads=None, variant="untied"):
  """Largest difference of a gradient over a mesh from one device's, of each tensor's own size."""
  config, params = golden_batch.config(variant), load(variant)
  if heads:
    config = dataclasses.replace(config, heads=heads)
    params = weights.init(weights.weight_table(config), jax.random.key(0))
  batch = golden_batch.batch_for(config).replace(units=())
  every = jnp.ones(len(golden_batch.NAMES))
  want = gradient(config, params, every, batch)
  mesh = mesh_lib.make_mesh(data, model, jax.devices()[:data * model])
  with jax.set_mesh(mesh):
    shards = weights.shardings(weights.weight_table(config), mesh)
    positions = mesh_lib.put(batch.positions, None, "data")
    inputs = mesh_lib.put(batch.replace(positions=positions[0]), "data")
    got = gradient(config, jax.device_put(params, shards), mesh_lib.put(every, "data"),
                   inputs.replace(positions=positions))
  return max(jax.tree.leaves(jax.tree.map(
    lambda x, y: float(np.abs(np.asarray(x) - y).max() / max(1, np.abs(y).max())), got, want)))


@pytest.mark.parametrize("data, model", [(1, 2), (2, 2)])
@pytest.mark.slow
def test_gradients_over_2_and_4_devices_equal_those_on_one(data, model, monkeypatch):
  # The rows of 88 tokens too go the way of long ones: heads and rows mapped over the mesh.
  monkeypatch.setattr(attention, "KERNEL_TOKENS", 64)
  assert over_mesh(data, model) < 1e-5


@pytest.mark.slow
def test_gradients_with_deepstack_over_4_devices_equal_those_on_one(monkeypatch):
  monkeypatch.setattr(attention, "KERNEL_TOKENS", 64)
  assert over_mesh(2, 2, variant="qwen3_vl") < 1e-5


@pytest.mark.slow
def test_gradients_where_heads_do_not_divide_equal_those_on_one(monkeypatch):
  # 6 heads of the decoder and 2 of the vision tower over 4.
  monkeypatch.setattr(attention, "KERNEL_TOKENS", 64)
  assert over_mesh(1, 4, heads=6) < 1e-5


@pytest.mark.slow
def test_gradients_over_8_devices_equal_those_on_one():
  command = ("from models import qwen25_vl_test as test\n"
             "test.attention.KERNEL_TOKENS = 64\n"
             "print(test.over_mesh(4, 2))")
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                              "PYTHONPATH": os.pathsep.join(sys.path)}
  result = subprocess.run([sys.executable, "-c", command], env=environment, text=True,
                          capture_output=True, timeout=600)
  assert result.returncode == 0, result.stderr
  assert float(result.stdout) < 1e-5


def test_bfloat16_stays_near_float32():
  batch = golden_batch.batch()
  logits = {}
  for dtype in ("float32", "bfloat16"):
    config = golden_batch.config("tied", compute_dtype=dtype)
    _, value = jax.jit(functools.partial(forward, config))(
      load("tied"), batch.tokens, batch.unit, batch.positions, batch.segment, batch.vision)
    assert value.dtype == dtype
    logits[dtype] = jax.nn.log_softmax(value.astype(jnp.float32))
  real = batch.segment > 0
  error = np.abs(logits["bfloat16"] - logits["float32"])[real]
  assert error.mean() < 0.05 and np.quantile(error, 0.99) < 0.2


def test_image_tokens_take_the_unit_they_name():
  config, params = golden_batch.config("tied"), load("tied")
  features = jnp.arange(2 * 3 * 32, dtype=jnp.float32).reshape(2, 3, 32)
  tokens = np.int32([[9, 6, 6], [6, 9, 6]])
  unit = np.int32([[-1, 2, 0], [1, -1, 1]])
  got = embed(config, params, tokens, unit, features)
  np.testing.assert_array_equal(got[0, 1], features[0, 2])
  np.testing.assert_array_equal(got[0, 2], features[0, 0])
  np.testing.assert_array_equal(got[1, 0], features[1, 1])
  np.testing.assert_array_equal(got[0, 0], params["embed"][9])
  np.testing.assert_array_equal(got[1, 1], embed(config, params, tokens, None, None)[1, 1])
