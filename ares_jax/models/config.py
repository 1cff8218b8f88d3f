"""The sizes of a model, as hashable records that can be static arguments of jit.

`ares_jax.system.config.build` makes them from `configs/`, `ares_jax.models.hf.model_config` from a
Hugging Face folder; no field has a default.
"""

import dataclasses
from typing import Literal


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
  mlp: int  # width of the gated MLP
  patch: int  # px, side of a square patch
  temporal_patch: int  # frames per patch; a still image is repeated
  merge: int  # patches per side of the square that becomes one text token
  window: int  # px, side of an attention window
  full_attention: tuple[int, ...]  # blocks that attend to all of an image; others to a window
  out: int  # width of the merged features: the text model's embed

  def __post_init__(self):
    _positive(self, "depth", "hidden", "heads", "mlp", "patch", "merge", "out")
    _require(self.temporal_patch == 2,
             f"temporal_patch is {self.temporal_patch}; only 2 is implemented, that of Qwen2.5-VL")
    _require(self.hidden % (4 * self.heads) == 0,
             f"hidden {self.hidden} over heads {self.heads} is not a multiple of 4: the 2-D "
             "rotary embedding needs head sizes 4, 8, 12 ...; change hidden or heads")
    _require(self.window >= 1 and self.window % (self.patch * self.merge) == 0,
             f"window {self.window} px is not a multiple of patch * merge = "
             f"{self.patch * self.merge} px; change window")
    _require(all(0 <= layer < self.depth for layer in self.full_attention),
             f"full_attention {self.full_attention} names a block outside 0..{self.depth - 1}; "
             "change full_attention or depth")

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
    """Patches of a window."""
    return (self.window // self.patch) ** 2


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
    _require(0 <= self.image_token < self.vocab,
             f"image_token {self.image_token} is outside the vocabulary of {self.vocab}")

  @property
  def images(self) -> VisionConfig:
    """The sizes of the arrays that hold a batch's images, which a text model's batches have too."""
    return self.vision or _NO_TOWER


def _published(embed, layers, heads, kv_heads, mlp, vocab, tied):
  vision = VisionConfig(depth=32, hidden=1280, heads=16, mlp=3420, patch=14, temporal_patch=2,
                        merge=2, window=112, full_attention=(7, 15, 23, 31), out=embed)
  return ModelConfig(vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads,
                     head_dim=128, qkv_bias=True, qk_norm=False, mlp=mlp, rope_theta=1e6,
                     mrope_sections=(16, 24, 24), norm_eps=1e-6, tied=tied, vision=vision,
                     image_token=151655, compute_dtype="bfloat16", remat="block", unroll=1)


# The published models, whose sizes are known without their files.
SIZE_3B = _published(2048, 36, 16, 2, 11008, 151936, True)
SIZE_7B = _published(3584, 28, 28, 4, 18944, 152064, False)
PUBLISHED_SIZES = {"Qwen2.5-VL-3B-Instruct": SIZE_3B, "Qwen2.5-VL-7B-Instruct": SIZE_7B}
