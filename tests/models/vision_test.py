import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import golden_batch, make_golden

from ares_jax.data import images
from ares_jax.models import vision, weights

CONFIG = golden_batch.config("tied")
PARAMS = weights.init(weights.weight_table(CONFIG), jax.random.key(0))
FEATURES = jax.jit(vision.vision_features, static_argnums=0)


def pack(rows, windows):
  packed, units = images.pack_rows(
    [[images.patchify(picture) for picture in row] for row in rows], windows=windows, window=56)
  return vision.VisionInput(**packed), units


@pytest.mark.parametrize("variant", ["tied", "qwen3_vl"])
def test_normalise_is_the_image_processors_float32_bit_for_bit(variant):
  size = golden_batch.config(variant).vision
  level = np.repeat(np.arange(256, dtype=np.uint8)[:, None], size.patch_dim, axis=1)
  got = np.asarray(jax.jit(functools.partial(vision.normalise, size=size))(level))
  rescaled = (level.astype(np.float64) * (1 / 255)).astype(np.float32)
  channel = np.arange(size.patch_dim) // (size.patch_dim // 3)
  want = (rescaled - np.float32(size.tower.mean)[channel]) / np.float32(size.tower.std)[channel]
  np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


def test_features_of_an_image_depend_on_no_other_row_image_or_padding():
  one, two = make_golden.picture(84, 140, 1), make_golden.picture(56, 84, 2)
  alone, alone_units = pack([[one]], windows=12)
  both, both_units = pack([[two, one], [one, one]], windows=12)
  want = FEATURES(CONFIG, PARAMS, alone)[0][alone_units[0][0]]
  got = FEATURES(CONFIG, PARAMS, both)
  np.testing.assert_allclose(got[0][both_units[0][1]], want, atol=1e-5)
  np.testing.assert_allclose(got[1][both_units[1][0]], want, atol=1e-5)
  np.testing.assert_allclose(got[1][both_units[1][1]], want, atol=1e-5)


def test_window_layers_alone_keep_windows_apart():
  config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, full_attention=()))
  packed, _ = pack([[make_golden.picture(56, 112, 0)]], windows=3)  # windows 0 and 1
  changed = packed.replace(patches=packed.patches.copy())
  changed.patches[0, 1] ^= 255
  before, after = (np.asarray(FEATURES(config, PARAMS, x))[0] for x in (packed, changed))
  np.testing.assert_array_equal(before[:4], after[:4])
  assert np.abs(before[4:8] - after[4:8]).max() > 0.01
  with_full = [np.asarray(FEATURES(CONFIG, PARAMS, x))[0] for x in (packed, changed)]
  assert np.abs(with_full[0][:4] - with_full[1][:4]).max() > 1e-4


def test_cost_of_window_layers_is_linear_in_the_patches():
  config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, full_attention=()))

  def flops(windows):
    packed, _ = pack([[]], windows)
    return FEATURES.lower(config, PARAMS, packed).compile().cost_analysis()["flops"]

  small, middle, large = flops(8), flops(16), flops(32)
  np.testing.assert_allclose((large - middle) / (middle - small), 2, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tied", "qwen3_vl"])
def test_gradients_are_finite_when_a_row_has_no_image(variant):
  config = golden_batch.config(variant)
  params = weights.init(weights.weight_table(config), jax.random.key(0))
  packed = golden_batch.batch_for(config, ("text", "unit")).vision
  gradient = jax.jit(jax.grad(lambda params: vision.vision_features(config, params, packed).sum()))
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


def test_each_block_of_deepstack_adds_features_behind_the_others():
  config = golden_batch.config("qwen3_vl")
  params = golden_batch.read_hf(make_golden.folder("qwen3_vl"), config)
  packed = golden_batch.batch_for(config, ("images",)).vision

  def features(blocks, *mergers):
    size = dataclasses.replace(config.vision, deepstack=blocks)
    stack = {name: leaf[list(mergers)] for name, leaf in params["vision"]["deepstack"].items()}
    return np.asarray(FEATURES(dataclasses.replace(config, vision=size),
                               {"vision": params["vision"] | {"deepstack": stack}}, packed))

  last = config.vision.depth - 1
  both, width = features((1, last), 0, 1), config.embed
  assert both.shape[-1] == 3 * width
  np.testing.assert_allclose(features((last,), 1), both[..., np.r_[:width, 2 * width:3 * width]],
                             atol=1e-5)
  np.testing.assert_allclose(features((1,), 0), both[..., :2 * width], atol=1e-5)
  assert np.abs(both[..., width:2 * width] - both[..., 2 * width:]).max() > 0.1
