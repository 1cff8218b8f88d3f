"""The vision tower, with window attention as attention over a batch of windows.

R rows (prompts), W windows, S patch slots of a window, C values of a patch, E width of the tower,
M = W * S patch slots of a row, U = M / merge^2 units (tokens) of a row, N heads, H head size.

The host (data/images.py) puts each row's patches in window order with every window padded to S
slots, so window attention is attention over a batch of [R * W, S], linear in the number of patches,
and the four patches of a merged unit are neighbours.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models.attention import attention
from ares_jax.models.config import ModelConfig, VisionConfig
from ares_jax.models.layers import project, rms_norm, rotary, rotate, scan_blocks, swiglu
from ares_jax.models.weights import Params
from ares_jax.system.mesh import ROWS, abstract, shard

# Fixed by the architecture: no config.json has a field for them.
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
# Channel statistics of CLIP's training images, in units of full intensity.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


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
    [R, U, D] in the compute dtype; meaningless for padding. None for a text model.
  """
  if config.vision is None:
    return None
  size, weights = config.vision, params["vision"]
  rows, windows, slots = vision.image.shape
  dtype = jnp.dtype(config.compute_dtype)
  x = project(normalise(vision.patches, size).astype(dtype), weights["patch"])
  cos_sin = _rotary_2d(vision.hw, size)
  full = np.isin(np.arange(size.depth), size.full_attention)

  def attend(q, k, v, *, per_window: bool):
    # For a window block the batch is rows * windows short rows, for a full block rows long rows.
    shape = (rows * windows, slots) if per_window else (rows, windows * slots)
    segment = vision.image.reshape(shape)
    q, k, v = (y.reshape(*shape, *y.shape[3:]) for y in (q, k, v))
    out = attention(q, k, v, segment_BT=segment, segment_BS=segment, causal=False)
    return out.reshape(rows, windows, slots, *out.shape[2:])

  def block(x, layer):
    block_weights, is_full = layer
    x = shard(x, ROWS)
    normed = rms_norm(x, block_weights["attention_norm"], NORM_EPS)
    q, k, v = jnp.moveaxis(project(normed, block_weights["qkv"], block_weights["qkv_bias"]), 3, 0)
    q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    mixed = jax.lax.cond(is_full,
                         lambda *qkv: attend(*qkv, per_window=False),
                         lambda *qkv: attend(*qkv, per_window=True), q, k, v)
    out = jnp.einsum("rwsnh,nhe->rwse", mixed, block_weights["o"].astype(x.dtype))
    x = x + out + block_weights["o_bias"].astype(x.dtype)
    x = x + swiglu(rms_norm(x, block_weights["mlp_norm"], NORM_EPS), block_weights)
    return x, None

  x, _ = scan_blocks(block, x, (weights["blocks"], full), remat=config.remat,
                     unroll=config.unroll)
  return _merge(weights["merger"], x, size)


def normalise(patches: jax.Array, size: VisionConfig) -> jax.Array:
  """(x / 255 - mean) / std per channel, float32, bit for bit as the image processor computes it.

  A table of 256 x 3 values, because XLA turns division by a constant into multiplication, which
  differs in the last bit for 441 of them.
  """
  level = (np.arange(256) * (1 / 255)).astype(np.float32)
  table = (level[:, None] - np.float32(MEAN)) / np.float32(STD)
  channel = np.repeat(np.arange(3), size.patch_dim // 3)
  return jnp.asarray(table)[patches, channel]


def _rotary_2d(hw, size: VisionConfig):
  """Rotary angles: half of a head's frequencies use the patch's row, half its column."""
  frequency = ROPE_THETA ** -(np.arange(0, size.head_dim // 2, 2) / (size.head_dim // 2))
  angle = hw[..., None].astype(jnp.float32) * np.float32(frequency)
  return rotary(angle.reshape(*hw.shape[:-1], size.head_dim // 2))


def _merge(weights, x, size: VisionConfig):
  x = rms_norm(x, weights["norm"], NORM_EPS)
  x = x.reshape(x.shape[0], -1, size.unit * size.hidden)
  x = jax.nn.gelu(project(x, weights["up"], weights["up_bias"]), approximate=False)
  return project(x, weights["down"], weights["down_bias"])
