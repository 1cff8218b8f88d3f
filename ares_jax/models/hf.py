"""Hugging Face folders in and out: config.json, safetensors, and one rule table for both ways.

Importing this needs neither torch nor transformers. Files are read one after the other and tensor
by tensor, in slices: a host holds its own part of one tensor at a time. Weights are written in the
base folder's dtypes, names and files, so a model that was not trained comes back byte for byte.
"""

import contextlib
import functools
import json
import math
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from ares_jax.models import hf_files, hf_processor
from ares_jax.models.config import ModelConfig
from ares_jax.models.hf_config import config_fields, model_config
from ares_jax.models.hf_files import RULES, Folder, Rule, Tensor, sources_of
from ares_jax.models.weights import Params, name_of, shardings, weight_table

__all__ = ["from_hf", "model_config", "to_hf", "to_new_hf"]


def from_hf(folder: Folder, config: ModelConfig, mesh: Mesh | None,
            dtype: jnp.dtype = jnp.float32) -> Params:
  """Reads the weights of a folder, each device's part straight to that device.

  Besides the parameters a host holds its part of one tensor of the folder at a time, in the file's
  dtype: blocks go one by one into the stacked arrays on the devices, where they are cast.

  Args:
    folder: holds model.safetensors or the shards an index names.
    config: sizes, usually `model_config(folder, ...)`.
    mesh: where to put the weights; None is the default device.
    dtype: of the parameters.

  Raises:
    ValueError: naming every tensor that is missing, unknown or of another shape.
  """
  weights, tensors, sources = weight_table(config), hf_files.tensors_of(folder), sources_of(config)
  hf_files.check_tensors(tensors, config, folder)
  weight_of = hf_files.by_name(weights)
  target_of = (dict.fromkeys(weight_of) if mesh is None
               else hf_files.by_name(shardings(config, mesh)))
  loaded = {}
  for file, names in hf_files.by_file(tensors).items():
    with safe_open(pathlib.Path(folder) / file, framework="np") as opened:
      for name in names:
        path, layer = sources[name]
        if name == hf_files.HEAD and config.tied:  # a second copy of the embedding
          continue
        weight, target = weight_of[path], target_of[path]
        slices = opened.get_slice(tensors[name].stored)
        if layer is None:
          part = _put(slices, tensors[name], RULES[path], weight.shape, target)
          loaded[path] = part.astype(dtype)
        else:
          if path not in loaded:
            loaded[path] = jnp.zeros(weight.shape, dtype, device=target)
          block = None if mesh is None else NamedSharding(mesh, PartitionSpec(*target.spec[1:]))
          part = _put(slices, tensors[name], RULES[path], weight.shape[1:], block)
          loaded[path] = _set_layer(loaded[path], part, layer, target=target)
        # Without waiting, host copies of many tensors would queue for the devices.
        jax.block_until_ready(loaded[path])
  return jax.tree_util.tree_map_with_path(lambda path, _: loaded[name_of(path)], weights)


@functools.partial(jax.jit, static_argnames="target", donate_argnames="stack")
def _set_layer(stack, part, layer, *, target):
  """`stack` with one block replaced, in place; the cast happens here, on the device."""
  stack = jax.lax.dynamic_update_index_in_dim(stack, part.astype(stack.dtype), layer, 0)
  return stack if target is None else jax.lax.with_sharding_constraint(stack, target)


def _put(slices, tensor, rule: Rule, shape, target) -> jax.Array:
  """One tensor of theirs, in our order of values and its own dtype, on the devices."""
  if target is None:
    return jnp.asarray(_read(slices, tensor, rule.inputs, shape, (slice(None),) * len(shape)))
  parts = {}

  def part(index) -> np.ndarray:
    # Devices that hold the same part share one copy.
    key = tuple(slice(*s.indices(size)).start for s, size in zip(index, shape, strict=True))
    if key not in parts:
      parts[key] = _read(slices, tensor, rule.inputs, shape, index)
    return parts[key]

  return jax.make_array_from_callback(shape, target, part)


