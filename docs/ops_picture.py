"""Draws docs/ops.png: a sentence's entropies, its windows, the threshold and the HWE tokens.

    python -m docs.ops_picture [FILE]

The entropies are made up to show the definitions; everything else in the picture is computed from
them by the ops.
"""

import pathlib
import sys

import numpy as np

from ares_jax import entropy_threshold, hwe_cover, hwe_flags, window_entropy
from ares_jax.system import figures

# token, entropy in nats
SENTENCE = (
  ("The", 0.3), ("red", 0.1), ("cell", 0.0), ("reads", 0.2), ("7", 0.4), (",", 0.1), ("so", 1.1),
  ("7", 0.3), ("+", 0.2), ("5", 0.1), ("=", 0.0), ("12", 0.3), (".", 0.4), ("Wait", 2.2),
  (",", 0.7), ("maybe", 1.9), ("the", 0.8), ("blue", 1.6), ("one", 0.9), ("is", 0.3), ("a", 0.2),
  ("6", 1.4), (":", 0.2), ("7", 0.1), ("+", 0.1), ("6", 0.2), ("=", 0.0), ("13", 0.3),
)
WINDOW = 4
QUANTILE = 0.85
QUIET, COVERED, MEAN, LIMIT = "#b8c4d0", "#e69f00", "#0072b2", "#b3261e"


def analyse(entropy_T):
  """(window means, which windows are complete, flags, covered tokens, threshold) of a sentence."""
  entropy_BT = np.float32([entropy_T])
  mask_BT = np.ones_like(entropy_BT, bool)
  mean_BT, complete_BT = window_entropy(entropy_BT, mask_BT, window=WINDOW)
  threshold, _ = entropy_threshold(mean_BT, complete_BT, quantile=QUANTILE)
  flag_BT = hwe_flags(entropy_BT, mask_BT, threshold, window=WINDOW)
  cover_BT = hwe_cover(flag_BT, mask_BT, window=WINDOW)
  rows = (np.asarray(x)[0] for x in (mean_BT, complete_BT, flag_BT, cover_BT))
  return *rows, float(threshold)


def draw():
  """The picture as a matplotlib Figure."""
  tokens, entropy_T = zip(*SENTENCE, strict=True)
  mean_T, complete_T, flag_T, cover_T, threshold = analyse(entropy_T)
  figure, [panel] = figures.new_figure("", y_labels=["nats"], width=12.4, height=4.2)
  index_T = np.arange(len(tokens))
  for covered, colour, hatch, name in ((False, QUIET, "", "entropy of a token"),
                                       (True, COVERED, "//", "entropy inside a flagged window")):
    part_T = cover_T == covered
    panel.bar(index_T[part_T], np.array(entropy_T)[part_T], color=colour, hatch=hatch,
              edgecolor="white", label=name)
  panel.plot(index_T[complete_T], mean_T[complete_T], color=MEAN, marker="o", markersize=5,
             label=f"mean of the {WINDOW} tokens that start here")
  panel.plot(index_T[flag_T], 0 * index_T[flag_T] - 0.1, color=MEAN, marker="^", linestyle="",
             clip_on=False, label="flagged token")
  panel.axhline(threshold, color=LIMIT, linestyle="--", label=f"threshold {threshold:.2f}")
  first = int(np.flatnonzero(flag_T)[0])  # a bracket stands over the first flagged window
  left, right = first - 0.4, first + WINDOW - 0.6
  panel.plot([left, left, right, right], [2.3, 2.37, 2.37, 2.3], color=MEAN, linestyle="-",
             marker="")
  panel.text(right + 0.2, 2.33, f"a window of {WINDOW}: mean {mean_T[first]:.2f}", color=MEAN,
             va="center")
  panel.set_xticks(index_T, tokens, fontsize=9.5)
  panel.tick_params(axis="x", length=0, pad=16)
  panel.set(xlim=(-0.6, len(tokens) - 0.4), ylim=(0, 2.45), yticks=(0, 1, 2))
  figures.draw_legend(panel)
  return figure


def main():
  path = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("ops.png")
  figures.save_png(draw(), path)


if __name__ == "__main__":
  main()
