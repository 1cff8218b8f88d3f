"""Pictures as PIL images: curves, dots with their line, bars, coloured cells.

Whatever is told by colour is told by a mark or a word too. Sizes are px of the unscaled picture.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SCALE = 640, 400, 2
LEFT, RIGHT, TOP = 64, 16, 36
COLOURS = ("#1f5fa8", "#b3261e", "#1b6e35", "#7a4fa3", "#8a5a00", "#00707a", "#52606d")
MARKS = "ox+*#=%"  # a curve is told by its mark too
INK, GREY, FAINT = "#1f2933", "#616e7c", "#d9dee4"
BARS = 150  # where bars begin


def lines(title, series, label="step"):
  """A picture of curves: (name, steps, values), None where a value is missing; `label` of x."""
  bottom = 48 + 18 * -(-len(series) // 2)
  paper = Paper(title, [step for _, steps, _ in series for step in steps],
                [value for _, _, values in series for value in values if value is not None],
                label, bottom)
  for index, (name, steps, values) in enumerate(series):
    colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
    points = [None if value is None else (paper.x(step), paper.y(value))
              for step, value in zip(steps, values, strict=True)]
    for first, second in zip(points[:-1], points[1:], strict=True):
      if first and second:
        paper.line(*first, *second, colour, 1.6)
    # Marks that stand apart, shifted so that those of two curves do not meet.
    every = max(1, len(points) // 8)
    for point in points[index * every // len(series)::every]:
      if point:
        paper.text(*point, mark, colour)
    paper.text(LEFT + (index % 2) * 280, HEIGHT - bottom + 52 + 18 * (index // 2),
               f"{mark} {name}", colour, "lm")
  return paper.image


def scatter(fit):
  """A picture of dots and their line: a dict of `report.statistics.length_against_count`."""
  paper = Paper("Length against N_HE, tokens", [dot[0] for dot in fit["dots"]],
                [dot[1] for dot in fit["dots"]],
                f"N_HE; tokens = {fit['intercept']:.3g} + {fit['slope']:.3g} N_HE, "
                f"r = {fit['r']:.2f}, {fit['n']} rollouts; o easy, x medium, + hard", 48)
  for count, tokens, bucket in fit["dots"]:
    paper.text(paper.x(count), paper.y(tokens), MARKS[bucket], COLOURS[bucket])
  ends = [(paper.x(x), paper.y(fit["intercept"] + fit["slope"] * x)) for x in paper.span]
  paper.line(*ends[0], *ends[1], INK, 1.6)
  return paper.image


def bars(title, groups):
  """A picture of bars from a common zero.

  Args:
    title: above it.
    groups: (name, [(value >= 0, words behind the bar)]); the bars of a group stand together, the
      first of every group in one colour, and so on.
  """
  count = sum(len(found) for _, found in groups)
  height = TOP + 24 + 20 * count + 10 * len(groups)
  sheet = Sheet(title, height)
  most = max((value for _, found in groups for value, _ in found), default=0) or 1
  y = TOP + 10
  for name, found in groups:
    sheet.text(BARS - 8, y + 8, name, INK, "rm")
    for place, (value, words) in enumerate(found):
      width = max(1, value / most * (WIDTH - BARS) / 2)
      colour = COLOURS[place % len(COLOURS)]
      sheet.box(BARS, y, BARS + width, y + 15, colour)
      sheet.text(BARS + width + 6, y + 8, words, INK, "lm")
      y += 20
    y += 10
  return sheet.image


def cells(title, rows, columns, states, *, tints, label, note):
  """A picture of a table of states, a colour and a word each.

  Args:
    title: above it.
    rows, columns: what stands at the left and above.
    states: states[row][column], words of which the first tells the colour.
    tints: {first word: colour}.
    label: what the columns are.
    note: below it.
  """
  sheet = Sheet(title, TOP + 60 + 30 * len(rows))
  wide = (WIDTH - LEFT - RIGHT) / len(columns)
  sheet.text(WIDTH / 2, TOP + 2, label, GREY)
  for column, name in enumerate(columns):
    sheet.text(LEFT + (column + 0.5) * wide, TOP + 20, str(name), GREY)
  for row, name in enumerate(rows):
    y = TOP + 34 + 30 * row
    sheet.text(LEFT - 8, y + 13, str(name), GREY, "rm")
    for column, state in enumerate(states[row]):
      x = LEFT + column * wide
      sheet.box(x + 1, y, x + wide - 1, y + 26, tints[state.split()[0]])
      sheet.text(x + wide / 2, y + 13, state, INK)
  sheet.text(LEFT, TOP + 48 + 30 * len(rows), note, INK, "lm")
  return sheet.image


class Sheet:
  """A white picture with a title."""

  def __init__(self, title, height):
    self.image = Image.new("RGB", (WIDTH * SCALE, round(height) * SCALE), "white")
    self._canvas = ImageDraw.Draw(self.image)
    self._font = ImageFont.load_default(12 * SCALE)
    self.text(LEFT, 16, title, INK, "lm")

  def line(self, x0, y0, x1, y1, colour, width=1.0):
    self._canvas.line([SCALE * v for v in (x0, y0, x1, y1)], colour, round(SCALE * width))

  def box(self, x0, y0, x1, y1, colour):
    self._canvas.rectangle([SCALE * v for v in (x0, y0, x1, y1)], colour)

  def text(self, x, y, words, colour, anchor="mm"):
    self._canvas.text((SCALE * x, SCALE * y), words, colour, self._font, anchor=anchor)


class Paper(Sheet):
  """A picture with axes; `x` and `y` map values to places."""

  def __init__(self, title, xs, ys, label, bottom):
    super().__init__(title, HEIGHT)
    self.span, (low, high) = span_of(xs), span_of(ys)
    self._low, self._high = (0 if 0 < low < high / 2 else low), high
    self._floor = HEIGHT - bottom
    for value in np.linspace(self._low, self._high, 5):
      self.line(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), FAINT)
      self.text(LEFT - 6, self.y(value), f"{value:.3g}", GREY, "rm")
    places = np.linspace(*self.span, 5)
    if all(float(value).is_integer() for value in xs):  # steps, counts
      places = np.unique(np.round(places))
    for value in places:
      self.text(self.x(value), self._floor + 14, f"{value:.4g}", GREY)
    self.text((LEFT + WIDTH - RIGHT) / 2, self._floor + 32, label, GREY)

  def x(self, value):
    low, high = self.span
    return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

  def y(self, value):
    share = (value - self._low) / (self._high - self._low)
    return self._floor - share * (self._floor - TOP)


def span_of(values):
  low, high = min(values), max(values)
  return (low, high) if low < high else (low - 0.5, high + 0.5)
