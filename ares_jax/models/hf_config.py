"""Converts between the sizes of a model and a Hugging Face config.json.

Every field is used, known to be irrelevant, or refused by name. Two forms are read: the flat one of
transformers 4, which the published folders have, and the one of transformers 5, which nests
`text_config`.
"""

import json
import os
import pathlib

from ares_jax.models.config import ModelConfig, VisionConfig

# Fields that cannot change a forward pass over text and images: bookkeeping, special ids that the
# tokenizer has too, initialisation, length limits, video timing, and window sizes of the text
# attention, which `use_sliding_window: false` turns off.
_IRRELEVANT = {
  "_attn_implementation_autoset", "_name_or_path", "architectures", "bos_token_id", "dtype",
  "eos_token_id", "initializer_range", "max_position_embeddings", "max_window_layers", "model_type",
  "pad_token_id", "sliding_window", "spatial_patch_size", "text_config", "tokens_per_second",
  "torch_dtype", "transformers_version", "use_cache", "video_token_id", "vision_config",
  "vision_end_token_id", "vision_start_token_id", "vision_token_id",
}
# Fields of which one value is implemented.
_TEXT_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0}
_VISION_FIXED = {"hidden_act": "silu", "in_channels": 3, "in_chans": 3}
_TEXT_READ = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
              "rope_scaling", "rope_parameters", "layer_types", "image_token_id",
              "tie_word_embeddings"}
_VISION_READ = {"depth", "hidden_size", "intermediate_size", "num_heads", "patch_size",
                "spatial_merge_size", "temporal_patch_size", "window_size", "out_hidden_size",
                "fullatt_block_indexes", "rope_parameters"}


