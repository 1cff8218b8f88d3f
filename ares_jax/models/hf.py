"""Hugging Face folders in and out: config.json, safetensors, and one rule table for both ways.

Importing this needs neither torch nor transformers. Tensors are read in slices, so a host holds
only its own shards, and written in the base folder's dtypes, names and files, so a model that was
not trained comes back byte for byte.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from ares_jax.models.config import ModelConfig
from ares_jax.models.hf_config import model_config
from ares_jax.models.weights import Params, Weight, name_of, shardings, table

__all__ = ["RULES", "from_hf", "model_config", "sources_of", "to_hf", "to_theirs"]

Folder = str | os.PathLike
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one of our tensors and its Hugging Face tensors relate.

  name: theirs, {layer} where ours is stacked over blocks.
  inputs: how many leading dimensions of ours (behind the layer axis) a matmul contracts. Theirs is
    a matrix [outputs, inputs], ours [inputs..., outputs...]; 0: same order, only reshaped.
  """

  name: str
  inputs: int


_TEXT, _TOWER = "model.layers.{layer}.", "visual.blocks.{layer}."
RULES = {
  "embed": Rule("model.embed_tokens.weight", 0),
  "unembed": Rule("lm_head.weight", 0),
  "final_norm": Rule("model.norm.weight", 0),
  "blocks/attention_norm": Rule(_TEXT + "input_layernorm.weight", 0),
  "blocks/q": Rule(_TEXT + "self_attn.q_proj.weight", 1),
  "blocks/q_bias": Rule(_TEXT + "self_attn.q_proj.bias", 0),
  "blocks/k": Rule(_TEXT + "self_attn.k_proj.weight", 1),
  "blocks/k_bias": Rule(_TEXT + "self_attn.k_proj.bias", 0),
  "blocks/v": Rule(_TEXT + "self_attn.v_proj.weight", 1),
  "blocks/v_bias": Rule(_TEXT + "self_attn.v_proj.bias", 0),
  "blocks/o": Rule(_TEXT + "self_attn.o_proj.weight", 2),
  "blocks/mlp_norm": Rule(_TEXT + "post_attention_layernorm.weight", 0),
  "blocks/gate": Rule(_TEXT + "mlp.gate_proj.weight", 1),
  "blocks/up": Rule(_TEXT + "mlp.up_proj.weight", 1),
  "blocks/down": Rule(_TEXT + "mlp.down_proj.weight", 1),
  "vision/patch": Rule("visual.patch_embed.proj.weight", 1),
  "vision/blocks/attention_norm": Rule(_TOWER + "norm1.weight", 0),
  "vision/blocks/qkv": Rule(_TOWER + "attn.qkv.weight", 1),
  "vision/blocks/qkv_bias": Rule(_TOWER + "attn.qkv.bias", 0),
  "vision/blocks/o": Rule(_TOWER + "attn.proj.weight", 2),
  "vision/blocks/o_bias": Rule(_TOWER + "attn.proj.bias", 0),
  "vision/blocks/mlp_norm": Rule(_TOWER + "norm2.weight", 0),
  "vision/blocks/gate": Rule(_TOWER + "mlp.gate_proj.weight", 1),
  "vision/blocks/gate_bias": Rule(_TOWER + "mlp.gate_proj.bias", 0),
  "vision/blocks/up": Rule(_TOWER + "mlp.up_proj.weight", 1),
  "vision/blocks/up_bias": Rule(_TOWER + "mlp.up_proj.bias", 0),
  "vision/blocks/down": Rule(_TOWER + "mlp.down_proj.weight", 1),
  "vision/blocks/down_bias": Rule(_TOWER + "mlp.down_proj.bias", 0),
  "vision/merger/norm": Rule("visual.merger.ln_q.weight", 0),
  "vision/merger/up": Rule("visual.merger.mlp.0.weight", 1),
  "vision/merger/up_bias": Rule("visual.merger.mlp.0.bias", 0),
  "vision/merger/down": Rule("visual.merger.mlp.2.weight", 1),
  "vision/merger/down_bias": Rule("visual.merger.mlp.2.bias", 0),
}
# transformers in memory, and folders some tools write, nest the two halves one level deeper.
_NESTED = (("model.language_model.", "model."), ("model.visual.", "visual."))


