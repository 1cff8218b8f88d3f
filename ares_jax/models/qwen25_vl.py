"""The model: text tokens and image features in, hidden states out.

    features = vision_features(config, params, vision)            # [R, U, Z]
    embeds = embed(config, params, tokens, unit, features)        # [B, T, Z]
    states = hidden(config, params, embeds, positions, segment)   # [B, T, D]
    logits = states @ unembedding(config, params).T

`score` replaces the last three in training: log-probability and entropy per token, no logits.

In float32 the logits equal those of transformers to 1e-5. In bfloat16 (with float32 weights) the
log-probability of a token differs from that in float32 by .008 on average and .03 at the 99th
percentile, on the two random models of 3 layers in tests/models/golden; trained weights were not
measured.

Sampling replaces the last two by `prefill` and `decode_step`.
B rows, T tokens, U image units of a row, D embed, V vocabulary, Z = D, or (1 + n) D with DeepStack
of n blocks (arXiv 2406.04334): D for the embedding, and D for each of the decoder's first n blocks.
"""

import jax
import jax.numpy as jnp

from ares_jax.models.config import ModelConfig
from ares_jax.models.decoder import decode_step, hidden, prefill
from ares_jax.models.vision import VisionInput, vision_features
from ares_jax.models.weights import Params
from ares_jax.ops import logprob_and_entropy
from ares_jax.system.mesh import ROWS, dividing, shard, unmapped, within_a_slice

__all__ = ["VisionInput", "decode_step", "embed", "hidden", "prefill", "score",
           "unembedding", "vision_features"]


def embed(config: ModelConfig, params: Params, tokens_BT, unit_BT, features) -> jax.Array:
  """Token embeddings, with image features where `unit_BT` names one.

  Args:
    config, params: sizes and weights.
    tokens_BT: int32 ids.
    unit_BT: int32, index of the image unit that feeds a token, -1 for text. None without images.
    features: from `vision_features`, [B, U, Z] if each row of tokens has its own images, [U, Z] if
      all rows use the same; None without images.

  Returns:
    [B, T, Z] in the compute dtype, [B, T, D] without images.
  """
  dtype = jnp.dtype(config.compute_dtype)
  table_VD = params["embed"]
  if within_a_slice():
    # Without these shardings XLA would fetch the table from other slices for each lookup.
    table_VD = shard(table_VD, None, "data")
    embeds_BTD = shard(table_VD[tokens_BT], None, None, "data").astype(dtype)
  else:
    embeds_BTD = table_VD[tokens_BT].astype(dtype)
  if features is None:
    return shard(embeds_BTD, ROWS)
  index_BT = jnp.maximum(unit_BT, 0)
  features = features.astype(dtype)
  if features.ndim == 2:
    image_BTZ = features[index_BT]
  else:
    image_BTZ = jnp.take_along_axis(features, index_BT[:, :, None], axis=1)
  width = image_BTZ.shape[-1]
  if width == config.embed:
    return shard(jnp.where(unit_BT[:, :, None] >= 0, image_BTZ, embeds_BTD), ROWS)
  # Nothing is added to the hidden states of texts.
  embeds_BTZ = jnp.pad(embeds_BTD, ((0, 0), (0, 0), (0, width - config.embed)))
  return shard(jnp.where(unit_BT[:, :, None] >= 0, image_BTZ, embeds_BTZ), ROWS, None,
               dividing(width, "model"))


def score(config: ModelConfig, params: Params, features, *, tokens, unit, positions, segment,
          prompt_segment=None, wanted=None,
          temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """Log-probability of every token after its predecessors, and the entropy of the policy there.

  Column t is about token t; the first column of a segment is meaningless.

  Args:
    config, params: sizes and weights.
    features: as in `embed`.
    tokens, unit, segment: int32 [B, T], as in `embed` and `hidden`.
    positions: int32 [B, 3, T].
    prompt_segment: int32 [B, T], as in `hidden`.
    wanted: bool [B, T], as in `logprob_and_entropy`; both are 0 elsewhere. None = all tokens.
    temperature: divides the logits, > 0: that of the policy which drew the tokens.

  Returns:
    float32 [B, T], nats, both; on a mesh each device computes its own tokens.
  """
  embeds_BTD = embed(config, params, tokens, unit, features)
  hidden_BTD = hidden(config, params, embeds_BTD, jnp.moveaxis(positions, 1, 0), segment,
                      prompt_segment)
  both = logprob_and_entropy(
    hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1]), unembedding(config, params),
    tokens[:, 1:].reshape(-1), None if wanted is None else wanted[:, 1:].reshape(-1),
    temperature=temperature, axes=(unmapped(ROWS), "model"))
  return tuple(jnp.pad(x.reshape(len(tokens), -1), ((0, 0), (1, 0))) for x in both)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
  """The matrix [V, D] whose product with a hidden state gives the logits; params' dtype."""
  return params["embed"] if config.tied else params["unembed"]
