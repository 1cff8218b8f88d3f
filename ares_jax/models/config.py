"""Sizes of a Qwen2.5-VL model. Hashable records: static arguments of jit.

Built from `configs/` by `ares_jax.system.config.build` or from a Hugging Face folder by
`ares_jax.models.hf.model_config`; no field has a default.
"""

import dataclasses
from typing import Literal


def _require(fine: bool, message: str) -> None:
  if not fine:
    raise ValueError(message)


def _positive(record, *names: str) -> None:
  for name in names:
    value = getattr(record, name)
    _require(value >= 1, f"{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower: a transformer over image patches and a merger into text width."""

  depth: int  # blocks
  hidden: int  # width of a patch
  heads: int
  mlp: int  # width of the gated MLP
  patch: int  # px, side of a square patch
  temporal_patch: int  # frames a patch spans; a still image is repeated
  merge: int  # patches per side of the square that becomes one text token
  window: int  # px, side of an attention window
  full_attention: tuple[int, ...]  # blocks that see the whole image; the others see windows
  out: int  # width of the merged features: the text model's embed

  def __post_init__(self):
    _positive(self, "depth", "hidden", "heads", "mlp", "patch", "merge", "out")
    _require(self.temporal_patch == 2,
             f"temporal_patch is {self.temporal_patch}; only 2 is implemented, that of Qwen2.5-VL")
    _require(self.hidden % (4 * self.heads) == 0,
             f"hidden {self.hidden} over heads {self.heads} is no multiple of 4: the 2-D rotary "
             "embedding needs head sizes 4, 8, 12 ...; change hidden or heads")
    _require(self.window >= 1 and self.window % (self.patch * self.merge) == 0,
             f"window {self.window} px is no multiple of patch * merge = "
             f"{self.patch * self.merge} px; change window")
    _require(all(0 <= layer < self.depth for layer in self.full_attention),
             f"full_attention {self.full_attention} names a block outside 0..{self.depth - 1}; "
             "change full_attention or depth")

  @property
  def head_dim(self) -> int:
    return self.hidden // self.heads

  @property
  def patch_dim(self) -> int:
    """uint8 values of one patch: (3 channels, temporal_patch, patch, patch) flattened."""
    return 3 * self.temporal_patch * self.patch**2

  @property
  def unit(self) -> int:
    """Patches merged into one text token."""
    return self.merge**2

  @property
  def window_patches(self) -> int:
    """Patch slots of one window (S)."""
    return (self.window // self.patch) ** 2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The text decoder and, inside it, the vision tower."""

  vocab: int  # rows of the embedding, padding rows included
  embed: int  # width of the residual stream
  layers: int
  heads: int  # query heads
  kv_heads: int  # key and value heads, each shared by heads / kv_heads query heads
  head_dim: int
  mlp: int  # width of the gated MLP
  rope_theta: float  # base of the rotary frequencies
  mrope_sections: tuple[int, int, int]  # rotary frequencies taken by time, height, width
  norm_eps: float
  tied: bool  # the unembedding is the embedding
  vision: VisionConfig
  image_token: int  # id whose embedding is replaced by an image feature
  compute_dtype: Literal["float32", "bfloat16"]  # of activations; norms and softmax use float32
  remat: Literal["none", "block", "dots"]  # keep everything | block inputs | matmul results too
  unroll: int  # blocks per iteration of the scan over layers

  def __post_init__(self):
    _positive(self, "vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "unroll")
    _require(self.heads % self.kv_heads == 0,
             f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}; change one of them")
    _require(2 * sum(self.mrope_sections) == self.head_dim and min(self.mrope_sections) >= 0,
             f"mrope_sections {self.mrope_sections} must sum to head_dim / 2 = "
             f"{self.head_dim / 2:g}")
    _require(self.rope_theta > 1, f"rope_theta is {self.rope_theta}; it must exceed 1")
    _require(self.norm_eps > 0, f"norm_eps is {self.norm_eps}; it must be positive")
    _require(self.vision.out == self.embed,
             f"vision.out {self.vision.out} differs from embed {self.embed}: image features take "
             "the place of token embeddings")
    _require(0 <= self.image_token < self.vocab,
             f"image_token {self.image_token} is outside the vocabulary of {self.vocab}")
