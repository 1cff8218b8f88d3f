"""The vision tower, with window attention as attention over a batch of windows.

R rows (prompts), W windows, S patch slots of a window, C values of a patch, E width of the tower,
M = W * S patch slots of a row, U = M / merge^2 units (tokens) of a row, N heads, H head size,
D embed, Z = (1 + n) D width of an image token's features with n blocks in `deepstack`.

The host (data/images.py) puts each row's patches in window order with every window padded to S
slots, so window attention is attention over a batch of [R * W, S], linear in the number of patches,
and the four patches of a merged unit are neighbours. Where a tower has no windows, a row's patches
follow each other without padding between them.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models.attention import attention
from ares_jax.models.config import ModelConfig, VisionConfig
from ares_jax.models.layers import (
  layer_norm,
  project,
  rms_norm,
  rotary,
  rotate,
  scan_blocks,
  swiglu,
)
from ares_jax.models.weights import Params
from ares_jax.system.mesh import ROWS, abstract, shard

# Fixed by the architecture: no config.json has a field for them.
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
_ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
                "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@flax.struct.dataclass
class VisionInput:
  """The images of R rows in window order (`data.images.pack_rows`)."""

  patches: jax.Array  # [R, W, S, C] uint8, C = (channel, temporal, patch, patch); 0 where padding
  hw: jax.Array  # [R, W, S, 2] int32, patch row and column in its image
  image: jax.Array  # [R, W, S] int32, 1 + index of the frame in its row; 0 where padding

  @classmethod
  def abstract(cls, size, rows, windows):
    """The shapes for R rows of W windows on the current mesh; `size` is a VisionConfig."""
    slots = rows, windows, size.window_patches
    return cls(patches=abstract(jnp.uint8, (*slots, size.patch_dim), ROWS),
               hw=abstract(jnp.int32, (*slots, 2), ROWS), image=abstract(jnp.int32, slots, ROWS))


def vision_features(config: ModelConfig, params: Params, vision: VisionInput) -> jax.Array | None:
  """Image features in the order of the patch slots; unit u has [u * merge^2, (u + 1) * merge^2).

  Returns:
    [R, U, Z] in the compute dtype; meaningless for padding. None for a text model.
  """
  if config.vision is None:
    return None
  size, weights = config.vision, params["vision"]
  x = project(normalise(vision.patches, size).astype(config.compute_dtype), weights["patch"],
              weights.get("patch_bias"))
  if size.positions:
    x += _learned_positions(weights["positions"], vision, size).astype(x.dtype)
  full = np.isin(np.arange(size.depth), size.full_attention)
  block, start, deep = _block(size, vision), 0, []
  for number, end in enumerate([*(1 + layer for layer in size.deepstack), size.depth]):
    if start < end:
      blocks = jax.tree.map(lambda leaf, part=slice(start, end): leaf[part], weights["blocks"])
      x, _ = scan_blocks(block, x, (blocks, full[start:end]), remat=config.remat,
                         unroll=config.unroll)
    if number < len(size.deepstack):
      merger = jax.tree.map(lambda leaf, number=number: leaf[number], weights["deepstack"])
      deep.append(_merge(merger, x, size, norm_units=True))
    start = end
  return jnp.concatenate([_merge(weights["merger"], x, size), *deep], axis=-1)


def _block(size: VisionConfig, vision: VisionInput):
  """The function of (x [R, W, S, E], (weights of a block, whether its attention is full))."""
  rows, windows, slots = vision.image.shape
  cos_sin = _rotary_2d(vision.hw, size)

  def attend(q, k, v, *, per_window: bool):
    # For a window block the batch is rows * windows short rows, for a full block rows long rows.
    shape = (rows * windows, slots) if per_window else (rows, windows * slots)
    segment = vision.image.reshape(shape)
    q, k, v = (y.reshape(*shape, *y.shape[3:]) for y in (q, k, v))
    out = attention(q, k, v, segment_BT=segment, causal=False)
    return out.reshape(rows, windows, slots, *out.shape[2:])

  full_attention = functools.partial(attend, per_window=False)
  window_attention = functools.partial(attend, per_window=True)

  def block(x, layer):
    weights, is_full = layer
    x = shard(x, ROWS)
    normed = _norm(x, weights, "attention_norm")
    q, k, v = jnp.moveaxis(project(normed, weights["qkv"], weights["qkv_bias"]), 3, 0)
    q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    mixed = (jax.lax.cond(is_full, full_attention, window_attention, q, k, v) if size.window else
             full_attention(q, k, v))
    out = jnp.einsum("rwsnh,nhe->rwse", mixed, weights["o"].astype(x.dtype))
    x = x + out + weights["o_bias"].astype(x.dtype)
    x = x + _mlp(_norm(x, weights, "mlp_norm"), weights, size)
    return x, None

  return block


def normalise(patches: jax.Array, size: VisionConfig) -> jax.Array:
  """(x / 255 - mean) / std per channel, float32, bit for bit as the image processor computes it.

  A table of 256 x 3 values, because XLA turns division by a constant into multiplication, which
  differs in the last bit for 441 of them with the statistics of CLIP.
  """
  level = (np.arange(256) * (1 / 255)).astype(np.float32)
  table = (level[:, None] - np.float32(size.tower.mean)) / np.float32(size.tower.std)
  channel = np.repeat(np.arange(3), size.patch_dim // 3)
  return jnp.asarray(table)[patches, channel]


def _rotary_2d(hw, size: VisionConfig):
  """Rotary angles: half of a head's frequencies use the patch's row, half its column."""
  frequency = ROPE_THETA ** -(np.arange(0, size.head_dim // 2, 2) / (size.head_dim // 2))
  angle = hw[..., None].astype(jnp.float32) * np.float32(frequency)
  return rotary(angle.reshape(*hw.shape[:-1], size.head_dim // 2))


def _learned_positions(table, vision: VisionInput, size: VisionConfig):
  """float32 [R, W, S, E]: a square table, stretched over each image from corner to corner."""
  side, rows = size.positions, vision.image.shape[0]
  table = shard(table.astype(jnp.float32))
  # A row has fewer images than units. Padding counts as one more image.
  largest = jax.vmap(functools.partial(
    jax.ops.segment_max, num_segments=1 + vision.image[0].size // size.unit))
  last = largest(vision.hw.reshape(rows, -1, 2), vision.image.reshape(rows, -1))
  last = jax.vmap(lambda last, image: last[image])(last, vision.image)
  at = vision.hw * (side - 1) / jnp.maximum(last, 1)
  low = jnp.floor(at).astype(jnp.int32)
  above = at - low
  total = 0
  for corner in np.ndindex(2, 2):
    row, column = jnp.moveaxis(jnp.minimum(low + np.array(corner), side - 1), -1, 0)
    share = jnp.where(np.array(corner) == 1, above, 1 - above).prod(-1, keepdims=True)
    total += share * table[row * side + column]
  return total


def _norm(x, weights, name):
  bias = weights.get(f"{name}_bias")
  return (rms_norm(x, weights[name], NORM_EPS) if bias is None else
          layer_norm(x, weights[name], bias, NORM_EPS))


def _mlp(x, weights, size: VisionConfig):
  if size.tower.activation == "silu":
    return swiglu(x, weights)
  x = _ACTIVATIONS[size.tower.activation](project(x, weights["up"], weights["up_bias"]))
  return project(x, weights["down"], weights["down_bias"])


def _merge(weights, x, size: VisionConfig, *, norm_units: bool = False):
  """[R, U, D]; the norm stands before the patches of a unit are joined, or behind."""
  joined = x.shape[0], -1, size.unit * size.hidden
  x = _norm(x.reshape(joined) if norm_units else x, weights, "norm").reshape(joined)
  x = jax.nn.gelu(project(x, weights["up"], weights["up_bias"]), approximate=False)
  return project(x, weights["down"], weights["down_bias"])
