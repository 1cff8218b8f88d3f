"""Reads and writes preprocessor_config.json, the image part of a Hugging Face folder.

Only the area that images are resized to is free; other fields that change pixels are refused.
"""

import json
import math
import os
import pathlib

from ares_jax.models.config import VisionConfig
from ares_jax.models.vision import MEAN, STD

FILE = "preprocessor_config.json"
# transformers 5 saves all parts of a processor in one file.
_NESTED = "processor_config.json"


def pixel_limits(folder: str | os.PathLike, vision: VisionConfig) -> tuple[int, int]:
  """Least and largest area, px, that the model's images are resized to.

  Raises:
    ValueError: the file is missing, or a field has a value that is not implemented.
  """
  path = pathlib.Path(folder) / FILE
  if path.is_file():
    fields = json.loads(path.read_text(encoding="utf-8"))
  elif (nested := pathlib.Path(folder) / _NESTED).is_file():
    path, fields = nested, json.loads(nested.read_text(encoding="utf-8"))["image_processor"]
  else:
    raise ValueError(f"{path} does not exist; it holds the size of images")
  for name, want in processor_fields(vision, min_pixels=0, max_pixels=0).items():
    if name in ("size", "image_processor_type") or name not in fields:
      continue
    if not _same(fields[name], want):
      raise ValueError(f"{path}: {name} is {fields[name]!r}; only {want!r} is implemented")
  # transformers 4 wrote two separate fields, which have precedence over `size` there too.
  size = fields["size"] if "size" in fields else {}
  limits = []
  for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
    value = fields.get(old) or size.get(new)
    if value is None:
      raise ValueError(f"{path}: neither {old} nor size.{new} is given")
    limits.append(value)
  return tuple(limits)


def _same(have, want) -> bool:
  """Whether two values are equal; floats up to 1e-6, because JSON rounds them."""
  if isinstance(want, list):
    return len(have) == len(want) and all(map(_same, have, want))
  return math.isclose(have, want, rel_tol=1e-6) if isinstance(want, float) else have == want


def processor_fields(vision: VisionConfig, *, min_pixels: int, max_pixels: int) -> dict:
  """The fields of a preprocessor_config.json."""
  return {
    "image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "resample": 3,  # bicubic
    "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(MEAN),
    "image_std": list(STD), "patch_size": vision.patch, "merge_size": vision.merge,
    "temporal_patch_size": vision.temporal_patch}
