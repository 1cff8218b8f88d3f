"""The cases of make_golden.py as one padded batch for our model: row b is the b-th case."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from models import make_golden

from ares_jax.data import images
from ares_jax.data.positions import mrope_positions
from ares_jax.data.prompts import PromptBatch
from ares_jax.models import hf, qwen25_vl
from ares_jax.system import mesh

NAMES = tuple(make_golden.CASES)
TOKENS, WINDOWS = 88, 23  # 78 and 21 are needed: padding must not show


@flax.struct.dataclass
class Batch:
  tokens: np.ndarray  # [B, T] int32
  unit: np.ndarray  # [B, T] int32
  positions: np.ndarray  # [3, B, T] int32
  segment: np.ndarray  # [B, T] int32
  length: np.ndarray  # [B] int32
  response: np.ndarray  # [B, T] bool
  vision: qwen25_vl.VisionInput
  units: tuple = flax.struct.field(pytree_node=False)  # per row, per image


def config(variant, **changes):
  run = {"compute_dtype": "float32", "remat": "none", "unroll": 1} | changes
  return hf.model_config(make_golden.folder(variant), **run)


def batch_for(config, *arguments, **sizes):
  """`batch` for the tower of a model."""
  return batch(*arguments, patch=config.vision.patch, window=config.vision.window, **sizes)


def prompts(config, names, length):
  """The cases `names` as the PromptBatch that the sampler reads, `length` tokens wide."""
  tower = config.vision
  rows = [make_golden.case(name, tower.patch * tower.merge) for name in names]
  cut = [[images.patchify(picture, patch=tower.patch) for picture in pictures]
         for _, pictures in rows]
  padded = batch_for(config, names, length=length)
  shape = images.VisionShape(WINDOWS, tower.window, tower.patch, tower.merge)
  sizes = np.zeros((len(names), 4), int)
  sizes[:, 0] = padded.length
  held = np.arange(len(names))
  return PromptBatch(padded.tokens, padded.length, padded.positions, padded.unit, cut, shape,
                     held.astype(np.int32), [{}] * len(names), held, sizes)


def read_hf(folder, config, dtype=jnp.float32):
  """The weights of a folder as numpy arrays."""
  one_device = mesh.make_mesh(1, 1, jax.devices()[:1])
  return jax.device_get(hf.from_hf(folder, config, one_device, dtype))


def references(variant):
  return np.load(make_golden.folder(variant) / "references.npz")


def batch(names=NAMES, length=TOKENS, windows=WINDOWS, *, patch=14, window=56):
  """Batch of the cases `names` for a tower with such patches and windows, in px."""
  rows = [make_golden.case(name, 2 * patch) for name in names]
  cut = [[images.patchify(picture, patch=patch) for picture in pictures] for _, pictures in rows]
  vision, units = images.pack_rows(cut, windows=windows, window=window, patch=patch)
  shape = len(rows), length
  out = Batch(np.zeros(shape, np.int32), np.full(shape, -1, np.int32),
              np.zeros((3, *shape), np.int32), np.zeros(shape, np.int32),
              np.int32([len(tokens) for tokens, _ in rows]), np.zeros(shape, bool),
              qwen25_vl.VisionInput(**vision), tuple(map(tuple, units)))
  for b, (tokens, _) in enumerate(rows):
    used = len(tokens)
    out.tokens[b, :used] = tokens
    out.segment[b, :used] = 1
    out.positions[:, b, :used] = mrope_positions(
      tokens, make_golden.IMAGE, [grid for _, grid in cut[b]], merge=2)
    out.response[b, make_golden.response_start(tokens):used] = True
    if units[b]:
      out.unit[b, :used][tokens == make_golden.IMAGE] = np.concatenate(units[b])
  return out
