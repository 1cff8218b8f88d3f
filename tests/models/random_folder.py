"""Folders of random weights at any size, for tests and benches of reading them."""

import dataclasses
import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ares_jax.models import hf_files
from ares_jax.models.config import ModelConfig, VisionConfig

SMALL = ModelConfig(
  vocab=8192, embed=256, layers=8, heads=4, kv_heads=2, head_dim=64, mlp=2048, rope_theta=1e4,
  qkv_bias=True, qk_norm=False, mrope_interleaved=False, mrope_sections=(8, 12, 12),
  norm_eps=1e-6, tied=False, image_token=0, compute_dtype="float32", remat="none", unroll=1,
  vision=VisionConfig(depth=2, hidden=64, heads=2, mlp=64, patch=14, temporal_patch=2, merge=2,
                      window=28, full_attention=(1,), out=256))


def write(folder, config, *, files=3, seed=0):
  """Writes bfloat16 shards with an index; returns {name: shape} of their tensors."""
  rng = np.random.default_rng(seed)
  shapes = list(hf_files.shapes_of(config).items())
  written, index = {}, {}
  for number in range(files):
    shard = {}
    for name, shape in shapes[number::files]:
      bits = rng.integers(0x3C00, 0x3F80, shape, np.uint16)  # bfloat16 in [0.008, 1)
      shard[name], written[name] = bits.view(ml_dtypes.bfloat16), shape
      index[name] = f"model-{number}.safetensors"
    save_file(shard, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
  (folder / hf_files.INDEX).write_text(json.dumps({"weight_map": index}))
  return written


def larger(config, **changes):
  """`config` with other sizes; the vision tower follows the width."""
  vision = dataclasses.replace(config.vision, out=changes.get("embed", config.embed))
  return dataclasses.replace(config, vision=vision, **changes)
