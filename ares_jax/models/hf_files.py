"""The tensors of a Hugging Face folder: their files and shapes, and which of ours each one is."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ares_jax.models.config import ModelConfig
from ares_jax.models.weights import Params, name_of, weight_table

Folder = str | os.PathLike
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_object(path: Folder) -> dict:
  """The JSON object in a file of a folder; ValueError names the file where there is none."""
  try:
    fields = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except ValueError as error:  # no UTF-8, no JSON
    raise ValueError(f"{path} is damaged, download it again: {error}") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{path} holds {_KINDS[type(fields)]}, not a JSON object")
  return fields


def write_object(path: Folder, fields: dict) -> None:
  """Writes a JSON object, indented as transformers does."""
  pathlib.Path(path).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value",
          type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one of our tensors maps to its Hugging Face tensors."""

  name: str  # of the Hugging Face tensor, with {layer} where ours is stacked over blocks
  # Leading dimensions of our tensor, after the layer axis, that a matmul contracts: ours is
  # [inputs..., outputs...], theirs the matrix [outputs, inputs]. 0 = same order, only reshaped.
  inputs: int


def _with_biases(modules: dict[str, tuple[str, int]]) -> dict[str, Rule]:
  """The rules of weights, {path: (module, `Rule.inputs`)}, and of biases in the same modules."""
  return {path: Rule(f"{module}.weight", inputs) for path, (module, inputs) in modules.items()} | {
    f"{path}_bias": Rule(f"{module}.bias", 0) for path, (module, _) in modules.items()}


_TEXT, _TOWER = "model.layers.{layer}.", "visual.blocks.{layer}."
_MERGERS = "visual.deepstack_merger_list.{layer}."
# A bias stands beside the weight, in the same module. Some families have other modules,
# `families.Tower.names`, with the same order of values.
RULES = _with_biases({
  "embed": ("model.embed_tokens", 0),
  "unembed": ("lm_head", 0),
  "final_norm": ("model.norm", 0),
  "blocks/attention_norm": (_TEXT + "input_layernorm", 0),
  "blocks/q": (_TEXT + "self_attn.q_proj", 1),
  "blocks/k": (_TEXT + "self_attn.k_proj", 1),
  "blocks/v": (_TEXT + "self_attn.v_proj", 1),
  "blocks/q_norm": (_TEXT + "self_attn.q_norm", 0),
  "blocks/k_norm": (_TEXT + "self_attn.k_norm", 0),
  "blocks/o": (_TEXT + "self_attn.o_proj", 2),
  "blocks/mlp_norm": (_TEXT + "post_attention_layernorm", 0),
  "blocks/gate": (_TEXT + "mlp.gate_proj", 1),
  "blocks/up": (_TEXT + "mlp.up_proj", 1),
  "blocks/down": (_TEXT + "mlp.down_proj", 1),
  "vision/patch": ("visual.patch_embed.proj", 1),
  "vision/positions": ("visual.pos_embed", 0),
  "vision/blocks/attention_norm": (_TOWER + "norm1", 0),
  "vision/blocks/qkv": (_TOWER + "attn.qkv", 1),
  "vision/blocks/o": (_TOWER + "attn.proj", 2),
  "vision/blocks/mlp_norm": (_TOWER + "norm2", 0),
  "vision/blocks/gate": (_TOWER + "mlp.gate_proj", 1),
  "vision/blocks/up": (_TOWER + "mlp.up_proj", 1),
  "vision/blocks/down": (_TOWER + "mlp.down_proj", 1),
  "vision/merger/norm": ("visual.merger.ln_q", 0),
  "vision/merger/up": ("visual.merger.mlp.0", 1),
  "vision/merger/down": ("visual.merger.mlp.2", 1),
  "vision/deepstack/norm": (_MERGERS + "norm", 0),
  "vision/deepstack/up": (_MERGERS + "linear_fc1", 1),
  "vision/deepstack/down": (_MERGERS + "linear_fc2", 1),
})
# Qwen3-VL, transformers in memory, and some tools nest decoder and tower one level deeper.
_NESTED = (("model.language_model.", "model."), ("model.visual.", "visual."))
HEAD = RULES["unembed"].name


