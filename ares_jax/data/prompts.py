"""Encodes rows as prompts: tokens, M-RoPE positions and image patches of fixed shape, on the host.

P prompts, T prompt tokens, W vision windows, S patches a window, C values of a patch.
"""

import contextlib
import dataclasses

import numpy as np

from ares_jax.data import images
from ares_jax.data.bad_row import BadRow
from ares_jax.data.chat import Chat
from ares_jax.data.positions import mrope_positions
from ares_jax.system.config import optional

LETTERS_A_TOKEN = 256  # more than any token of Qwen's vocabulary has, 128 spaces


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """How a row becomes a prompt of fixed shape.

  Shape i holds max_tokens[i] tokens and windows[i] vision windows in every row. A batch takes the
  first shape that holds all its rows, so programs are compiled for these shapes only.
  """

  suffix: str  # appended to every question
  max_tokens: tuple[int, ...]  # T of each shape, ascending; a longer prompt is an error
  windows: tuple[int, ...]  # W of each shape, as many as max_tokens, ascending; 0 for texts alone
  min_pixels: int  # images are resized to an area within these bounds (HF's rule)
  max_pixels: int
  # Whether images are turned as their EXIF orientation says, as servers do; the release does not.
  turn_images: bool = optional(True)

  def __post_init__(self):
    if len(self.max_tokens) != len(self.windows) or not self.max_tokens:
      raise ValueError(f"max_tokens = {self.max_tokens} and windows = {self.windows} must have the "
                       "same number of sizes, at least one: shape i has the i-th of both")
    for name in ("max_tokens", "windows"):
      sizes = getattr(self, name)
      least = 1 if name == "max_tokens" else 0
      if min(sizes) < least or list(sizes) != sorted(sizes):
        raise ValueError(f"{name} = {sizes} must be >= {least} and ascending")
    if not 0 < self.min_pixels <= self.max_pixels:
      raise ValueError(f"min_pixels = {self.min_pixels}, max_pixels = {self.max_pixels}: "
                       "0 < min_pixels <= max_pixels is needed")


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """One prompt, not padded."""

  tokens: np.ndarray  # int32 [T]
  positions: np.ndarray  # int32 [3, T]
  learnt: np.ndarray  # bool [T]: True on answers, which fine-tuning learns
  images: list  # (patches uint8 [n, C], grid (t, h, w)) an image


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """P prompts of one shape; H of them, right-padded, are with this process (all P, if it is alone).

  Images are not padded: `vision` makes the arrays of those that are asked for.
  """

  tokens: np.ndarray  # int32 [H, T]
  length: np.ndarray  # int32 [H]
  positions: np.ndarray  # int32 [3, H, T]
  unit: np.ndarray  # int32 [H, T]: which merged vision unit feeds the token, -1 for text
  images: list  # H lists of images, as in EncodedPrompt
  shape: images.VisionShape  # of the arrays of `vision`
  prompt_id: np.ndarray  # int32 [H]: index in the stream of prompts
  rows: list  # H of the source's rows, for answers and metadata
  held: np.ndarray  # int [H]: their numbers among the P prompts
  sizes: np.ndarray  # int64 [P, 4], of all P prompts: `Encoder.sizes`

  def vision(self, indices=None):
    """Patches uint8 [R, W, S, C], hw int32 [R, W, S, 2], image int32 [R, W, S] of R prompts.

    They are the held prompts at `indices`; None: all that are held.
    """
    chosen = self.images if indices is None else [self.images[index] for index in indices]
    return self.shape.pack(chosen)[0]

  def take(self, indices):
    """The held prompts at `indices`, a list of int, as a batch of their own."""
    return dataclasses.replace(
      self, tokens=self.tokens[indices], length=self.length[indices],
      positions=self.positions[:, indices], unit=self.unit[indices],
      images=[self.images[index] for index in indices], prompt_id=self.prompt_id[indices],
      rows=[self.rows[index] for index in indices], held=np.arange(len(indices)),
      sizes=self.sizes[self.held[indices]])

  @classmethod
  def join(cls, batches, tokens, windows):
    """One batch of several complete ones, of T tokens and W windows, at least those of each."""
    shape = dataclasses.replace(batches[0].shape, windows=windows)
    batches = [batch._padded(tokens) for batch in batches]

    def stack(field, axis=0):
      return np.concatenate([getattr(batch, field) for batch in batches], axis)

    return cls(stack("tokens"), stack("length"), stack("positions", 1), stack("unit"),
               [images for batch in batches for images in batch.images], shape,
               stack("prompt_id"), [row for batch in batches for row in batch.rows],
               np.arange(sum(len(batch.rows) for batch in batches)), stack("sizes"))

  def _padded(self, tokens):
    def pad(array, value=0):
      widths = [(0, 0)] * (array.ndim - 1) + [(0, tokens - array.shape[-1])]
      return np.pad(array, widths, constant_values=value)

    return dataclasses.replace(self, tokens=pad(self.tokens), positions=pad(self.positions),
                               unit=pad(self.unit, -1))


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Turns rows into prompts for one model."""

  chat: Chat  # the model's tokenizer and template
  config: PromptConfig
  window: int  # px, side of a window of the vision tower; 0 without windows, as in VisionConfig
  patch: int  # px, side of a patch
  merge: int  # patches per side of a merged unit

  def encode(self, row):
    """EncodedPrompt of one row; BadRow where it cannot be encoded or is too long."""
    pictures = [self._picture(row, row["images"][index]) for index in self._order(row)]
    grids = [grid for _, grid in pictures]
    pieces = self._pieces(row, grids)
    tokens = np.int32([token for ids, _ in pieces for token in ids])
    learnt = np.concatenate([np.full(len(ids), is_answer) for ids, is_answer in pieces])
    positions = mrope_positions(tokens, self.chat.image_token, grids, self.merge)
    prompt = EncodedPrompt(tokens, positions, learnt, pictures)
    windows = self.count_windows(prompt)
    max_tokens, max_windows = self.config.max_tokens[-1], self.config.windows[-1]
    if len(tokens) > max_tokens or windows > max_windows:
      name = "max_tokens" if len(tokens) > max_tokens else "windows"
      raise BadRow(row["id"], "length", f"the prompt has {len(tokens)} tokens and {windows} vision "
                   f"windows, the limit is {max_tokens} and {max_windows}; raise prompt.{name} or "
                   "lower max_pixels")
    return prompt

  def _order(self, row):
    with _named(row, "marks"):
      return self.chat.order(row["question"], len(row["images"]), row.get("history", ()))

  def _pieces(self, row, grids):
    letters = sum(map(len, [row["question"], *(
      turn["content"] for turn in row.get("history", ()))]))
    check_letters(row, letters, self.config.max_tokens[-1])
    units = [int(np.prod(grid)) // self.merge**2 for grid in grids]
    with _named(row, "question"):
      return self.chat.pieces(row["question"], units, row.get("history", ()))

  def count_windows(self, prompt):
    """Number of vision windows that an EncodedPrompt needs."""
    return images.count_windows([grid for _, grid in prompt.images], window=self.window,
                                patch=self.patch, merge=self.merge)

  def sizes(self, encoded):
    """int64 [P, 4] of EncodedPrompts: tokens, vision windows, and patches as in `count_patches`."""
    return np.array([(len(prompt.tokens), self.count_windows(prompt),
                      *images.count_patches([grid for _, grid in prompt.images]))
                     for prompt in encoded], np.int64).reshape(-1, 4)

  def batch(self, rows, prompt_id, encoded=None, *, held=None, sizes=None):
    """PromptBatch of `rows`, at indices `prompt_id` of the stream, in the first shape that fits.

    `encoded` has the EncodedPrompt of each row; None: computed here. If other processes hold
    further rows of the batch, `held` and `sizes` are as in PromptBatch; None: there are none.
    """
    encoded = [self.encode(row) for row in rows] if encoded is None else encoded
    if held is None:
      held, sizes = np.arange(len(rows)), self.sizes(encoded)
    shapes = zip(self.config.max_tokens, self.config.windows, strict=True)
    tokens, windows = next(shape for shape in shapes if (sizes[:, :2].max(0) <= shape).all())
    return PromptBatch(
      *self.pack_texts([[prompt] for prompt in encoded], tokens),
      images=[prompt.images for prompt in encoded], shape=self.vision_shape(windows),
      prompt_id=np.int32(prompt_id), rows=list(rows), held=held, sizes=sizes)

  def vision_shape(self, windows):
    """VisionShape of rows of `windows`."""
    return images.VisionShape(windows, self.window, self.patch, self.merge)

  def pack_texts(self, rows, length):
    """Packs R lists of EncodedPrompt, each one after the other, into rows of T = `length` tokens.

    Returns:
      tokens int32 [R, T], tokens in each row int32 [R], positions int32 [3, R, T], unit int32
      [R, T]; zeros (unit -1) where padded.
    """
    tokens = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((3, len(rows), length), np.int32)
    unit = np.full((len(rows), length), -1, np.int32)
    ends = np.zeros(len(rows), np.int32)
    for index, row in enumerate(rows):
      for prompt in row:
        start, ends[index] = ends[index], ends[index] + len(prompt.tokens)
        tokens[index, start:ends[index]] = prompt.tokens
        positions[:, index, start:ends[index]] = prompt.positions
      grids = [grid for prompt in row for _, grid in prompt.images]
      if grids:
        unit[index, tokens[index] == self.chat.image_token] = images.token_units(
          grids, window=self.window, patch=self.patch, merge=self.merge)
    return tokens, ends, positions, unit

  def _picture(self, row, image):
    with _named(row, "image"):
      pixels = images.load_image(image, min_pixels=self.config.min_pixels,
                                 max_pixels=self.config.max_pixels, factor=self.patch * self.merge,
                                 turn=self.config.turn_images)
    return images.patchify(pixels, patch=self.patch, merge=self.merge)


def check_letters(row, letters, tokens):
  """BadRow where so many letters are more than so many tokens; a text of 100 MB takes minutes."""
  if letters > LETTERS_A_TOKEN * tokens:
    raise BadRow(row["id"], "length", f"a text has {letters} letters, the limit is {tokens} tokens "
                 f"of at most {LETTERS_A_TOKEN} letters")


@contextlib.contextmanager
def _named(row, code):
  """Turns a ValueError about a row into a BadRow."""
  try:
    yield
  except ValueError as error:
    missing = isinstance(error.__cause__, FileNotFoundError)
    raise BadRow(row["id"], "image_missing" if missing else code, error) from error
