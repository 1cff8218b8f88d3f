"""Reads and writes Hugging Face folders; the table `hf_files.RULES` maps tensors both ways.

Importing this module needs neither torch nor transformers. Files are read one by one, and each
tensor in slices, so that a host holds only its part of one tensor at a time. Weights are written
with the dtypes, names and files of the base folder: an untrained model is written as it was read,
byte for byte.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
import uuid

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from ares_jax.models import hf_files
from ares_jax.models.config import ModelConfig
from ares_jax.models.hf_config import config_fields, model_config
from ares_jax.models.hf_files import RULES, Folder, Rule, Tensor, sources_of
from ares_jax.models.serving import TEMPLATES, Serving, is_kept, set_dtype
from ares_jax.models.weights import Params, name_of, shardings, weight_table

__all__ = ["from_hf", "model_config", "to_hf", "to_new_hf"]


def from_hf(folder: Folder, config: ModelConfig, mesh: Mesh,
            dtype: jnp.dtype = jnp.float32) -> Params:
  """Reads the weights of a folder, each device's part straight to that device.

  Besides the parameters a host holds only its part of one tensor of the folder at a time, in the
  file's dtype. Blocks are copied one by one into the stacked arrays on the devices, and cast there.

  Args:
    folder: holds model.safetensors, or the files that its index names.
    config: sizes, usually `model_config(folder, ...)`.
    mesh: the mesh to put the weights on.
    dtype: of the parameters.

  Raises:
    ValueError: names every tensor that is missing, unknown or of another shape.
  """
  weights, tensors, sources = weight_table(config), hf_files.tensors_of(folder), sources_of(config)
  hf_files.check_tensors(tensors, config, folder)
  weight_of, sharding_of = hf_files.by_name(weights), hf_files.by_name(shardings(weights, mesh))
  loaded = {}
  for file, names in hf_files.by_file(tensors).items():
    with safe_open(pathlib.Path(folder) / file, framework="np") as opened:
      for name in names:
        path, layer = sources[name]
        if name == hf_files.HEAD and config.tied:  # a second copy of the embedding
          continue
        shape, sharding = weight_of[path].shape, sharding_of[path]
        slices = opened.get_slice(tensors[name].stored)
        if layer is None:
          part = _put(slices, tensors[name], RULES[path], shape, sharding)
          loaded[path] = part.astype(dtype)
        else:
          if path not in loaded:
            loaded[path] = jnp.zeros(shape, dtype, device=sharding)
          block = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
          part = _put(slices, tensors[name], RULES[path], shape[1:], block)
          loaded[path] = _set_layer(loaded[path], part, layer, sharding=sharding)
        # Without waiting, host copies of many tensors would queue for the devices.
        jax.block_until_ready(loaded[path])
  return jax.tree_util.tree_map_with_path(lambda path, _: loaded[name_of(path)], weights)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="stack")
def _set_layer(stack, part, layer, *, sharding):
  """`stack` with one block replaced, in place; the cast happens here, on the device."""
  stack = jax.lax.dynamic_update_index_in_dim(stack, part.astype(stack.dtype), layer, 0)
  return jax.lax.with_sharding_constraint(stack, sharding)


def _put(slices, tensor: Tensor, rule: Rule, shape, sharding) -> jax.Array:
  """One tensor of the folder on the devices, in our order of values and the file's dtype."""
  parts = {}

  def part(index) -> np.ndarray:
    # Devices that hold the same part share one copy.
    key = tuple(slice(*s.indices(size)).start for s, size in zip(index, shape, strict=True))
    if key not in parts:
      parts[key] = _read(slices, tensor, rule.inputs, shape, index)
    return parts[key]

  return jax.make_array_from_callback(shape, sharding, part)


def _read(slices, tensor: Tensor, inputs: int, shape, index) -> np.ndarray:
  """The part `index` of a tensor in our order of values, from safetensors' lazy `slices`.

  `shape` and `index` are those of our tensor, without the layer axis; `inputs` is as in `Rule`.
  """
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
  if not inputs:
    if len(tensor.shape) == len(shape):
      return slices[index]
    return slices[:].reshape(shape)[index]
  # Our tensor is [inputs..., outputs...], the file's is the matrix [outputs, inputs]. Only the part
  # of the first input and output dimensions is read; no sharding splits the other dimensions, which
  # are cut afterwards.
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
  return part[(slice(None), *index[1:inputs], slice(None), *index[inputs + 1:])]


