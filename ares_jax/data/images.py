"""Turns image files into resized RGB, uint8 patches, and windows of a static size, on the host.

Sizes, pixels and order are equal to those of Hugging Face's image processor of Qwen2-VL and later
(PIL backend), bit for bit, but for images with an EXIF orientation or 16 bits (see `load_image`).
Pixels stay uint8 and are normalised on the device. n patches of an image or of a row,
C = 3 * temporal_patch * patch^2 values of a patch, R rows, W windows of a row, S patch slots of a
window.
"""

import contextlib
import dataclasses
import io
import math
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from ares_jax.models.config import STRETCH

Grid = tuple[int, int, int]  # frames, rows and columns of patches
Source = str | os.PathLike | bytes | Image.Image | np.ndarray

# 67 MP, 200 MB decoded. PIL only warns between 89 and 179 MP, where a file of 79 kB needs 387 MB.
MAX_SOURCE_PIXELS = 2**26
# Formats with well-tested decoders. Others (EPS, PSD ...) are rare, and more open to attacks.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
# Beyond this aspect ratio the released processor refuses an image.
MAX_ASPECT = 200


class WindowLayout(NamedTuple):
  """Slots for the patches of one row's images; patches are in the processor's order."""

  slot: np.ndarray  # [n] int32, window * S + index in the window
  hw: np.ndarray  # [n, 2] int32, row and column of the patch in its image
  image: np.ndarray  # [n] int32, 1 + index of the frame in the row
  windows: int  # windows in use


