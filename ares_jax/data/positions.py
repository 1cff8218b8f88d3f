"""Computes multimodal rotary positions (M-RoPE; Qwen2-VL, section 2.1, arXiv 2409.12191)."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(tokens: Sequence[int] | np.ndarray, image_token: int,
                    grids: Sequence[tuple[int, int, int]] | np.ndarray, merge: int) -> np.ndarray:
  """Time, height and width position of every token of one row, int32 [3, T].

  Text counts up on all three axes. The tokens of an image have one time, and the row and column of
  their merged patch as height and width, each plus the start. The text after it continues at start
  + max(height, width) in merged patches, and a response at `positions.max() + 1`.

  Args:
    tokens: [T] ids of one row without padding, one `image_token` per merged unit of each image.
    grids: one (t, h, w) per image in patches, in the order of the images.
    merge: patches per side of a merged unit.

  Raises:
    ValueError: a run of image tokens does not fit the next grids, or grids are left over.
  """
  tokens = np.asarray(tokens)
  positions = np.empty((3, tokens.size), np.int32)
  is_image = tokens == image_token
  # Ends of runs of text or image tokens: [0, first change, ..., T].
  edges = np.concatenate([[0], np.flatnonzero(np.diff(is_image)) + 1, [tokens.size]])
  remaining = [tuple(int(size) for size in grid) for grid in grids]
  start = 0
  for first, last in zip(edges[:-1], edges[1:], strict=True):
    if first == last:
      continue
    if not is_image[first]:
      positions[:, first:last] = start + np.arange(last - first)
      start += last - first
      continue
    # Images without a token between them form one run.
    while first < last:
      if not remaining:
        raise ValueError(f"{last - first} image tokens at {first} have no image left: "
                         f"{len(grids)} images were given; check the prompt's placeholders")
      frames, rows, columns = remaining.pop(0)
      rows, columns = rows // merge, columns // merge
      units = frames * rows * columns
      if first + units > last:
        raise ValueError(
          f"image of grid {(frames, rows * merge, columns * merge)} needs {units} tokens, "
          f"{last - first} follow at {first}; check the prompt's placeholders")
      positions[:, first:first + units] = start + np.indices((frames, rows, columns)).reshape(3, -1)
      start += max(rows, columns)
      first += units
  if remaining:
    raise ValueError(f"{len(remaining)} of {len(grids)} images have no image tokens in the row; "
                     "check the prompt's placeholders")
  return positions
