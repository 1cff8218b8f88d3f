"""The sizes of a model, as hashable records that can be static arguments of jit.

`ares_jax.system.config.build` makes them from `configs/`, `ares_jax.models.hf.model_config` from a
Hugging Face folder; no field has a default.
"""

import dataclasses
from typing import Literal

from ares_jax.models.families import FAMILIES, Tower
from ares_jax.system.config import optional

# Patch slots that are packed together where a tower has no windows.
STRETCH = 64


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _positive(record, *names: str) -> None:
  for name in names:
    value = getattr(record, name)
    _require(value >= 1, f"{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower: a transformer over image patches and a merger into text width."""

  depth: int  # blocks
  hidden: int  # width of the residual stream
  heads: int  # attention heads of a block
  mlp: int  # width of the MLP
  patch: int  # px, side of a square patch
  temporal_patch: int  # frames per patch; a still image is repeated
  merge: int  # patches per side of the square that becomes one text token
  window: int  # px, side of an attention window; 0 = none, every block attends to all of an image
  full_attention: tuple[int, ...]  # blocks that attend to all of an image; others to a window
  out: int  # width of the merged features: the text model's embed
  family: str = optional("qwen2_5_vl")  # of FAMILIES, whose Tower says what the blocks are like
  positions: int = optional(0)  # rows and columns of the table of learned positions; 0 = no table
  # Blocks whose results are merged too: those of the k-th go to the decoder behind its block k.
  deepstack: tuple[int, ...] = optional(())

  def __post_init__(self):
    _positive(self, "depth", "hidden", "heads", "mlp", "patch", "merge", "out")
    _require(self.temporal_patch == 2,
             f"temporal_patch is {self.temporal_patch}; only 2 is implemented, that of Qwen-VL")
    _require(self.hidden % (4 * self.heads) == 0,
             f"hidden {self.hidden} over heads {self.heads} is not a multiple of 4: the 2-D "
             "rotary embedding needs head sizes 4, 8, 12 ...; change hidden or heads")
    _require(self.window >= 0 and self.window % (self.patch * self.merge) == 0,
             f"window {self.window} px is not a multiple of patch * merge = "
             f"{self.patch * self.merge} px; change window")
    _require(self.window or STRETCH % self.unit == 0,
             f"merge {self.merge} is not 1, 2, 4 or 8, and there are no windows; change merge")
    _require(all(0 <= layer < self.depth for layer in self.full_attention),
             f"full_attention {self.full_attention} names a block outside 0..{self.depth - 1}; "
             "change full_attention or depth")
    towers = [name for name, family in FAMILIES.items() if family.tower]
    _require(self.family in towers, f"family {self.family!r} is not one of {', '.join(towers)}")
    _require(self.positions >= 0, f"positions is {self.positions}; it must be at least 0")
    ascending = all(x < y for x, y in zip(self.deepstack, self.deepstack[1:], strict=False))
    _require(ascending and all(0 <= layer < self.depth for layer in self.deepstack),
             f"deepstack {self.deepstack} must name blocks of 0..{self.depth - 1} in ascending "
             "order; change deepstack or depth")

  @property
  def tower(self) -> Tower:
    """What the blocks are like."""
    return FAMILIES[self.family].tower

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.hidden // self.heads

  @property
  def patch_dim(self) -> int:
    """uint8 values of a patch: (3 channels, temporal_patch, patch, patch), flattened."""
    return 3 * self.temporal_patch * self.patch**2

  @property
  def unit(self) -> int:
    """Patches that become one text token."""
    return self.merge**2

  @property
  def window_patches(self) -> int:
    """Patch slots of a window, or of a stretch of a row's patches where there are no windows."""
    return (self.window // self.patch) ** 2 if self.window else STRETCH


# A text model's batches have the arrays of images too, with no window in them.
_NO_TOWER = VisionConfig(depth=1, hidden=4, heads=1, mlp=1, patch=14, temporal_patch=2, merge=2,
                         window=28, full_attention=(), out=1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The text decoder, and the vision tower where there is one."""

  vocab: int  # rows of the embedding, padding rows included
  embed: int  # width of the residual stream
  layers: int  # decoder blocks
  heads: int  # query heads
  kv_heads: int  # key and value heads, each shared by heads / kv_heads query heads
  head_dim: int  # width of a head
  qkv_bias: bool  # whether queries, keys and values have biases
  qk_norm: bool  # whether the heads of queries and keys are normalised before they are rotated
  mlp: int  # width of the gated MLP
  rope_theta: float  # base of the rotary frequencies
  mrope_sections: tuple[int, int, int]  # rotary frequencies for time, height, width
  mrope_interleaved: bool  # whether the frequencies of the axes take turns, not one after another
  norm_eps: float  # added to the mean square in RMS norms
  tied: bool  # whether the embedding is also the unembedding
  vision: VisionConfig | None  # the vision tower; None for a text model
  image_token: int | None  # token id whose embedding an image feature replaces; None without tower
  compute_dtype: Literal["float32", "bfloat16"]  # of activations; norms and softmax use float32
  remat: Literal["none", "block", "dots"]  # keep everything | block inputs | matmul results too
  unroll: int  # blocks per iteration of the scan over layers

  def __post_init__(self):
    _positive(self, "vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "unroll")
    _require(self.heads % self.kv_heads == 0,
             f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; change one")
    _require(2 * sum(self.mrope_sections) == self.head_dim and min(self.mrope_sections) >= 0,
             f"mrope_sections {self.mrope_sections} must sum to head_dim / 2 = "
             f"{self.head_dim / 2:g}")
    _require(self.rope_theta > 1, f"rope_theta is {self.rope_theta}; it must exceed 1")
    _require(self.norm_eps > 0, f"norm_eps is {self.norm_eps}; it must be positive")
    _require((self.vision is None) == (self.image_token is None),
             f"vision is {self.vision} and image_token {self.image_token}: a model has both or "
             "neither")
    if self.vision is None:
      return
    _require(self.vision.out == self.embed,
             f"vision.out {self.vision.out} differs from embed {self.embed}: image features "
             "replace token embeddings")
    _require(len(self.vision.deepstack) <= self.layers,
             f"vision.deepstack {self.vision.deepstack} has more blocks than the decoder, which "
             f"has {self.layers}; change deepstack or layers")
    _require(0 <= self.image_token < self.vocab,
             f"image_token {self.image_token} is outside the vocabulary of {self.vocab}")

  @property
  def images(self) -> VisionConfig:
    """The sizes of the arrays that hold a batch's images, which a text model's batches have too."""
    return self.vision or _NO_TOWER


def _qwen25_vl(embed, layers, heads, kv_heads, mlp, vocab, tied):
  vision = VisionConfig(depth=32, hidden=1280, heads=16, mlp=3420, patch=14, temporal_patch=2,
                        merge=2, window=112, full_attention=(7, 15, 23, 31), out=embed)
  return ModelConfig(vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads,
                     head_dim=128, qkv_bias=True, qk_norm=False, mlp=mlp, rope_theta=1e6,
                     mrope_sections=(16, 24, 24), mrope_interleaved=False, norm_eps=1e-6,
                     tied=tied, vision=vision, image_token=151655, compute_dtype="bfloat16",
                     remat="block", unroll=1)


def _qwen3_vl(embed, layers, heads, mlp, tied, *, tower):
  depth, hidden, tower_mlp, deepstack = tower
  vision = VisionConfig(depth=depth, hidden=hidden, heads=16, mlp=tower_mlp, patch=16,
                        temporal_patch=2, merge=2, window=0, full_attention=(), out=embed,
                        family="qwen3_vl", positions=48, deepstack=deepstack)
  return ModelConfig(vocab=151936, embed=embed, layers=layers, heads=heads, kv_heads=8,
                     head_dim=128, qkv_bias=False, qk_norm=True, mlp=mlp, rope_theta=5e6,
                     mrope_sections=(24, 20, 20), mrope_interleaved=True, norm_eps=1e-6,
                     tied=tied, vision=vision, image_token=151655, compute_dtype="bfloat16",
                     remat="block", unroll=1)


# The published models, whose sizes are known without their files.
SIZE_3B = _qwen25_vl(2048, 36, 16, 2, 11008, 151936, True)
SIZE_7B = _qwen25_vl(3584, 28, 28, 4, 18944, 152064, False)
_SMALL, _LARGE = (24, 1024, 4096, (5, 11, 17)), (27, 1152, 4304, (8, 16, 24))
_QWEN3_VL = {"2B": _qwen3_vl(2048, 28, 16, 6144, True, tower=_SMALL),
             "4B": _qwen3_vl(2560, 36, 32, 9728, True, tower=_SMALL),
             "8B": _qwen3_vl(4096, 36, 32, 12288, False, tower=_LARGE)}
PUBLISHED_SIZES = {"Qwen2.5-VL-3B-Instruct": SIZE_3B, "Qwen2.5-VL-7B-Instruct": SIZE_7B} | {
  f"Qwen3-VL-{size}-{kind}": config for size, config in _QWEN3_VL.items()
  for kind in ("Instruct", "Thinking")}