def sources_of(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
  """Hugging Face name -> our path and block, for every tensor of a model with these sizes."""
  sources, others = {}, config.vision.tower.names if config.vision else {}
  for path, weight in by_name(weight_table(config)).items():
    module, _, kind = RULES[path].name.rpartition(".")
    name = f"{others.get(path.removesuffix('_bias'), module)}.{kind}"
    if "{layer}" in name:
      for layer in range(weight.shape[0]):
        sources[name.format(layer=layer)] = path, layer
    else:
      sources[name] = path, None
  if config.tied:
    # Some tied folders store the matrix twice.
    sources[HEAD] = "embed", None
  return sources


def to_theirs(ours: np.ndarray, path: str) -> np.ndarray:
  """One of our tensors, without the layer axis, in the Hugging Face order of values."""
  inputs = RULES[path].inputs
  return ours.reshape(math.prod(ours.shape[:inputs]), -1).T if inputs else ours


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a folder, described from a file's header."""

  file: str
  stored: str  # its name in the file
  shape: tuple[int, ...]
  dtype: np.dtype


def tensors_of(folder: Folder) -> dict[str, Tensor]:
  """All tensors of a folder by their flat name, from the headers of its files."""
  folder = pathlib.Path(folder)
  files = _files(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
  if SINGLE not in files and (folder / SINGLE).exists():
    raise ValueError(f"{folder} holds {SINGLE}, which transformers reads, and {INDEX} of other "
                     "weights; remove the one that is not the model's")
  tensors = {}
  for file in files:
    if not (folder / file).is_file():
      raise ValueError(f"{folder}: no {file}; this is not a folder of safetensors weights, or a "
                       "file was not downloaded")
    with _opened(folder / file) as opened:
      for stored in opened.keys():
        slices = opened.get_slice(stored)
        name = stored
        for nested, flat in _NESTED:
          if name.startswith(nested):
            name = flat + name[len(nested):]
        dtype = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}.get(slices.get_dtype())
        if dtype is None:
          raise ValueError(f"{folder}/{file}: {stored} is {slices.get_dtype()}; only F32, BF16 and "
                           "F16 weights can be read (quantised folders cannot)")
        if name in tensors:
          raise ValueError(f"{folder}: {name} is in {tensors[name].file} and in {file}; remove the "
                           "file of another download")
        tensors[name] = Tensor(file, stored, tuple(slices.get_shape()), np.dtype(dtype))
  return tensors


def _files(index: pathlib.Path) -> list[str]:
  """The files of weights that an index names."""
  files = read_object(index).get("weight_map")
  if not isinstance(files, dict) or not all(
      isinstance(file, str) and file == pathlib.Path(file).name for file in files.values()):
    raise ValueError(f"{index}: weight_map does not name the file of each tensor, in this folder; "
                     "download it again")
  return sorted(set(files.values()))


def _opened(path: pathlib.Path):
  try:
    return safe_open(path, framework="np")
  except SafetensorError as error:
    raise ValueError(f"{path} is damaged or cut short, download it again: {error}") from error


def tensors_for(config: ModelConfig, dtype: str) -> dict[str, Tensor]:
  """The tensors of a new folder, in one file."""
  return {name: Tensor(SINGLE, name, shape, jnp.dtype(dtype))
          for name, shape in shapes_of(config).items() if name != HEAD or not config.tied}


def check_tensors(tensors: dict[str, Tensor], config: ModelConfig, folder: Folder) -> None:
  """Raises ValueError naming every tensor that is missing, unknown or of another shape."""
  shapes = shapes_of(config)
  missing = shapes.keys() - tensors.keys() - ({HEAD} if config.tied else set())
  errors = [f"missing {name}" for name in sorted(missing)]
  errors += [f"unknown {tensors[name].stored}" for name in sorted(tensors.keys() - shapes.keys())]
  errors += [f"{name} is {tensors[name].shape} instead of {shapes[name]}"
             for name in sorted(shapes.keys() & tensors.keys())
             if tensors[name].shape != shapes[name]]
  if errors:
    raise ValueError(f"{folder} does not hold this model: " + "; ".join(errors))
  if config.tied and HEAD in tensors:
    head, embed = tensors[HEAD], tensors[RULES["embed"].name]
    if not _same(pathlib.Path(folder), head, embed):
      raise ValueError(f"{folder}: config.json ties lm_head.weight to the embedding, but they "
                       "differ; set tie_word_embeddings to false")


def _same(folder: pathlib.Path, one: Tensor, other: Tensor, rows: int = 4096) -> bool:
  """Whether two matrices of a folder are equal, read `rows` rows at a time."""
  with (safe_open(folder / one.file, framework="np") as first,
        safe_open(folder / other.file, framework="np") as second):
    left, right = first.get_slice(one.stored), second.get_slice(other.stored)
    # safetensors refuses a slice that ends after the tensor.
    parts = [slice(start, min(start + rows, one.shape[0]))
             for start in range(0, one.shape[0], rows)]
    return all(np.array_equal(left[part], right[part]) for part in parts)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor of a folder by its flat name."""
  ours, vision = by_name(weight_table(config)), config.vision

  def theirs(path, layer):
    shape = ours[path].shape if layer is None else ours[path].shape[1:]
    inputs = RULES[path].inputs
    if path == "vision/patch":  # theirs is a 3-D convolution
      return vision.hidden, 3, vision.temporal_patch, vision.patch, vision.patch
    if inputs:
      return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return shape if path in ("embed", "unembed", "vision/positions") else (math.prod(shape),)

  return {name: theirs(*source) for name, source in sources_of(config).items()}


def by_name(tree: Params) -> dict[str, Any]:
  """The leaves of a tree of parameters by our names, such as "blocks/q"."""
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def by_file(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
  """Names of the tensors in each file."""
  files = collections.defaultdict(list)
  for name, tensor in tensors.items():
    files[tensor.file].append(name)
  return files