def from_hf(folder: Folder, config: ModelConfig, mesh: Mesh | None,
            dtype: jnp.dtype = jnp.float32) -> Params:
  """Reads the weights of a folder, each device's part straight to that device.

  Args:
    folder: holds model.safetensors or the shards an index names.
    config: sizes, usually `model_config(folder, ...)`.
    mesh: where to put the weights; None is the default device.
    dtype: of the parameters.

  Raises:
    ValueError: naming every tensor that is missing, unknown or of another shape.
  """
  weights = table(config)
  targets = jax.tree.map(lambda _: None, weights) if mesh is None else shardings(config, mesh)
  with contextlib.ExitStack() as stack:
    tensors = _open(folder, stack)
    _check(tensors, config, folder)

    def tensor(path, weight: Weight, target):
      rule = RULES[name_of(path)]

      def part(index) -> np.ndarray:
        return _read(tensors, rule, weight.shape, index, dtype)

      if target is None:
        return jnp.asarray(part((slice(None),) * len(weight.shape)))
      return jax.make_array_from_callback(weight.shape, target, part)

    return jax.tree_util.tree_map_with_path(tensor, weights, targets)


def to_hf(params: Params, config: ModelConfig, folder: Folder, base: Folder) -> None:
  """Writes a folder that transformers and vLLM load.

  Names, files, dtypes, config, tokenizer and preprocessor are those of `base`, the weights ours.
  The folder appears whole or not at all. Every process must call this; process 0 writes.

  Args:
    params: the weights.
    config: sizes.
    folder: must not exist yet.
    base: the Hugging Face folder the model came from.

  Raises:
    ValueError: the folder exists, or base holds other tensors than config asks for.
  """
  folder, base = pathlib.Path(folder), pathlib.Path(base)
  if folder.exists():
    raise ValueError(f"{folder} exists; export to a new folder")
  with contextlib.ExitStack() as stack:
    tensors = _open(base, stack)
    _check(tensors, config, base)
    sources = sources_of(config)
    flat = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    writes = jax.process_index() == 0
    if writes:
      folder.parent.mkdir(parents=True, exist_ok=True)
      partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
      stack.callback(shutil.rmtree, partial, ignore_errors=True)
    for file, names in _by_file(tensors).items():
      shard = {}
      for name in names:
        path, layer = sources[name]
        ours = _fetch(flat[path], layer)
        if writes:
          theirs = to_theirs(ours, path).reshape(tensors[name].shape)
          shard[tensors[name].stored] = np.ascontiguousarray(theirs.astype(tensors[name].dtype))
      if writes:
        save_file(shard, partial / file, metadata={"format": "pt"})
    if writes:
      for path in base.iterdir():
        if path.suffix in (".json", ".txt", ".jinja", ".model") and path.is_file():
          shutil.copyfile(path, partial / path.name)
      partial.chmod(0o755)  # mkdtemp's folders are private
      partial.rename(folder)