def _read(slices, tensor: Tensor, inputs: int, shape, index) -> np.ndarray:
  """The part `index` of a tensor in our order of values, from safetensors' lazy `slices`.

  Args:
    slices: what `get_slice` gave.
    tensor: its shape in the file.
    inputs: as in `Rule`.
    shape: ours, without the layer axis.
    index: slices, one a dimension of ours.
  """
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
  if not inputs:
    if len(tensor.shape) == len(shape):
      return slices[index]
    return slices[:].reshape(shape)[index]
  # Ours is [inputs..., outputs...], theirs the matrix [outputs, inputs]: the first dimension of
  # either group is read in part, the others, which no sharding splits, are cut behind.
  first, second = index[0], index[inputs]
  inner = math.prod(shape[1:inputs])
  outer = math.prod(shape[inputs + 1:])
  rows = slice(second.start * outer, second.stop * outer)
  if len(tensor.shape) == 2:
    matrix = slices[rows, first.start * inner:first.stop * inner]
  else:
    matrix = slices[rows].reshape(rows.stop - rows.start, -1)[:, first]
  part = matrix.T.reshape(first.stop - first.start, *shape[1:inputs],
                          second.stop - second.start, *shape[inputs + 1:])
  whole = slice(None)
  return part[(whole, *index[1:inputs], whole, *index[inputs + 1:])]


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
  base = pathlib.Path(base)
  tensors = hf_files.tensors_of(base)
  hf_files.check_tensors(tensors, config, base)

  def rest(partial):
    for path in base.iterdir():
      if path.suffix in (".json", ".txt", ".jinja", ".model") and path.is_file():
        shutil.copyfile(path, partial / path.name)

  _write(params, config, pathlib.Path(folder), tensors, rest)


def to_new_hf(params: Params, config: ModelConfig, folder: Folder, *, tokenizer, min_pixels: int,
              max_pixels: int) -> None:
  """Writes a folder for a model that came from none: float32 weights in one file.

  Args:
    params: the weights.
    config: sizes.
    folder: must not exist yet; like `to_hf` in this, too.
    tokenizer: a `transformers` fast tokenizer with the control tokens of Qwen2.5-VL.
    min_pixels, max_pixels: areas that images are resized to.

  Raises:
    ValueError: the folder exists, or the sizes have no form in their config.json.
  """
  files = {"config.json": config_fields(config, tokenizer),
           "generation_config.json": {"eos_token_id": tokenizer.eos_token_id,
                                      "pad_token_id": tokenizer.pad_token_id},
           hf_processor.FILE: hf_processor.processor_fields(
             config.vision, min_pixels=min_pixels, max_pixels=max_pixels)}

  def rest(partial):
    tokenizer.save_pretrained(partial)
    for name, fields in files.items():
      (partial / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

  _write(params, config, pathlib.Path(folder), hf_files.tensors_for(config), rest)


def _write(params, config, folder: pathlib.Path, tensors: dict[str, Tensor], rest) -> None:
  """Writes `tensors` file by file, then what `rest` does."""
  flat, sources = hf_files.by_name(params), sources_of(config)
  with atomic_folder(folder) as partial:
    for file, names in hf_files.by_file(tensors).items():
      shard = {}
      for name in names:
        path, layer = sources[name]
        ours = fetch_tensor(flat[path], layer)
        if partial:
          theirs = hf_files.to_theirs(ours, path).reshape(tensors[name].shape)
          shard[tensors[name].stored] = np.ascontiguousarray(theirs.astype(tensors[name].dtype))
      if partial:
        save_file(shard, partial / file, metadata={"format": "pt"})
    if partial:
      rest(partial)


@contextlib.contextmanager
def atomic_folder(folder: Folder):
  """A folder to write to on process 0, None on others, that gets the name `folder` at the end.

  Raises:
    ValueError: `folder` exists.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise ValueError(f"{folder} exists; export to a new folder")
  if jax.process_index():
    yield None
    return
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    yield partial
    partial.chmod(0o755)  # mkdtemp's folders are private
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def fetch_tensor(array: jax.Array, layer: int | None) -> np.ndarray:
  """One tensor, or one block of a stacked one, whole on every host."""
  array = array if layer is None else array[layer]
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
