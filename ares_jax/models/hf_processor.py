"""Reads and writes the image part of a Hugging Face folder: processor or preprocessor config.

Only the area that images are resized to is free; other fields that change pixels are refused.
"""

import contextlib
import math
import os
import pathlib

from ares_jax.models.config import VisionConfig
from ares_jax.models.families import FAMILIES
from ares_jax.models.hf_files import read_object, write_object

FILE = "preprocessor_config.json"
# transformers 5 saves all parts of a processor in one file, and reads that one first.
_NESTED, _PART = "processor_config.json", "image_processor"
# transformers' image processor where a file leaves a field out, for every family.
_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_CLIP = FAMILIES["qwen2_vl"].tower
_ABSENT = {"image_mean": list(_CLIP.mean), "image_std": list(_CLIP.std), "patch_size": 14,
           "merge_size": 2, "temporal_patch_size": 2}


def pixel_limits(folder: str | os.PathLike, vision: VisionConfig) -> tuple[int, int]:
  """Least and largest area, px, that the model's images are resized to.

  Raises:
    ValueError: the file is missing, or a field has a value that is not implemented.
  """
  check_processor(folder, vision)
  path, fields = _read(pathlib.Path(folder))
  if fields is None:
    raise ValueError(f"{path} does not exist; it holds the size of images")
  return _limits(path, fields)


def _limits(path: pathlib.Path, fields: dict) -> tuple[int, int]:
  size = _SIZE if fields.get("size") is None else fields["size"]
  if not isinstance(size, dict):
    raise ValueError(f"{path}: size is {size!r}; shortest_edge and longest_edge are needed, areas "
                     "in pixels")
  limits = []
  # transformers 4 wrote two separate fields, which have precedence over `size` there too.
  for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
    name, value = ((old, fields[old]) if fields.get(old) is not None else
                   (f"size.{new}", size.get(new)))
    if value is None:
      raise ValueError(f"{path}: neither {old} nor size.{new} is given")
    if type(value) is not int or value < 1:
      raise ValueError(f"{path}: {name} is {value!r}; it must be an integer >= 1, an area in "
                       "pixels")
    limits.append(value)
  if limits[0] > limits[1]:
    raise ValueError(f"{path}: images of at least {limits[0]} pixels and at most {limits[1]}; "
                     "exchange them")
  return tuple(limits)


def check_processor(folder: str | os.PathLike, vision: VisionConfig) -> None:
  """Raises ValueError where the folder's model was trained on other pixels than ours."""
  path, fields = _read(pathlib.Path(folder))
  if fields is None:
    return
  for name, want in processor_fields(vision, min_pixels=0, max_pixels=0).items():
    have = fields.get(name)
    if have is None:  # null is transformers' own value, as absent is
      have = _ABSENT.get(name, want)
    if name not in ("size", "image_processor_type") and not _same(have, want):
      raise ValueError(f"{path}: {name} is {have!r}; only {want!r} is implemented")


def _read(folder: pathlib.Path) -> tuple[pathlib.Path, dict | None]:
  """(file, its fields of the image processor or None), in transformers' order."""
  nested, path = folder / _NESTED, folder / FILE
  fields = read_object(nested).get(_PART) if nested.is_file() else None
  if isinstance(fields, dict):
    return nested, fields
  if fields is not None:
    raise ValueError(f"{nested}: {_PART} is {fields!r}; it must be an object")
  return path, read_object(path) if path.is_file() else None


def write_limits(folder: pathlib.Path, vision: VisionConfig, *, min_pixels: int,
                 max_pixels: int) -> None:
  """Sets the area that images are resized to, in every file of the folder that has it.

  A file that has these limits stays as it is; FILE is written where there is none.
  """
  found = False
  for name in (_NESTED, FILE):
    fields = read_object(folder / name) if (folder / name).is_file() else {}
    part = fields.get(_PART) if name == _NESTED else fields
    if not part:
      continue
    found = True
    with contextlib.suppress(ValueError):  # limits that nobody can read are replaced
      if _limits(folder / name, part) == (min_pixels, max_pixels):
        continue
    # Both forms: servers read either.
    part |= {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
             "min_pixels": min_pixels, "max_pixels": max_pixels}
    write_object(folder / name, fields)
  if not found:
    write_object(folder / FILE, processor_fields(vision, min_pixels=min_pixels,
                                                 max_pixels=max_pixels))


def _same(have, want) -> bool:
  """Whether two values are equal; floats up to 1e-6, because JSON rounds them."""
  if isinstance(want, list):
    return isinstance(have, list) and len(have) == len(want) and all(map(_same, have, want))
  if isinstance(want, float):
    return type(have) in (int, float) and math.isclose(have, want, rel_tol=1e-6)
  return have == want


def processor_fields(vision: VisionConfig, *, min_pixels: int, max_pixels: int) -> dict:
  """The fields of a preprocessor_config.json."""
  return {
    "image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "resample": 3,  # bicubic
    "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": list(vision.tower.mean), "image_std": list(vision.tower.std),
    "patch_size": vision.patch, "merge_size": vision.merge,
    "temporal_patch_size": vision.temporal_patch}