@dataclasses.dataclass(frozen=True)
class VisionShape:
  """The static shape of a row's images, see `pack_rows`."""

  windows: int  # W
  window: int  # px, side of a window; 0 without windows
  patch: int  # px, side of a patch
  merge: int  # patches per side of a merged unit

  @property
  def units(self):
    """U, merged units of a row."""
    return self.windows * ((self.window // self.patch) ** 2 or STRETCH) // self.merge**2

  def pack(self, rows):
    """`pack_rows` of these rows: the fields of `models.vision.VisionInput`, and the units."""
    return pack_rows(rows, **dataclasses.asdict(self))


def resize_size(height: int, width: int, *, min_pixels: int, max_pixels: int,
                factor: int = 28) -> tuple[int, int]:
  """Height and width in px, multiples of `factor`, that an image is resized to.

  Each side is rounded to the nearest multiple (halves to even); if the area then leaves
  [min_pixels, max_pixels], both sides are scaled to the bound and rounded inwards. A square of
  `factor` = patch * merge px becomes one token.

  Raises:
    ValueError: an empty image, or one side more than 200 times the other.
  """
  if min(height, width) < 1:
    raise ValueError(f"image of {width} x {height} px is empty")
  aspect = max(height, width) / min(height, width)
  if aspect > MAX_ASPECT:
    raise ValueError(f"image of {width} x {height} px has aspect ratio {aspect:.0f}, the limit is "
                     f"{MAX_ASPECT}; crop it or drop the row")
  rows, columns = round(height / factor), round(width / factor)
  if rows * columns * factor**2 > max_pixels:
    shrink = math.sqrt(height * width / max_pixels)
    rows = max(1, math.floor(height / shrink / factor))
    columns = max(1, math.floor(width / shrink / factor))
  elif rows * columns * factor**2 < min_pixels:
    grow = math.sqrt(min_pixels / (height * width))
    rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
  return rows * factor, columns * factor


def load_image(source: Source, *, min_pixels: int, max_pixels: int, factor: int = 28,
               turn: bool = True) -> np.ndarray:
  """Decodes an image to RGB and resizes it (bicubic, on uint8), with bounds as in `resize_size`.

  Args:
    source: path, encoded bytes, an opened PIL image, or uint8 [H, W, 3].
    turn: whether the image is turned as its EXIF orientation says, as servers do; the released
      processor does not.

  Returns:
    uint8 [H, W, 3]. Transparency is blended on white, as transformers does. Grey levels of 16 bits
    are divided by 256; transformers makes those above 255 white.

  Raises:
    ValueError: missing, no regular file, corrupt, truncated, of another format, of grey levels
      without a range, of several frames, or larger than MAX_SOURCE_PIXELS; the message names its
      path.
  """
  with _named(source), _open(source) as image:
    if turn:
      # A block of EXIF that cannot be read turns nothing; damage to the pixels shows again below.
      with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    height, width = resize_size(image.height, image.width, min_pixels=min_pixels,
                                max_pixels=max_pixels, factor=factor)
    return np.asarray(_to_rgb(image).resize((width, height), Image.Resampling.BICUBIC))


def patchify(image: np.ndarray, *, patch: int = 14, temporal_patch: int = 2,
             merge: int = 2) -> tuple[np.ndarray, Grid]:
  """Cuts an image, uint8 [H, W, 3] with sides that are multiples of patch * merge, into patches.

  A patch has a side of `patch` px and repeats the image in `temporal_patch` frames.

  Returns:
    patches: uint8 [n, C]; merged units in raster order, and the patches of each in raster order;
      the values of a patch are ordered (channel, temporal, row, column).
    grid: (1, rows, columns) in patches.
  """
  height, width, channels = image.shape
  side = patch * merge
  if channels != 3 or image.dtype != np.uint8 or height % side or width % side:
    raise ValueError(f"image {image.dtype} {image.shape} must be uint8 with 3 channels and sides "
                     f"that are multiples of {side}; pass it through load_image")
  rows, columns = height // patch, width // patch
  x = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
  x = x.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
  x = np.broadcast_to(x, (*x.shape[:5], temporal_patch, patch, patch))
  return x.reshape(rows * columns, -1), (1, rows, columns)


def window_layout(grids: Sequence[Grid], *, window: int, patch: int, merge: int) -> WindowLayout:
  """The WindowLayout of one row's images, whose `grids` are in order; sizes as in `pack_rows`.

  Each frame is cut into windows of window x window px from its top left corner; the windows at the
  right and bottom edge may be partial. The units of a window fill its first slots in raster order.
  Without windows (0) all units follow each other in raster order, and the last "window" of the row
  may be partial.
  """
  side = window // (patch * merge)  # units per side of a window
  unit = merge**2  # patches of a unit
  in_unit = np.stack(np.divmod(np.arange(unit), merge), axis=-1)  # row, column
  slots, hw, image = [np.zeros(0, int)], [np.zeros((0, 2), int)], [np.zeros(0, int)]
  windows = frames_before = 0
  for frames, rows, columns in grids:
    rows, columns = rows // merge, columns // merge  # units from here on
    frame, row, column = np.indices((frames, rows, columns)).reshape(3, -1)
    if window:
      down, across = math.ceil(rows / side), math.ceil(columns / side)
      window_index = windows + (frame * down + row // side) * across + column // side
      # Units per row of this window: fewer than `side` at the right edge.
      width = np.minimum(side, columns - column // side * side)
      in_window = (row % side) * width + column % side
      first = window_index * side**2 + in_window
      windows += frames * down * across
    else:
      first = sum(map(len, hw)) // unit + np.arange(len(frame))
    slots.append((first[:, None] * unit + np.arange(unit)).ravel())
    hw.append((np.stack([row, column], axis=-1)[:, None] * merge + in_unit).reshape(-1, 2))
    image.append(np.repeat(1 + frames_before + frame, unit))
    frames_before += frames
  windows = windows or math.ceil(sum(map(len, hw)) / STRETCH)
  arrays = (np.concatenate(parts).astype(np.int32) for parts in (slots, hw, image))
  return WindowLayout(*arrays, windows)


def pack_rows(rows: Sequence[Sequence[tuple[np.ndarray, Grid]]], *, windows: int, window: int,
              patch: int = 14, merge: int = 2
              ) -> tuple[dict[str, np.ndarray], list[list[np.ndarray]]]:
  """Packs the images of R rows into arrays of one static shape.

  Args:
    rows: for each row its images as (patches [n, C], grid), from `patchify`.
    windows: W, windows in every row.
    window, patch: px, sides of a window and of a patch. Window 0: windows are stretches of
      STRETCH patch slots.
    merge: patches per side of a merged unit.

  Returns:
    vision: the fields of `models.vision.VisionInput`: patches uint8 [R, W, S, C],
      hw int32 [R, W, S, 2], image int32 [R, W, S].
    units: for each row, for each image: int32 [n / merge^2], the unit of `vision_features` that
      feeds each of its image tokens, in token order.

  Raises:
    ValueError: a row that needs more than `windows` windows.
  """
  slots = (window // patch) ** 2 or STRETCH
  width = next((patches.shape[1] for row in rows for patches, _ in row), 6 * patch**2)
  packed = {
    "patches": np.zeros((len(rows), windows * slots, width), np.uint8),
    "hw": np.zeros((len(rows), windows * slots, 2), np.int32),
    "image": np.zeros((len(rows), windows * slots), np.int32),
  }
  units = []
  for index, row in enumerate(rows):
    grids = [grid for _, grid in row]
    layout = window_layout(grids, window=window, patch=patch, merge=merge)
    if layout.windows > windows:
      raise ValueError(f"row {index} needs {layout.windows} windows of {slots} patches, the limit "
                       f"is {windows}; raise the number of windows or lower max_pixels")
    for patches, grid in row:
      if patches.shape[0] != math.prod(grid):
        raise ValueError(f"row {index}: {patches.shape[0]} patches do not fill a grid of {grid}")
    if row:
      packed["patches"][index, layout.slot] = np.concatenate([patches for patches, _ in row])
      packed["hw"][index, layout.slot] = layout.hw
      packed["image"][index, layout.slot] = layout.image
    unit = layout.slot[:: merge**2] // merge**2
    ends = np.cumsum([math.prod(grid) // merge**2 for grid in grids])
    units.append(np.split(unit, ends[:-1]) if row else [])
  return {name: array.reshape(len(rows), windows, slots, *array.shape[2:])
          for name, array in packed.items()}, units


def token_units(grids: Sequence[Grid], *, window: int, patch: int, merge: int) -> np.ndarray:
  """int32: the unit that feeds each image token of a row, in token order."""
  layout = window_layout(grids, window=window, patch=patch, merge=merge)
  return layout.slot[:: merge**2] // merge**2


def count_windows(grids: Sequence[Grid], *, window: int, patch: int, merge: int) -> int:
  """Number of windows that the images of one row need."""
  if not window:
    return math.ceil(sum(map(math.prod, grids)) / STRETCH)
  side = window // (patch * merge)
  return sum(frames * math.ceil(rows // merge / side) * math.ceil(columns // merge / side)
             for frames, rows, columns in grids)


def count_patches(grids: Sequence[Grid]) -> tuple[int, int]:
  """The patches of all frames, and the sum over the frames of their number squared."""
  return (sum(math.prod(grid) for grid in grids),
          sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids))


@contextlib.contextmanager
def _named(source):
  """Turns a failure inside into a ValueError that names the image."""
  try:
    yield
  # Decoders raise anything from SyntaxError to struct.error on damaged files.
  except Exception as error:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
      reason = "not one of " + ", ".join(FORMATS)
    raise ValueError(f"{name}: cannot use this image: {reason}") from error


def _open(source) -> Image.Image:
  if isinstance(source, Image.Image):
    image = source
  elif isinstance(source, np.ndarray):
    image = Image.fromarray(source)
  elif isinstance(source, bytes):
    image = Image.open(io.BytesIO(source), formats=FORMATS)
  elif "://" in os.fspath(source):
    image = Image.open(io.BytesIO(epath.Path(source).read_bytes()), formats=FORMATS)
  else:
    if not stat.S_ISREG(os.stat(source).st_mode):  # to read a pipe would wait for ever
      raise ValueError("no regular file")
    image = Image.open(source, formats=FORMATS)
  # Only the header has been read so far.
  if image.width * image.height > MAX_SOURCE_PIXELS:
    raise ValueError(f"{image.width} x {image.height} px exceed the limit of "
                     f"{MAX_SOURCE_PIXELS / 1e6:.0f} MP; shrink it")
  # A photo may hold a preview as a second frame; in other formats frames are an animation.
  if getattr(image, "is_animated", False) and image.format not in ("JPEG", "MPO"):
    raise ValueError(f"it has {image.n_frames} frames, of which one would be shown; save that one")
  # The caller closes the returned image, so an image that the user opened is copied.
  return image.copy() if image is source else image


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ("I", "F"):
    raise ValueError(f"its grey levels, {image.mode!r}, have no range; save it with 8 or 16 bits")
  if "A" not in image.getbands() and "transparency" not in image.info:
    return image.convert("RGB")
  image = image.convert("RGBA")
  white = Image.new("RGBA", image.size, (255, 255, 255, 255))
  return Image.alpha_composite(white, image).convert("RGB")
