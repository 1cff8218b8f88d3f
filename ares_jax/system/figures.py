"""Still pictures drawn with matplotlib: curves, points, bars, intervals, histograms, state tables.

    save_png(curve_figure("Reward", [Curve("easy", [1, 2, 3], [0.5, None, 0.7])]), "reward.png")

Drawing uses only matplotlib's objects, never pyplot, and so changes no global state. matplotlib is
imported on first use, so that a program which draws nothing does not wait for it. The colours
differ for colour-blind readers too.
"""

import io
import itertools
import os
import pathlib
import typing
import warnings

import numpy as np

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56b4e9", "#1f2933"]
DASHES = ["-", "--", "-.", ":"]
MARKERS = [*"osx^+Dv"]
HATCHES = ["", "///", "...", "xx"]
INK, GREY, FAINT = "#1f2933", "#52606d", "#d9dee4"


class Curve(typing.NamedTuple):
  """Values over x, with a gap where a value is None or nan."""
  name: str
  x: list
  y: list


def new_figure(*titles, x_label="", y_labels=(), width=6.4, height=4.0):
  """(Figure, list of Axes) with one panel below another for each title; sizes in inches."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")
  panels = list(figure.subplots(len(titles), squeeze=False)[:, 0])
  for panel, title, y_label in itertools.zip_longest(panels, titles, y_labels, fillvalue=""):
    panel.set_title(plain(title), loc="left", fontsize=10, color=INK)
    panel.set_ylabel(plain(y_label), color=GREY)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(GREY)
    panel.tick_params(colors=GREY, labelsize=8)
    panel.set_axisbelow(True)
    panel.grid(axis="y", color=FAINT)
    # Curves, points and intervals take the next style each.
    panel.set_prop_cycle(color=COLOURS * 4, linestyle=DASHES * 7, marker=MARKERS * 4)
  panels[-1].set_xlabel(plain(x_label), color=GREY)
  return figure, panels


def curve_figure(title, curves, *, x_label="step", y_label=""):
  """A figure with one panel of curves and their names."""
  figure, [panel] = new_figure(title, x_label=x_label, y_labels=[y_label])
  draw_curves(panel, curves)
  draw_legend(panel)
  return figure


def bar_figure(title, groups, *, x_label):
  """A figure with one panel of horizontal bars, as high as they need."""
  height = 0.9 + 0.25 * sum(len(bars) + 0.6 for _, bars in groups)
  figure, [panel] = new_figure(title, x_label=x_label, height=height)
  draw_bars(panel, groups)
  return figure


def draw_curves(panel, curves):
  """Draws a line with markers for each Curve; whole numbers on x have whole ticks."""
  for index, curve in enumerate(curves):
    # Markers stand apart, shifted so that those of two curves do not meet.
    every = max(1, len(curve.y) // 8)
    panel.plot(curve.x, np.array(curve.y, np.float64), label=plain(curve.name), markersize=4,
               markevery=(index * every // len(curves), every))
  _set_limits(panel, curves)


def draw_points(panel, groups, line=None):
  """Draws the points of each Curve with their own marker, and a line (intercept, slope)."""
  for group in groups:
    panel.plot(group.x, group.y, linestyle="", alpha=0.7, markersize=5, fillstyle="none",
               label=plain(group.name))
  _set_limits(panel, groups)
  x = [value for group in groups for value in group.x]
  if line and x:
    ends = np.array([min(x), max(x)])
    panel.plot(ends, line[0] + line[1] * ends, color=INK, linestyle="-", marker="",
               label="least squares")


def draw_intervals(panel, x, intervals):
  """Draws bars with a marker for {name: (low, middle, high)}, lists over x; None is not drawn."""
  for index, (name, ends) in enumerate(intervals.items()):
    table = np.array([x, *ends], np.float64)
    if not np.isfinite(table[2]).any():
      continue
    at, low, middle, high = table[:, np.isfinite(table[2])]
    # All of one x stand side by side within 0.3 of it.
    beside = at + 0.3 * (index - (len(intervals) - 1) / 2) / len(intervals)
    panel.errorbar(beside, middle, (middle - low, high - middle), linestyle="", elinewidth=2,
                   markersize=6, label=plain(name))


def draw_bars(panel, groups):
  """Draws horizontal bars from zero, the first of [(name, [(value >= 0, text behind)])] on top."""
  y, ticks = 0.0, {}
  for name, bars in groups:
    ticks[y + (len(bars) - 1) / 2] = plain(name)
    for index, (value, text) in enumerate(bars):
      panel.barh(y, value, 0.8, **_filled(index))
      panel.annotate(plain(text), (value, y), (4, 0), textcoords="offset points", va="center",
                     fontsize=8, color=INK)
      y += 1
    y += 0.6
  panel.set_yticks(list(ticks), ticks.values(), color=INK)
  panel.margins(y=0.02)
  panel.invert_yaxis()
  panel.grid(visible=False, axis="y")
  panel.grid(axis="x", color=FAINT)
  # The axis leaves space for the text behind the longest bar, but has no ticks there.
  most = max((value for _, bars in groups for value, _ in bars), default=0) or 1
  panel.set_xlim(0, 1.9 * most)
  panel.set_xticks([tick for tick in panel.get_xticks() if tick <= 1.1 * most])


def draw_grouped_bars(panel, groups, series):
  """Draws vertical bars from zero, side by side in each group, with whiskers.

  `series` is {name: [(value, half-width of its whisker or None) or None for each group]}.
  """
  width = 0.8 / len(series)
  for index, (name, bars) in enumerate(series.items()):
    known = [(group, *bar) for group, bar in enumerate(bars) if bar]
    at, values, halves = np.array(known, np.float64).reshape(-1, 3).T
    panel.bar(at + (index - (len(series) - 1) / 2) * width, values, 0.9 * width, yerr=halves,
              ecolor=INK, error_kw={"elinewidth": 1}, label=plain(name), **_filled(index))
  panel.set_xticks(range(len(groups)), map(plain, groups), color=INK)
  panel.set_ylim(bottom=0)


def draw_histogram(panel, values, bins=40):
  """Draws how often values occur, in `bins` classes at most; classes of whole numbers are whole."""
  values = np.asarray(values)
  panel.hist(values, bins=min(bins, 1 + int(np.ptp(values))), color=COLOURS[0])
  panel.yaxis.get_major_locator().set_params(integer=True)


def draw_states(panel, rows, columns, states, tints):
  """Draws a table of states[row][column], texts whose first word has a colour in `tints`."""
  for row, column in np.ndindex(len(rows), len(columns)):
    text = states[row][column]
    panel.barh(row, 0.96, 0.92, left=column - 0.48, color=tints[text.split()[0]])
    panel.text(column, row, plain(text), ha="center", va="center", fontsize=8, color=INK)
  panel.set_xticks(range(len(columns)), map(str, columns))
  panel.set_yticks(range(len(rows)), map(str, rows))
  panel.invert_yaxis()
  panel.spines[:].set_visible(False)
  panel.grid(visible=False)
  panel.tick_params(length=0)


def draw_legend(panel):
  """Writes the names of a panel's curves or bars below the figure, if there are several."""
  handles, names = panel.get_legend_handles_labels()
  if len(names) > 1:
    panel.figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False,
                        fontsize=8, handlelength=3)


