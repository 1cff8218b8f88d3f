"""Converts between the sizes of a model and a Hugging Face config.json.

Every field is used, known to be irrelevant, or refused by name; an absent one has transformers'
value. Two forms are read: the flat one of transformers 4, which the published folders have, and the
one of transformers 5, which nests `text_config`.
"""

import functools
import math
import os
import pathlib

from ares_jax.models.config import ModelConfig, VisionConfig
from ares_jax.models.families import FAMILIES, REFUSED, REQUIRED, Family, Fields
from ares_jax.models.hf_files import read_object

# Fields that cannot change a forward pass over text and images: bookkeeping, special ids that the
# tokenizer has too, initialisation, length limits, video timing, window sizes of the text
# attention, which `use_sliding_window: false` turns off, and those that transformers 4 wrote for
# every model. So are fields that begin with one of _PRIVATE, and unknown ones that are null.
_IRRELEVANT = set("""
  architectures auto_map bos_token_id dtype eos_token_id initializer_range max_position_embeddings
  max_window_layers model_type pad_token_id sliding_window spatial_patch_size text_config
  tokens_per_second torch_dtype transformers_version use_cache video_token_id vision_config
  vision_end_token_id vision_start_token_id vision_token_id
  add_cross_attention attn_implementation bad_words_ids begin_suppress_tokens
  chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
  do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder
  is_llama_config label2id length_penalty max_length min_length no_repeat_ngram_size
  num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
  output_scores prefix pretraining_tp problem_type
  pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
  sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
  tokenizer_class top_k top_p torchscript transformers.js_config typical_p use_bfloat16
""".split())
_PRIVATE = ("_", "unsloth_")


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
  for adapter in sorted(path.parent.glob("adapter_model.*")):  # transformers adds it to the weights
    raise ValueError(f"{folder} holds an adapter, {adapter.name}, which is not read; merge it into "
                     "the weights with peft's merge_and_unload, or remove it")
  if not path.is_file():
    raise ValueError(f"{path} does not exist; pass a folder in Hugging Face form")
  outer = read_object(path)
  try:
    return _model_config(outer, compute_dtype=compute_dtype, remat=remat, unroll=unroll)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def config_fields(config: ModelConfig, tokenizer, *, max_tokens: int, dtype: str) -> dict:
  """The fields of a config.json, flat as transformers 4 wrote them: servers read both forms.

  Args:
    config: sizes.
    tokenizer: gives the ids of the control tokens.
    max_tokens: longest prompt and answer together that the model has seen.
    dtype: of the weights.

  Raises:
    ValueError: embed is not heads * head_dim, which config.json cannot say, or the tower is not
      that of Qwen2.5-VL.
  """
  if config.vision.family != "qwen2_5_vl":
    raise ValueError(f"vision.family is {config.vision.family!r}; a model without a base folder is "
                     "exported as Qwen2.5-VL alone")
  if config.embed != config.heads * config.head_dim:
    raise ValueError(f"embed {config.embed} is not heads {config.heads} * head_dim "
                     f"{config.head_dim}; a Hugging Face Qwen2.5-VL has no other sizes")
  vision = config.vision
  start, end, video = tokenizer.convert_tokens_to_ids(
    ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"])
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "torch_dtype": dtype, "max_position_embeddings": max_tokens, "vocab_size": config.vocab,
    "hidden_size": config.embed, "intermediate_size": config.mlp,
    "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads, "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
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
  kind = outer.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    lacks = isinstance(kind, str) and REFUSED.get(kind)
    raise ValueError(f"model_type is {kind!r}{f', {lacks}' if lacks else ''}; implemented are "
                     f"{', '.join(FAMILIES)}")
  family = FAMILIES[kind]
  # As in transformers 5, a nested text_config alone describes the text model. Fields outside of it
  # are only checked for unknown ones.
  inner = outer if outer.get("text_config") is None else _object(outer, "text_config")
  _check(outer | inner, family.text, "")
  text = _complete(inner, family.text, "")
  heads, embed = _integer(text, "num_attention_heads"), _integer(text, "hidden_size")
  # null: every query head has its own kv head.
  kv_heads = heads if text["num_key_value_heads"] is None else _integer(text, "num_key_value_heads")
  layers, kinds = _integer(text, "num_hidden_layers"), text.get("layer_types")
  if kinds is not None and kinds != ["full_attention"] * layers:
    raise ValueError(f"layer_types {kinds}: only full_attention in all {layers} layers is "
                     "implemented")
  head_dim = _head_dim(text, family.free_head_dim)
  theta, sections = _rope(text, head_dim, family)
  vision, image_token = None, None
  if family.tower:
    vision = _vision(_object(outer, "vision_config"), kind)
    image_token = _integer(family.text.read | outer, "image_token_id")
  return ModelConfig(
    vocab=_integer(text, "vocab_size"), embed=embed, layers=layers, heads=heads, kv_heads=kv_heads,
    head_dim=head_dim, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm,
    mlp=_integer(text, "intermediate_size"), rope_theta=theta, mrope_sections=sections,
    mrope_interleaved=family.interleaved, norm_eps=_number(text, "rms_norm_eps"),
    # transformers 4 wrote it inside or outside.
    tied=any(_truth(fields, "tie_word_embeddings") for fields in (text, outer)),
    vision=vision, image_token=image_token, **run)


def _head_dim(text: dict, free: bool) -> int:
  heads, embed = text["num_attention_heads"], text["hidden_size"]
  if free and text["head_dim"] is not None:
    return _integer(text, "head_dim")
  if heads < 1 or embed % heads:
    raise ValueError(f"hidden_size {embed} is not a multiple of num_attention_heads {heads}")
  if text["head_dim"] not in (None, embed // heads):
    raise ValueError(f"head_dim is {text['head_dim']!r}; only hidden_size / num_attention_heads = "
                     f"{embed // heads} is implemented")
  return embed // heads


def _vision(given: dict, kind: str) -> VisionConfig:
  known = FAMILIES[kind].tower.fields
  _check(given, known, "vision_config.")
  vision = _complete(given, known, "vision_config.")
  rope = vision["rope_parameters"]
  if rope is not None and rope != {"rope_type": "axial", "rope_theta": 10_000}:
    raise ValueError(f"vision_config.rope_parameters {rope}: only axial, 10000 is implemented")
  number = functools.partial(_integer, vision, prefix="vision_config.")
  sizes = dict(family=kind, depth=number("depth"), heads=number("num_heads"),
               patch=number("patch_size"), temporal_patch=number("temporal_patch_size"),
               merge=number("spatial_merge_size"), window=0, full_attention=())
  if kind == "qwen2_vl":
    hidden = number("embed_dim")
    return VisionConfig(**sizes, hidden=hidden, mlp=hidden * number("mlp_ratio"),
                        out=number("hidden_size"))
  sizes |= dict(hidden=number("hidden_size"), mlp=number("intermediate_size"),
                out=number("out_hidden_size"))
  if kind == "qwen2_5_vl":
    # Indexes of blocks that are not there select nothing: shortened towers keep those of the base.
    full = tuple(x for x in _integers(vision, "fullatt_block_indexes", "vision_config.")
                 if 0 <= x < sizes["depth"])
    return VisionConfig(**sizes | dict(window=number("window_size"), full_attention=full))
  positions = number("num_position_embeddings")
  side = math.isqrt(max(positions, 0))
  if side < 1 or side**2 != positions:
    raise ValueError(f"vision_config.num_position_embeddings is {positions}; it must be a square "
                     "number")
  return VisionConfig(**sizes, positions=side, deepstack=_integers(
    vision, "deepstack_visual_indexes", "vision_config."))


def _rope(text: dict, head_dim: int, family: Family) -> tuple[float, tuple[int, int, int]]:
  """(base of the frequencies, how many of them turn with time, height and width)."""
  # As in transformers, rope_scaling (version 4) has precedence over rope_parameters (5), and a
  # rope_theta inside over one outside.
  name = "rope_scaling" if text["rope_scaling"] else "rope_parameters"
  rope = _object(text, name) if text[name] else {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  known, fields = ("default",), {"rope_type", "type", "rope_theta"}
  if family.sections:
    known, fields = ("default", "mrope"), fields | {"mrope_section"}
  if family.interleaved:
    fields |= {"mrope_interleaved"}
  if kind not in known or rope.keys() - fields:
    raise ValueError(f"rotary embedding {rope}: only type {' or '.join(known)} without scaling is "
                     "implemented")
  if rope.get("mrope_interleaved", True) is not True:
    raise ValueError(f"{name}.mrope_interleaved is {rope['mrope_interleaved']!r}; only True is "
                     "implemented")
  rope = {"mrope_section": family.sections, "rope_theta": text["rope_theta"]} | rope
  if not family.sections:  # the positions of a text are the same on all three axes
    return _number(rope, "rope_theta"), (head_dim // 2, 0, 0)
  sections = _integers(rope, "mrope_section", f"{name}.")
  if len(sections) != 3:
    raise ValueError(f"{name}.mrope_section is {list(sections)}; it must be three integers: "
                     "frequencies for time, height and width")
  return _number(rope, "rope_theta"), sections


def _check(fields: dict, known: Fields, prefix: str) -> None:
  """Raises ValueError for a field that is unknown, or has a value that is not implemented."""
  for name, value in fields.items():
    if name in known.fixed:
      if value not in known.fixed[name]:
        raise ValueError(f"{prefix}{name} is {value!r}; only {known.fixed[name][0]!r} is "
                         "implemented")
    elif not (name in known.read or name in _IRRELEVANT or name.startswith(_PRIVATE)
              or value is None):
      raise ValueError(f"{prefix}{name} = {value!r} is unknown; if it cannot change the "
                       "model's output, remove it from config.json")


def _complete(fields: dict, known: Fields, prefix: str) -> dict:
  """The fields that are read, with the value of those that the file leaves out."""
  complete = known.read | {name: fields[name] for name in known.read if name in fields}
  for name, value in complete.items():
    if value is REQUIRED:
      raise ValueError(f"field '{prefix}{name}' is missing")
  return complete


def _object(fields: dict, name: str) -> dict:
  value = fields.get(name)
  if not isinstance(value, dict):
    raise ValueError(f"{name} is {value!r}; it must be an object" if name in fields else
                     f"field '{name}' is missing")
  return value


def _integer(fields: dict, name: str, prefix: str = "") -> int:
  if type(fields[name]) is not int:
    raise ValueError(f"{prefix}{name} is {fields[name]!r}; it must be one integer")
  return fields[name]


def _integers(fields: dict, name: str, prefix: str) -> tuple[int, ...]:
  value = fields[name]
  if not isinstance(value, list | tuple) or any(type(number) is not int for number in value):
    raise ValueError(f"{prefix}{name} is {value!r}; it must be a list of integers")
  return tuple(value)


def _number(fields: dict, name: str) -> float:
  if type(fields[name]) not in (int, float):
    raise ValueError(f"{name} is {fields[name]!r}; it must be one number")
  return float(fields[name])


def _truth(fields: dict, name: str) -> bool:
  value = fields.get(name, False)
  if type(value) is not bool:
    raise ValueError(f"{name} is {value!r}; it must be true or false")
  return value
