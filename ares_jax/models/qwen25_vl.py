"""Qwen2.5-VL: text tokens and image features in, hidden states out.

    features = vision_features(config, params, vision)            # [R, U, D]
    embeds = embed(config, params, tokens, unit, features)        # [B, T, D]
    states = hidden(config, params, embeds, positions, segment)   # [B, T, D]
    logits = states @ unembedding(config, params).T

In float32 the logits are transformers' to 1e-5. In bfloat16 (weights kept in float32) the log-prob
of a token differs from float32's by .008 on average, .03 at the 99th percentile, measured on two
random models of 3 layers in tests/models/golden; not measured on trained weights.

Sampling replaces the last two by `prefill`, `empty_cache` and `decode_step`.
B rows, T tokens, U image units of a row, D embed, V vocabulary.
"""

import jax
import jax.numpy as jnp

from ares_jax.mesh import shard
from ares_jax.models.config import ModelConfig
from ares_jax.models.decoder import KVCache, decode_step, empty_cache, hidden, prefill
from ares_jax.models.vision import VisionInput, vision_features
from ares_jax.models.weights import Params

__all__ = ["KVCache", "VisionInput", "decode_step", "embed", "empty_cache", "hidden", "prefill",
           "unembedding", "vision_features"]


def embed(config: ModelConfig, params: Params, tokens_BT, unit_BT, features_BUD) -> jax.Array:
  """Token embeddings, with image features where `unit_BT` names one.

  Args:
    config: sizes.
    params: the weights.
    tokens_BT: int32 ids.
    unit_BT: int32, index of the image unit that feeds a token, -1 for text. None without images.
    features_BUD: what `vision_features` returned, one row per row of tokens. None without images.

  Returns:
    [B, T, D] in the compute dtype.
  """
  dtype = jnp.dtype(config.compute_dtype)
  embeds_BTD = params["embed"][tokens_BT].astype(dtype)
  if features_BUD is None:
    return shard(embeds_BTD, "data")
  index = jnp.maximum(unit_BT, 0)[:, :, None]
  image_BTD = jnp.take_along_axis(features_BUD.astype(dtype), index, axis=1)
  return shard(jnp.where(unit_BT[:, :, None] >= 0, image_BTD, embeds_BTD), "data")


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
  """The matrix [V, D] whose product with a hidden state gives the logits; params' dtype."""
  return params["embed"] if config.tied else params["unembed"]