def save_png(figure, path):
  """Writes the figure into a file."""
  pathlib.Path(path).write_bytes(png_bytes(figure))


def save_pngs(figures, folder):
  """Writes FOLDER/NAME.png for each of {name: figure}; returns the paths."""
  os.makedirs(folder, exist_ok=True)
  paths = [os.path.join(folder, f"{name}.png") for name in figures]
  for path, figure in zip(paths, figures.values(), strict=True):
    save_png(figure, path)
  return paths


def png_bytes(figure):
  """The figure as PNG, the same bytes for the same figure."""
  return _saved(figure, "png", {"Software": None})


def svg_text(figure):
  """The figure as an SVG element for an HTML page, without the XML declaration before it."""
  text = _saved(figure, "svg", {"Date": None}).decode("utf-8")
  return text[text.index("<svg"):]


def plain(text):
  """Text that is drawn as it stands: "$" begins no formula, and unprintable letters are "?"."""
  shown = (letter if letter.isprintable() else "?" for letter in str(text))
  return "".join(shown).replace("$", r"\$")


def _saved(figure, kind, metadata):
  import matplotlib

  file = io.BytesIO()
  # Text of a model may hold letters that no font here has; they are drawn as boxes.
  with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "figure"}):
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    figure.savefig(file, format=kind, metadata=metadata)
  return file.getvalue()


def _filled(index):
  """Colour and hatch of the bar at an index."""
  return {"color": COLOURS[index % len(COLOURS)], "edgecolor": "white",
          "hatch": HATCHES[index % len(HATCHES)]}


def _set_limits(panel, curves):
  """Sets limits and ticks: from 0 where that costs little, never a range of rounding errors."""
  panel.ticklabel_format(axis="y", useOffset=False)
  x = [float(value) for curve in curves for value in curve.x]
  if all(map(float.is_integer, x)):
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
  if len(set(x)) == 1:
    panel.set_xlim(x[0] - 0.5, x[0] + 0.5)
  y = np.array([value for curve in curves for value in curve.y], np.float64)
  y = y[np.isfinite(y)]
  low, high = (y.min(), y.max()) if len(y) else (0.0, 1.0)
  if high - low < 1e-6 * max(abs(high), 1e-3):  # a constant
    panel.set_ylim(*((-0.05, 1.0) if abs(high) < 1e-9 else sorted((0.9 * high, 1.1 * high))))
  elif 0 < low < high / 2:
    panel.set_ylim(bottom=0)
