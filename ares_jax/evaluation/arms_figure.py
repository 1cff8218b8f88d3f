"""The table of `ablation.rows` as a picture: accuracy and tokens by difficulty (figure 6)."""

import html

from ares_jax.evaluation.scores import level_order
from ares_jax.ops.difficulty import BUCKETS

COLOURS = ("#616e7c", "#1f5fa8", "#b3261e", "#1b6e35", "#7a4fa3", "#8a5a00", "#00707a", "#c2589b",
           "#12263a", "#5aa9e6", "#f07167", "#80b918", "#c8b6ff", "#f4a300", "#63c7b2", "#a0a4a8")
WIDTH, HEIGHT, LEFT, TOP, GAP = 860, 240, 56, 34, 24
LEVELS = 10  # more are too narrow to have a bar for each arm
PANELS = (("accuracy", "Accuracy, %", 100), ("length", "Tokens of an answer", 1))


def arms_page(table):
  """An HTML page that needs nothing else: two panels of bars, an arm a colour.

  Difficulty is the problems' level where every arm has levels, at most LEVELS: the same problems in
  all arms. Else it is each arm's own pass rate, whose problems differ by arm.

  Whiskers are 95% t-intervals over seeds, cut off at the panel's edges; a single seed has none.

  Args:
    table: of `ablation.rows`.
  """
  parts = [f"<text x='{LEFT}' y='{16 + 18 * index}' fill='{_colour(index)}'>■ "
           f"{html.escape(row['arm'])}, {len(row['seeds'])} seed(s)</text>"
           for index, row in enumerate(table)]
  top = 18 * len(table) + 10
  levels = sorted({name for row in table for name in row["level"]}, key=level_order)
  if len(levels) > LEVELS or not all(row["level"] for row in table):
    levels = []
  for field, title, factor in PANELS:
    parts += [f"<g transform='translate(0 {top})'>", *_panel(table, levels, field, title, factor),
              "</g>"]
    top += HEIGHT + 20
  return (f"<!doctype html><meta charset='utf-8'><title>Accuracy and tokens by difficulty</title>"
          f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {top}' role='img' "
          "style='max-width:100%;font:13px sans-serif;background:#fff'>"
          + "\n".join(parts) + "</svg>\n")


def _panel(table, levels, field, title, factor):
  groups = [("all", lambda row: row[field])]
  by = "level" if levels else "bucket"
  groups += [(f"level {name}" if levels else name,
              lambda row, name=name: row[by].get(name, {field: (None, None)})[field])
             for name in levels or BUCKETS]
  means = [pick(row)[0] for _, pick in groups for row in table if pick(row)[0] is not None]
  most = 100 if field == "accuracy" else 1.15 * factor * max(means, default=1)
  floor = HEIGHT - 30

  def y(value):
    return floor - min(max(value, 0), most) / most * (floor - TOP)

  found = [f"<text x='{LEFT}' y='18' font-weight='bold'>{title}</text>"]
  for step in range(5):
    value = most * step / 4
    found.append(f"<line x1='{LEFT}' x2='{WIDTH}' y1='{y(value):.1f}' y2='{y(value):.1f}' "
                 f"stroke='#d9dee4'/><text x='{LEFT - 6}' y='{y(value) + 4:.1f}' "
                 f"text-anchor='end' fill='#52606d'>{value:.3g}</text>")
  group_width = (WIDTH - LEFT) / len(groups)
  width = (group_width - GAP) / len(table)
  for place, (name, pick) in enumerate(groups):
    left = LEFT + place * group_width + GAP / 2
    found.append(f"<text x='{left + (group_width - GAP) / 2:.1f}' y='{HEIGHT - 10}' "
                 f"text-anchor='middle'>{html.escape(name)}</text>")
    for index, row in enumerate(table):
      mean, half = pick(row)
      if mean is None:
        continue
      x, mean = left + index * width, factor * mean
      label = f"{row['arm']}, {name}: {mean:.1f}"
      label += "" if half is None else f" ± {factor * half:.1f}"
      found.append(f"<rect x='{x:.1f}' y='{y(mean):.1f}' width='{0.85 * width:.1f}' "
                   f"height='{floor - y(mean):.1f}' fill='{_colour(index)}'>"
                   f"<title>{html.escape(label)}</title></rect>")
      if half is not None:
        middle = x + 0.425 * width
        found.append(f"<line x1='{middle:.1f}' x2='{middle:.1f}' stroke='#1f2933' "
                     f"y1='{y(mean - factor * half):.1f}' y2='{y(mean + factor * half):.1f}'/>")
  return found


def _colour(index):
  return COLOURS[index % len(COLOURS)]
