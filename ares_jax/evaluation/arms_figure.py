"""Draws accuracy and tokens by difficulty for every arm, like the paper's figure 6."""

from ares_jax.evaluation.scores import level_order
from ares_jax.ops.difficulty import BUCKETS
from ares_jax.system import figures

LEVELS = 10  # at most; the bars of more levels would be too narrow to tell apart


def arms_page(table):
  """An HTML page with the figure in it, which needs no other file."""
  return ("<!doctype html><meta charset='utf-8'><title>Accuracy and tokens by difficulty</title>\n"
          + figures.svg_text(arms_figure(table)))


def arms_figure(table):
  """A matplotlib figure of two panels, accuracy and tokens, with a bar for every row of `arm_rows`.

  Difficulty is the problems' level, the same problems for every arm, if every arm has levels and
  there are at most LEVELS. Otherwise it is the arm's own pass rate, and the problems differ between
  arms. Whiskers are 95% t-intervals over seeds, cut off at the panel's edges; one seed has none.
  """
  levels = sorted({name for row in table for name in row["level"]}, key=level_order)
  field, names, labels = "level", levels, [f"level {name}" for name in levels]
  if len(levels) > LEVELS or not all(row["level"] for row in table):
    field, names, labels = "bucket", BUCKETS, BUCKETS
  figure, panels = figures.new_figure("Accuracy, %", "Tokens of an answer", width=8.6,
                                      height=5.4 + 0.12 * len(table))
  for panel, key, factor in zip(panels, ("accuracy", "length"), (100, 1), strict=True):
    series = {}
    for row in table:
      means = [part.get(key) for part in (row, *(row[field].get(name, {}) for name in names))]
      series[f"{row['arm']}, {len(row['seeds'])} seed(s)"] = [_bar(pair, factor) for pair in means]
    figures.draw_grouped_bars(panel, ["all", *labels], series)
    highest = max((bar[0] for bars in series.values() for bar in bars if bar), default=1)
    panel.set_ylim(0, 100 if key == "accuracy" else 1.15 * highest)
  figures.draw_legend(panels[0])
  return figure


def _bar(pair, factor):
  """(value, half-width of its whisker or None) of a mean with its interval, or None."""
  if pair is None or pair[0] is None:
    return None
  return tuple(None if value is None else factor * value for value in pair)
