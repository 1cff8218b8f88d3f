"""Draws docs/ops.png: a sentence's entropies, its windows, the threshold and the HWE tokens.

    python -m docs.ops_picture [FILE]

The entropies are made up to show the definitions; everything else in the picture is computed from
them by the ops.
"""

import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ares_jax import entropy_threshold, hwe_cover, hwe_flags, window_entropy

# token, entropy in nats
SENTENCE = (
  ("The", 0.3), ("red", 0.1), ("cell", 0.0), ("reads", 0.2), ("7", 0.4), (",", 0.1), ("so", 1.1),
  ("7", 0.3), ("+", 0.2), ("5", 0.1), ("=", 0.0), ("12", 0.3), (".", 0.4), ("Wait", 2.2),
  (",", 0.7), ("maybe", 1.9), ("the", 0.8), ("blue", 1.6), ("one", 0.9), ("is", 0.3), ("a", 0.2),
  ("6", 1.4), (":", 0.2), ("7", 0.1), ("+", 0.1), ("6", 0.2), ("=", 0.0), ("13", 0.3),
)
WINDOW = 4
QUANTILE = 0.85
WIDTH, HEIGHT, SCALE = 1240, 420, 2
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 74, 52
HIGHEST = 2.4  # nats at the top of the axis
INK, GREY, FAINT = "#1f2933", "#616e7c", "#d9dee4"
QUIET, COVERED, MEAN, LIMIT = "#b8c4d0", "#f29f4b", "#1f5fa8", "#b3261e"


def analyse(entropy_T):
  """Window means and where they are whole, threshold, flags and covered tokens of one sentence."""
  entropy_BT = np.float32([entropy_T])
  mask_BT = np.ones_like(entropy_BT, bool)
  mean_BT, whole_BT = window_entropy(entropy_BT, mask_BT, window=WINDOW)
  threshold, _ = entropy_threshold(mean_BT, whole_BT, quantile=QUANTILE)
  flag_BT = hwe_flags(entropy_BT, mask_BT, threshold, window=WINDOW)
  cover_BT = hwe_cover(flag_BT, mask_BT, window=WINDOW)
  rows = (np.asarray(x)[0] for x in (mean_BT, whole_BT, flag_BT, cover_BT))
  return *rows, float(threshold)


def draw():
  image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
  canvas = ImageDraw.Draw(image)
  font = ImageFont.load_default(14 * SCALE)
  mean_T, whole_T, flag_T, cover_T, threshold = analyse([entropy for _, entropy in SENTENCE])
  step = (WIDTH - LEFT - RIGHT) / len(SENTENCE)
  floor = HEIGHT - BOTTOM

  def height(nats):
    return floor - nats / HIGHEST * (floor - TOP)

  def line(x0, y0, x1, y1, color, width=1.0):
    canvas.line([SCALE * v for v in (x0, y0, x1, y1)], color, round(SCALE * width))

  def box(x0, y0, x1, y1, color):
    canvas.rectangle([SCALE * v for v in (x0, y0, x1, y1)], color)

  def dot(x, y, radius, color):
    canvas.ellipse([SCALE * v for v in (x - radius, y - radius, x + radius, y + radius)], color)

  def text(x, y, words, color=INK, anchor="mm"):
    canvas.text((SCALE * x, SCALE * y), words, color, font, anchor=anchor)

  def dashes(x0, x1, y):
    for x in np.arange(x0, x1, 10):
      line(x, y, min(x + 6, x1), y, LIMIT, 1.5)

  for nats in (0, 1, 2):
    line(LEFT, height(nats), WIDTH - RIGHT, height(nats), FAINT)
    text(LEFT - 10, height(nats), str(nats), GREY, "rm")
  text(12, TOP - 22, "nats", GREY, "lm")
  for t, (token, entropy) in enumerate(SENTENCE):
    x = LEFT + t * step
    box(x + 5, height(entropy), x + step - 5, floor, COVERED if cover_T[t] else QUIET)
    text(x + step / 2, floor + 18, token, INK if cover_T[t] else GREY)
    if flag_T[t]:
      dot(x + step / 2, floor + 36, 4, MEAN)
  points = [(LEFT + (t + 0.5) * step, height(mean_T[t])) for t in np.flatnonzero(whole_T)]
  for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
    line(x0, y0, x1, y1, MEAN, 2)
  for x, y in points:
    dot(x, y, 3.5, MEAN)
  dashes(LEFT, WIDTH - RIGHT, height(threshold))
  text(WIDTH - RIGHT, height(threshold) - 12, f"threshold {threshold:.2f}", LIMIT, "rm")
  # The first window that is flagged, as a bracket over its tokens.
  first = int(np.flatnonzero(flag_T)[0])
  x0, x1, y = LEFT + first * step + 5, LEFT + (first + WINDOW) * step - 5, TOP - 6
  line(x0, y, x1, y, MEAN, 1.5)
  line(x0, y, x0, y + 6, MEAN, 1.5)
  line(x1, y, x1, y + 6, MEAN, 1.5)
  text(x1 + 8, y, f"a window of {WINDOW}: mean {mean_T[first]:.2f}", MEAN, "lm")
  x = LEFT
  for color, words in ((QUIET, "entropy of a token"), (COVERED, "inside a flagged window"),
                       (MEAN, "mean of the window that starts here; below: flagged tokens")):
    dot(x + 6, 18, 6, color)
    text(x + 20, 18, words, INK, "lm")
    x += 46 + canvas.textlength(words, font) / SCALE
  return image


def main():
  path = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("ops.png")
  draw().quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
  main()