def sources_of(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
  """Their name -> our path and block of every tensor the config asks for."""
  sources = {}
  for path, weight in jax.tree_util.tree_leaves_with_path(table(config)):
    rule = RULES[name_of(path)]
    if "{layer}" in rule.name:
      for layer in range(weight.shape[0]):
        sources[rule.name.format(layer=layer)] = name_of(path), layer
    else:
      sources[rule.name] = name_of(path), None
  if config.tied:
    # Some tied folders store the matrix twice.
    sources["lm_head.weight"] = "embed", None
  return sources


def to_theirs(ours: np.ndarray, path: str) -> np.ndarray:
  """One tensor of ours, without the layer axis, in their order of values."""
  inputs = RULES[path].inputs
  return ours.reshape(math.prod(ours.shape[:inputs]), -1).T if inputs else ours


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """One tensor of a folder, not read yet."""

  file: str
  stored: str  # its name in the file
  shape: tuple[int, ...]
  dtype: np.dtype
  slices: Any  # safetensors' lazy slice


def _open(folder: Folder, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
  """All tensors of a folder by their flat name; files stay open until `stack` closes."""
  folder = pathlib.Path(folder)
  if (folder / INDEX).exists():
    files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
  else:
    files = ["model.safetensors"]
  tensors = {}
  for file in files:
    if not (folder / file).is_file():
      raise ValueError(f"{folder}: no {file}; this is no folder of safetensors weights, or a shard "
                       "was not downloaded")
    opened = stack.enter_context(safe_open(folder / file, framework="np"))
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
      tensors[name] = _Tensor(file, stored, tuple(slices.get_shape()), np.dtype(dtype), slices)
  return tensors


def _check(tensors: dict[str, _Tensor], config: ModelConfig, folder: Folder) -> None:
  shapes = {name_of(path): weight.shape
            for path, weight in jax.tree_util.tree_leaves_with_path(table(config))}
  sources = sources_of(config)
  missing = sources.keys() - tensors.keys() - ({"lm_head.weight"} if config.tied else set())
  unknown = tensors.keys() - sources.keys()
  faults = [f"missing {name}" for name in sorted(missing)]
  faults += [f"unknown {tensors[name].stored}" for name in sorted(unknown)]
  for name in sorted(sources.keys() & tensors.keys()):
    path, layer = sources[name]
    ours = shapes[path] if layer is None else shapes[path][1:]
    want = _their_shape(path, ours, config)
    if tensors[name].shape != want:
      faults.append(f"{name} is {tensors[name].shape} instead of {want}")
  if faults:
    raise ValueError(f"{folder} does not hold this model: " + "; ".join(faults))
  if config.tied and "lm_head.weight" in tensors:
    head, embed = (tensors[name].slices[:] for name in ("lm_head.weight", RULES["embed"].name))
    if not np.array_equal(head, embed):
      raise ValueError(f"{folder}: config.json ties lm_head.weight to the embedding, but they "
                       "differ; set tie_word_embeddings to false")


def _their_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
  inputs = RULES[path].inputs
  if path == "vision/patch":  # a 3-D convolution there
    vision = config.vision
    return vision.hidden, 3, vision.temporal_patch, vision.patch, vision.patch
  if inputs:
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])
  return shape if path in ("embed", "unembed") else (math.prod(shape),)


def _read(tensors, rule: Rule, shape, index, dtype) -> np.ndarray:
  """The part `index` of one of our tensors, read from their files."""
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
  if "{layer}" not in rule.name:
    return _read_one(tensors[rule.name], rule.inputs, shape, index).astype(dtype)
  out = np.empty([part.stop - part.start for part in index], dtype)
  for place, layer in enumerate(range(index[0].start, index[0].stop)):
    tensor = tensors[rule.name.format(layer=layer)]
    out[place] = _read_one(tensor, rule.inputs, shape[1:], index[1:])
  return out


def _read_one(tensor: _Tensor, inputs: int, shape, index) -> np.ndarray:
  if not inputs:
    if len(tensor.shape) == len(shape):
      return tensor.slices[index]
    return tensor.slices[:].reshape(shape)[index]
  # Ours is [inputs..., outputs...], theirs the matrix [outputs, inputs]: the first dimension of
  # either group is read in part, the others, which no sharding splits, are cut behind.
  first, second = index[0], index[inputs]
  inner = math.prod(shape[1:inputs])
  outer = math.prod(shape[inputs + 1:])
  rows = slice(second.start * outer, second.stop * outer)
  if len(tensor.shape) == 2:
    matrix = tensor.slices[rows, first.start * inner:first.stop * inner]
  else:
    matrix = tensor.slices[rows].reshape(rows.stop - rows.start, -1)[:, first]
  part = matrix.T.reshape(first.stop - first.start, *shape[1:inputs],
                          second.stop - second.start, *shape[inputs + 1:])
  whole = slice(None)
  return part[(whole, *index[1:inputs], whole, *index[inputs + 1:])]


def _fetch(array: jax.Array, layer: int | None) -> np.ndarray:
  """One tensor, or one block of a stacked one, whole on every host."""
  array = array if layer is None else array[layer]
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def _by_file(tensors: dict[str, _Tensor]) -> dict[str, list[str]]:
  files = collections.defaultdict(list)
  for name, tensor in tensors.items():
    files[tensor.file].append(name)
  return files
