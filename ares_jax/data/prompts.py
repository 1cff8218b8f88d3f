"""Rows to prompts: tokens, M-RoPE positions and image patches of fixed shape, on the host.

P prompts, T prompt tokens, W vision windows, S patches a window.
"""

import dataclasses

import numpy as np
from PIL import Image

from ares_jax.data import images
from ares_jax.data.chat import Chat
from ares_jax.data.positions import mrope_positions


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """How a row becomes a prompt of fixed shape."""

  suffix: str  # appended to every question
  max_tokens: int  # T: a longer prompt is an error
  windows: int  # W: vision windows a row has room for
  min_pixels: int  # images are resized to an area within these bounds (HF's rule)
  max_pixels: int

  def __post_init__(self):
    if self.max_tokens < 1 or self.windows < 1:
      raise ValueError(f"max_tokens = {self.max_tokens} and windows = {self.windows} must be >= 1")
    if not 0 < self.min_pixels <= self.max_pixels:
      raise ValueError(f"min_pixels = {self.min_pixels}, max_pixels = {self.max_pixels}: "
                       "0 < min_pixels <= max_pixels is needed")


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """One prompt, not padded."""

  tokens: np.ndarray  # int32 [T]
  positions: np.ndarray  # int32 [3, T]
  images: list  # (patches uint8 [n, 1176], grid (t, h, w)) an image


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """P prompts, right-padded, with their images and the rows they came from."""

  tokens: np.ndarray  # int32 [P, T]
  length: np.ndarray  # int32 [P]
  positions: np.ndarray  # int32 [3, P, T]
  unit: np.ndarray  # int32 [P, T]: which merged vision unit feeds the token, -1 for text
  vision: dict  # patches uint8 [P, W, S, 1176], hw int32 [P, W, S, 2], image int32 [P, W, S]
  prompt_id: np.ndarray  # int32 [P]: place in the stream of prompts
  rows: list  # the source's rows, for answers and metadata

  def take(self, places):
    """The prompts at `places`, a list of int."""
    vision = {name: array[places] for name, array in self.vision.items()}
    return PromptBatch(self.tokens[places], self.length[places], self.positions[:, places],
                       self.unit[places], vision, self.prompt_id[places],
                       [self.rows[place] for place in places])

  @classmethod
  def join(cls, batches):
    """One batch of several of the same shapes."""
    def stack(field, axis=0):
      return np.concatenate([getattr(batch, field) for batch in batches], axis)

    vision = {name: np.concatenate([batch.vision[name] for batch in batches])
              for name in batches[0].vision}
    return cls(stack("tokens"), stack("length"), stack("positions", 1), stack("unit"), vision,
               stack("prompt_id"), [row for batch in batches for row in batch.rows])


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Turns rows into prompts for one model.

  Attributes:
    chat: the model's tokenizer and template.
    config: limits and image area.
    window, patch, merge: the vision tower's geometry, px, px, patches.
  """

  chat: Chat
  config: PromptConfig
  window: int
  patch: int
  merge: int

  def encode(self, row):
    """EncodedPrompt of one row; ValueError naming the row where it cannot be one."""
    try:
      pictures = [self._picture(image) for image in row["images"]]
      units = [int(np.prod(grid)) // self.merge**2 for _, grid in pictures]
      tokens = np.int32(self.chat.prompt(row["question"], units))
    except ValueError as error:
      raise ValueError(f"row {row['id']}: {error}") from error
    if len(tokens) > self.config.max_tokens:
      raise ValueError(f"row {row['id']}: the prompt has {len(tokens)} tokens, the limit is "
                       f"{self.config.max_tokens}; raise prompt.max_tokens or lower max_pixels")
    grids = [grid for _, grid in pictures]
    return EncodedPrompt(tokens, mrope_positions(tokens, self.chat.image_token, grids, self.merge),
                         pictures)

  def batch(self, rows, prompt_id):
    """PromptBatch of `rows`; `prompt_id` int32 [P] says where in the stream they stand."""
    encoded = [self.encode(row) for row in rows]
    tokens, positions, unit, vision = self.pack([[prompt] for prompt in encoded],
                                                self.config.max_tokens, self.config.windows)
    return PromptBatch(tokens, np.int32([len(prompt.tokens) for prompt in encoded]), positions,
                       unit, vision, np.int32(prompt_id), list(rows))

  def pack(self, rows, length, windows):
    """Lays several prompts (or whole sequences) behind each other in each row.

    Args:
      rows: a list of EncodedPrompt for every row; R rows.
      length: T, tokens a row has room for.
      windows: W, vision windows a row has room for.

    Returns:
      tokens int32 [R, T], positions int32 [3, R, T], unit int32 [R, T], vision dict; zeros (unit
      -1) where padded.
    """
    tokens = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((3, len(rows), length), np.int32)
    unit = np.full((len(rows), length), -1, np.int32)
    vision, units = images.pack_rows(
      [[picture for prompt in row for picture in prompt.images] for row in rows],
      windows=windows, window=self.window, patch=self.patch, merge=self.merge)
    for index, row in enumerate(rows):
      start = 0
      for prompt in row:
        end = start + len(prompt.tokens)
        tokens[index, start:end] = prompt.tokens
        positions[:, index, start:end] = prompt.positions
        start = end
      if units[index]:
        unit[index, tokens[index] == self.chat.image_token] = np.concatenate(units[index])
    return tokens, positions, unit, vision

  def _picture(self, image):
    if isinstance(image, np.ndarray):
      image = Image.fromarray(image)
    pixels = images.load_image(image, min_pixels=self.config.min_pixels,
                               max_pixels=self.config.max_pixels, factor=self.patch * self.merge)
    return images.patchify(pixels, patch=self.patch, merge=self.merge)