def to_hf(params: Params, config: ModelConfig, folder: Folder, base: Folder, *,
          serving: Serving | None = None, dtype: str | None = None) -> None:
  """Writes a folder that transformers and vLLM load.

  Names, files, config, tokenizer, preprocessor and licence are copied from `base`, the folder that
  the model came from. `folder` must not exist yet; it appears complete or not at all. Of a single
  process.

  Args:
    params, config: weights and sizes.
    folder, base: the folder to write, and that of the model before training.
    serving: what decoding and images were like in training; None leaves those of base.
    dtype: of the weights, "float32" or "bfloat16"; None for that of each tensor of base.

  Raises:
    ValueError: the folder exists, the tensors of base are not those of config, or a weight is
      larger than its dtype can hold.
  """
  base = pathlib.Path(base)
  tensors = hf_files.tensors_of(base)
  hf_files.check_tensors(tensors, config, base)
  if dtype:
    tensors = {name: dataclasses.replace(tensor, dtype=jnp.dtype(dtype))
               for name, tensor in tensors.items()}

  def write_others(partial):
    for path in filter(is_kept, [*base.iterdir(), *(base / TEMPLATES).glob("*")]):
      copy = partial / path.relative_to(base)
      copy.parent.mkdir(exist_ok=True)
      shutil.copyfile(path, copy)
    if dtype:
      set_dtype(partial, dtype)
    if serving:
      serving.write(partial, config.vision)

  _write(params, config, pathlib.Path(folder), tensors, write_others)


def to_new_hf(params: Params, config: ModelConfig, folder: Folder, *, tokenizer, serving: Serving,
              dtype: str | None = None) -> None:
  """Writes a folder for a model that was not read from one, in one file of weights.

  Args:
    params, config: weights and sizes.
    folder: must not exist yet.
    tokenizer: a `transformers` fast tokenizer with the control tokens of Qwen2.5-VL.
    serving: what decoding and images were like in training.
    dtype: of the weights, "float32" or "bfloat16"; None is float32.

  Raises:
    ValueError: the folder exists, or config.json cannot express the sizes.
  """
  dtype = dtype or "float32"
  fields = config_fields(config, tokenizer, max_tokens=serving.max_tokens, dtype=dtype)

  def write_others(partial):
    tokenizer.save_pretrained(partial)
    hf_files.write_object(partial / "config.json", fields)
    serving.write(partial, config.vision)

  _write(params, config, pathlib.Path(folder), hf_files.tensors_for(config, dtype), write_others)


def _write(params, config, folder: pathlib.Path, tensors: dict[str, Tensor], write_others) -> None:
  """Writes `tensors` file by file, then calls `write_others` with the folder."""
  flat, sources = hf_files.by_name(params), sources_of(config)
  with atomic_folder(folder) as partial:
    for file, names in hf_files.by_file(tensors).items():
      arrays = {}
      for name in names:
        path, layer = sources[name]
        ours = np.asarray(flat[path] if layer is None else flat[path][layer])
        theirs = hf_files.to_theirs(ours, path).reshape(tensors[name].shape)
        arrays[tensors[name].stored] = np.ascontiguousarray(_cast(theirs, tensors[name]))
      save_file(arrays, partial / file, metadata={"format": "pt"})
    write_others(partial)


def _cast(array: np.ndarray, tensor: Tensor) -> np.ndarray:
  """The array in the tensor's dtype; ValueError where a value has none in it."""
  if not np.isfinite(array).all():
    raise ValueError(f"{tensor.stored} has values that are no finite numbers; export an earlier "
                     "checkpoint")
  with np.errstate(over="ignore"):
    cast = array.astype(tensor.dtype)
  if not np.isfinite(cast).all():
    raise ValueError(f"{tensor.stored} has values up to {np.abs(array).max():g}, too large for "
                     f"{tensor.dtype.name}; export with --weights_dtype=bfloat16")
  return cast


@contextlib.contextmanager
def atomic_folder(folder: Folder):
  """Yields a temporary folder that is renamed to `folder` at the end.

  Its files get the mode of a new file (0644 at the usual umask), whatever wrote them.

  Raises:
    ValueError: `folder` exists.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise ValueError(f"{folder} exists; export to a new folder")
  # Not by tempfile: its folders are private.
  partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
  partial.mkdir(parents=True)
  try:
    yield partial
    for path in filter(pathlib.Path.is_file, partial.iterdir()):
      path.chmod(partial.stat().st_mode & 0o666)  # safetensors writes files of mode 0600
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