def model_config(folder: str | os.PathLike, *, compute_dtype: str, remat: str,
                 unroll: int) -> ModelConfig:
  """Reads FOLDER/config.json.

  Args:
    folder: a Hugging Face folder.
    compute_dtype, remat, unroll: as in ModelConfig; no folder has them.

  Raises:
    ValueError: names the field that is missing, unknown, or has a value not implemented here.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.is_file():
    raise ValueError(f"{path} does not exist; pass a folder in Hugging Face form")
  try:
    outer = json.loads(path.read_text(encoding="utf-8"))
    return _model_config(outer, compute_dtype=compute_dtype, remat=remat, unroll=unroll)
  except KeyError as error:
    raise ValueError(f"{path}: field {error} is missing") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def config_fields(config: ModelConfig, tokenizer) -> dict:
  """The fields of a config.json, flat as transformers 4 wrote them: servers read both forms.

  Args:
    config: sizes.
    tokenizer: gives the ids of the control tokens.

  Raises:
    ValueError: embed is not heads * head_dim, which config.json cannot say.
  """
  if config.embed != config.heads * config.head_dim:
    raise ValueError(f"embed {config.embed} is not heads {config.heads} * head_dim "
                     f"{config.head_dim}; a Hugging Face Qwen2.5-VL has no other sizes")
  vision = config.vision
  start, end, video = tokenizer.convert_tokens_to_ids(
    ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"])
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "torch_dtype": "float32", "vocab_size": config.vocab, "hidden_size": config.embed,
    "intermediate_size": config.mlp, "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
    "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
    "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_sections)},
    "use_sliding_window": False, "attention_dropout": 0.0, "tie_word_embeddings": config.tied,
    "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    "pad_token_id": tokenizer.pad_token_id, "image_token_id": config.image_token,
    "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end,
    "vision_config": {
      "model_type": "qwen2_5_vl", "depth": vision.depth, "hidden_size": vision.hidden,
      "hidden_act": "silu", "intermediate_size": vision.mlp, "num_heads": vision.heads,
      "in_channels": 3, "patch_size": vision.patch, "spatial_merge_size": vision.merge,
      "temporal_patch_size": vision.temporal_patch, "window_size": vision.window,
      "out_hidden_size": vision.out, "fullatt_block_indexes": list(vision.full_attention)}}


def _model_config(outer: dict, **run) -> ModelConfig:
  if outer["model_type"] != "qwen2_5_vl":
    raise ValueError(f"model_type is {outer['model_type']!r}; only 'qwen2_5_vl' is implemented")
  # As in transformers 5, a nested text_config alone describes the text model. Fields outside of it
  # are only checked for unknown ones.
  text = outer["text_config"] if "text_config" in outer else outer
  vision = outer["vision_config"]
  _check(outer | text, _TEXT_READ, _TEXT_FIXED, "")
  _check(vision, _VISION_READ, _VISION_FIXED, "vision_config.")
  heads, embed = _integer(text, "num_attention_heads"), _integer(text, "hidden_size")
  has_kv_heads = text["num_key_value_heads"] is not None
  if embed % heads:
    raise ValueError(f"hidden_size {embed} is not a multiple of num_attention_heads {heads}")
  layers, kinds = _integer(text, "num_hidden_layers"), text.get("layer_types")
  if kinds is not None and list(kinds) != ["full_attention"] * layers:
    raise ValueError(f"layer_types {kinds}: only full_attention in all {layers} layers is "
                     "implemented")
  theta, sections = _rope(text)
  return ModelConfig(
    vocab=_integer(text, "vocab_size"), embed=embed, layers=layers, heads=heads,
    # null: every query head has its own kv head.
    kv_heads=_integer(text, "num_key_value_heads") if has_kv_heads else heads,
    head_dim=embed // heads, mlp=_integer(text, "intermediate_size"), rope_theta=theta,
    mrope_sections=sections, norm_eps=_number(text, "rms_norm_eps"),
    # transformers 4 wrote it inside or outside; absent means untied.
    tied=any(fields.get("tie_word_embeddings", False) for fields in (text, outer)),
    vision=_vision(vision), image_token=_integer(outer, "image_token_id"), **run)


def _vision(vision: dict) -> VisionConfig:
  rope = vision.get("rope_parameters")
  if rope is not None and rope != {"rope_type": "axial", "rope_theta": 10_000}:
    raise ValueError(f"vision_config.rope_parameters {rope}: only axial, 10000 is implemented")
  sizes = {ours: _integer(vision, theirs, "vision_config.") for ours, theirs in (
    ("depth", "depth"), ("hidden", "hidden_size"), ("heads", "num_heads"),
    ("mlp", "intermediate_size"), ("patch", "patch_size"),
    ("temporal_patch", "temporal_patch_size"), ("merge", "spatial_merge_size"),
    ("window", "window_size"), ("out", "out_hidden_size"))}
  return VisionConfig(full_attention=tuple(vision["fullatt_block_indexes"]), **sizes)


def _rope(text: dict) -> tuple[float, tuple[int, int, int]]:
  # As in transformers, rope_scaling (version 4) has precedence over rope_parameters (5), and a
  # rope_theta inside over one outside.
  rope = text.get("rope_scaling") or text["rope_parameters"]
  kind = rope["rope_type"] if "rope_type" in rope else rope["type"]
  theta = _number(rope if "rope_theta" in rope else text, "rope_theta")
  extra = rope.keys() - {"rope_type", "type", "rope_theta", "mrope_section"}
  if kind not in ("default", "mrope") or extra:
    raise ValueError(f"rotary embedding {rope}: only type default or mrope without scaling is "
                     "implemented")
  return theta, tuple(rope["mrope_section"])


def _integer(fields: dict, name: str, prefix: str = "") -> int:
  if type(fields[name]) is not int:
    raise ValueError(f"{prefix}{name} is {fields[name]!r}; it must be one integer")
  return fields[name]


def _number(fields: dict, name: str) -> float:
  if type(fields[name]) not in (int, float):
    raise ValueError(f"{name} is {fields[name]!r}; it must be one number")
  return float(fields[name])


def _check(fields: dict, read: set[str], fixed: dict, prefix: str) -> None:
  for name, value in fields.items():
    if name in fixed:
      if value != fixed[name]:
        raise ValueError(f"{prefix}{name} is {value!r}; only {fixed[name]!r} is implemented")
    elif name not in read | _IRRELEVANT:
      raise ValueError(f"{prefix}{name} = {value!r} is unknown; if it cannot change the "
                       "model's output, remove it from config.json")
