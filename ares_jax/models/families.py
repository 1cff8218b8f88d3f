"""The table of architectures: what each has in config.json, and how its model differs from others.

A new architecture of the kind (RMS norm, rotary embedding, gated SiLU MLP, perhaps a tower of
attention and MLP blocks over image patches) is a record in FAMILIES. docs/models.md says what else
it needs.
"""

import dataclasses
from typing import Any, Literal

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Fields:
  """The fields of one part of config.json that can change what a model computes."""

  read: dict[str, Any]  # field -> transformers' value where the file leaves it out, or REQUIRED
  fixed: dict[str, tuple]  # field -> the values that are implemented; absent is one of them


@dataclasses.dataclass(frozen=True)
class Tower:
  """How a vision tower differs: blocks of attention and MLP, and mergers into text width."""

  fields: Fields  # of vision_config
  layer_norm: bool  # LayerNorm with biases, else RMS norm
  activation: Literal["silu", "quick_gelu", "gelu_tanh"]  # of the MLP; silu multiplies (gated)
  patch_bias: bool  # whether the embedding of patches has a bias
  mean: tuple[float, float, float]  # of the channels of images, in units of full intensity
  std: tuple[float, float, float]
  names: dict[str, str]  # our path of a weight -> its module, where `hf_files.RULES` has another


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture, a `model_type` of transformers."""

  text: Fields  # of the decoder
  tower: Tower | None  # None for a text model
  qkv_bias: bool  # whether queries, keys and values have biases
  qk_norm: bool  # whether the heads of queries and keys are normalised before they are rotated
  free_head_dim: bool  # whether head_dim may be other than hidden_size / num_attention_heads
  # Rotary frequencies for time, height and width where the file names none; None for a text model.
  sections: tuple[int, int, int] | None = None
  interleaved: bool = False  # whether frequencies of the three axes take turns


_DECODER = dict(
  vocab_size=REQUIRED, hidden_size=REQUIRED, intermediate_size=REQUIRED,
  num_hidden_layers=REQUIRED, num_attention_heads=REQUIRED, head_dim=None, rope_theta=1e4,
  rope_scaling=None, rope_parameters=None, tie_word_embeddings=False)
_SILU = dict(hidden_act=("silu",), attention_dropout=(0.0, None), quantization_config=(None,))
_NO_WINDOW = dict(use_sliding_window=(False, None), use_mrope=(False, None))
_QWEN2_VL = Fields(
  _DECODER | dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, layer_types=None,
                  image_token_id=151655),
  _SILU | _NO_WINDOW)
_TOWER = dict(depth=REQUIRED, hidden_size=REQUIRED, num_heads=REQUIRED, patch_size=14,
              spatial_merge_size=2, temporal_patch_size=2, rope_parameters=None)
_RGB = dict(in_channels=(3,), in_chans=(3,))
# Channel statistics of CLIP's training images.
_CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_BLOCK = "visual.blocks.{layer}."

FAMILIES = {
  "qwen2_5_vl": Family(
    text=_QWEN2_VL,
    tower=Tower(
      Fields(_TOWER | dict(intermediate_size=REQUIRED, out_hidden_size=REQUIRED, window_size=112,
                           fullatt_block_indexes=(7, 15, 23, 31)),
             _RGB | dict(hidden_act=("silu",))),
      layer_norm=False, activation="silu", patch_bias=False, names={}, **_CLIP),
    qkv_bias=True, qk_norm=False, free_head_dim=False, sections=(16, 24, 24)),
  "qwen2_vl": Family(
    text=_QWEN2_VL,
    tower=Tower(  # its hidden_size is the decoder's
      Fields(_TOWER | dict(embed_dim=1280, mlp_ratio=4), _RGB | dict(hidden_act=("quick_gelu",))),
      layer_norm=True, activation="quick_gelu", patch_bias=False, names={
        "vision/blocks/up": _BLOCK + "mlp.fc1", "vision/blocks/down": _BLOCK + "mlp.fc2"}, **_CLIP),
    qkv_bias=True, qk_norm=False, free_head_dim=False, sections=(16, 24, 24)),
  "qwen3_vl": Family(
    text=Fields(_DECODER | dict(num_key_value_heads=32, rms_norm_eps=1e-6, rope_theta=5e5,
                                head_dim=128, image_token_id=151655),
                _SILU | dict(attention_bias=(False,))),
    tower=Tower(
      Fields(_TOWER | dict(intermediate_size=REQUIRED, out_hidden_size=REQUIRED, patch_size=16,
                           num_position_embeddings=2304, deepstack_visual_indexes=(8, 16, 24)),
             _RGB | dict(hidden_act=("gelu_pytorch_tanh",))),
      layer_norm=True, activation="gelu_tanh", patch_bias=True, names={
        "vision/blocks/up": _BLOCK + "mlp.linear_fc1",
        "vision/blocks/down": _BLOCK + "mlp.linear_fc2",
        "vision/merger/norm": "visual.merger.norm",
        "vision/merger/up": "visual.merger.linear_fc1",
        "vision/merger/down": "visual.merger.linear_fc2"},
      mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    qkv_bias=False, qk_norm=True, free_head_dim=True, sections=(24, 20, 20), interleaved=True),
  "qwen2": Family(  # Qwen2.5 too
    text=Fields(_DECODER | dict(num_key_value_heads=32, rms_norm_eps=1e-6, layer_types=None),
                _SILU | _NO_WINDOW),
    tower=None, qkv_bias=True, qk_norm=False, free_head_dim=True),
  "qwen3": Family(
    text=Fields(_DECODER | dict(num_key_value_heads=32, rms_norm_eps=1e-6, layer_types=None,
                                head_dim=128),
                _SILU | _NO_WINDOW | dict(attention_bias=(False,))),
    tower=None, qkv_bias=False, qk_norm=True, free_head_dim=True),
  "llama": Family(  # SmolLM2 too
    text=Fields(_DECODER | dict(num_key_value_heads=None, rms_norm_eps=1e-6),
                _SILU | dict(attention_bias=(False,), mlp_bias=(False,),
                             rope_interleaved=(False,))),
    tower=None, qkv_bias=False, qk_norm=False, free_head_dim=True),
}
# Relatives that are often asked for, and what they have that is not implemented.
_EXPERTS, _LINEAR = "a mixture of experts", "layers of linear attention"
REFUSED = dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "mixtral"), _EXPERTS) | \
  dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text"), _LINEAR)
