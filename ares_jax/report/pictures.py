"""The page's curves and its scatter as PNG files and as TensorBoard images."""

import os

import numpy as np
import tensorboardX
from PIL import Image, ImageDraw, ImageFont

from ares_jax.report import statistics
from ares_jax.report.annotate import annotate
from ares_jax.report.page import LIMIT, names, panels, thin

WIDTH, HEIGHT, SCALE = 640, 400, 2
LEFT, RIGHT, TOP = 64, 16, 36
COLOURS = ("#1f5fa8", "#b3261e", "#1b6e35", "#7a4fa3", "#8a5a00", "#00707a")
MARKS = "ox+*#="  # a curve is told by its mark too
INK, GREY, FAINT = "#1f2933", "#616e7c", "#d9dee4"


def write(records, others, folder):
  """Writes FOLDER/STAGE_TITLE.png for every picture, and TensorBoard images of them.

  Args:
    records: records.Records of the run.
    others: Records of runs in the same curves.
    folder: is made.

  Returns:
    The paths written.
  """
  os.makedirs(folder, exist_ok=True)
  runs = [records, *others]
  curves = dict(zip(names(runs), map(statistics.curves, runs), strict=True))
  drawn = {}
  for stage in curves[next(iter(curves))]:
    for panel in panels()["aepo" if stage == "aepo" else "sft"]:
      series = [(label if len(runs) == 1 else f"{name} {label}", of[stage]["step"],
                 of[stage]["values"][metric])
                for metric, label in panel["metrics"] for name, of in curves.items()
                if stage in of and metric in of[stage]["values"]]
      series = [one for one in series if any(value is not None for value in one[2])]
      if series:
        title = panel["title"] + (f", {panel['unit']}" if panel["unit"] else "")
        drawn[f"{stage} {panel['title']}"] = lines(f"{stage}: {title}", series)
  fit = None
  if records.rollouts:
    fit = statistics.length_against_count(annotate(
      thin(records.rollouts, LIMIT), records.aepo_metrics(), records.aepo_config()))
  if fit:
    drawn["aepo Length against N_HE"] = scatter(fit)
  return save(drawn, folder, os.path.join(records.workdir, "tensorboard", "report"),
              max((max(by_step) for by_step in records.metrics.values() if by_step), default=0))


def save(drawn, folder, events, step):
  """Writes {title: image} as PNG files and as TensorBoard images; returns the paths."""
  paths = []
  with tensorboardX.SummaryWriter(events) as writer:
    for title, image in drawn.items():
      name = title.lower().replace(" ", "_").replace(",", "")
      paths.append(os.path.join(folder, f"{name}.png"))
      image.save(paths[-1], optimize=True)
      writer.add_image(f"report/{name}", np.asarray(image), step, dataformats="HWC")
  return paths


def lines(title, series):
  """A picture of curves: (name, steps, values), None where a value is missing."""
  bottom = 48 + 18 * -(-len(series) // 2)
  paper = _Paper(title, [step for _, steps, _ in series for step in steps],
                 [value for _, _, values in series for value in values if value is not None],
                 "step", bottom)
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
  """A picture of `statistics.length_against_count`."""
  paper = _Paper("Length against N_HE, tokens", [dot[0] for dot in fit["dots"]],
                 [dot[1] for dot in fit["dots"]],
                 f"N_HE; tokens = {fit['intercept']:.3g} + {fit['slope']:.3g} N_HE, "
                 f"r = {fit['r']:.2f}, {fit['n']} rollouts; o easy, x medium, + hard", 48)
  for count, tokens, bucket in fit["dots"]:
    paper.text(paper.x(count), paper.y(tokens), MARKS[bucket], COLOURS[bucket])
  ends = [(paper.x(x), paper.y(fit["intercept"] + fit["slope"] * x)) for x in paper.span]
  paper.line(*ends[0], *ends[1], INK, 1.6)
  return paper.image


class _Paper:
  """A picture with axes; `x` and `y` map values to places in px of the unscaled picture."""

  def __init__(self, title, xs, ys, label, bottom):
    self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    self._canvas = ImageDraw.Draw(self.image)
    self._font = ImageFont.load_default(12 * SCALE)
    self.span, (low, high) = _span(xs), _span(ys)
    self._low, self._high = (0 if 0 < low < high / 2 else low), high
    self._floor = HEIGHT - bottom
    self.text(LEFT, 16, title, INK, "lm")
    for value in np.linspace(self._low, self._high, 5):
      self.line(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), FAINT)
      self.text(LEFT - 6, self.y(value), f"{value:.3g}", GREY, "rm")
    for value in np.linspace(*self.span, 5):
      self.text(self.x(value), self._floor + 14, f"{value:.4g}", GREY)
    self.text((LEFT + WIDTH - RIGHT) / 2, self._floor + 32, label, GREY)

  def x(self, value):
    low, high = self.span
    return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

  def y(self, value):
    share = (value - self._low) / (self._high - self._low)
    return self._floor - share * (self._floor - TOP)

  def line(self, x0, y0, x1, y1, colour, width=1.0):
    self._canvas.line([SCALE * v for v in (x0, y0, x1, y1)], colour, round(SCALE * width))

  def text(self, x, y, words, colour, anchor="mm"):
    self._canvas.text((SCALE * x, SCALE * y), words, colour, self._font, anchor=anchor)


def _span(values):
  low, high = min(values), max(values)
  return (low, high) if low < high else (low - 0.5, high + 0.5)
