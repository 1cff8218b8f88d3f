"""The table of architectures: the fields that each has in config.json, and how its decoder differs.

A new text architecture of the kind (RMS norm, rotary embedding, gated SiLU MLP) is a record in
FAMILIES; its tensors' names are in `hf_files.RULES`. tests/models/make_text_golden.py makes the
reference files that compare it with transformers.
"""

import dataclasses
from typing import Any

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Fields:
  """The fields of one part of config.json that can change what a model computes."""

  read: dict[str, Any]  # field -> transformers' value where the file leaves it out, or REQUIRED
  fixed: dict[str, tuple]  # field -> the values that are implemented; absent is one of them


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture, a `model_type` of transformers."""

  text: Fields  # of the decoder
  vision: Fields | None  # of the vision tower; None for a text model
  qkv_bias: bool  # whether queries, keys and values have biases
  qk_norm: bool  # whether the heads of queries and keys are normalised before they are rotated
  free_head_dim: bool  # whether head_dim may be other than hidden_size / num_attention_heads


_DECODER = dict(
  vocab_size=REQUIRED, hidden_size=REQUIRED, intermediate_size=REQUIRED,
  num_hidden_layers=REQUIRED, num_attention_heads=REQUIRED, head_dim=None, rope_theta=1e4,
  rope_scaling=None, rope_parameters=None, tie_word_embeddings=False)
_SILU = dict(hidden_act=("silu",), attention_dropout=(0.0, None))
_NO_WINDOW = dict(use_sliding_window=(False, None))

FAMILIES = {
  "qwen2_5_vl": Family(
    text=Fields(
      _DECODER | dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, layer_types=None,
                      image_token_id=151655),
      _SILU | _NO_WINDOW),
    vision=Fields(
      dict(depth=REQUIRED, hidden_size=REQUIRED, intermediate_size=REQUIRED, num_heads=REQUIRED,
           out_hidden_size=REQUIRED, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
           window_size=112, fullatt_block_indexes=(7, 15, 23, 31), rope_parameters=None),
      dict(hidden_act=("silu",), in_channels=(3,), in_chans=(3,))),
    qkv_bias=True, qk_norm=False, free_head_dim=False),
  "qwen2": Family(  # Qwen2.5 too
    text=Fields(_DECODER | dict(num_key_value_heads=32, rms_norm_eps=1e-6, layer_types=None),
                _SILU | _NO_WINDOW),
    vision=None, qkv_bias=True, qk_norm=False, free_head_dim=True),
  "qwen3": Family(
    text=Fields(_DECODER | dict(num_key_value_heads=32, rms_norm_eps=1e-6, layer_types=None,
                                head_dim=128),
                _SILU | _NO_WINDOW | dict(attention_bias=(False,))),
    vision=None, qkv_bias=False, qk_norm=True, free_head_dim=True),
  "llama": Family(  # SmolLM2 too
    text=Fields(_DECODER | dict(num_key_value_heads=None, rms_norm_eps=1e-6),
                _SILU | dict(attention_bias=(False,), mlp_bias=(False,),
                             rope_interleaved=(False,))),
    vision=None, qkv_bias=False, qk_norm=False, free_head_dim=True),
}
