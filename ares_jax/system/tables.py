"""Tables as aligned text and as Markdown."""


def text_table(head, rows):
  """Lines of columns; the first column is aligned left, the others right."""
  cells = [list(map(str, row)) for row in [head, *rows]]
  widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
  lines = []
  for first, *others in cells:
    aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
  return "\n".join(lines)


def markdown_table(head, rows):
  """Lines of a Markdown table, aligned so that it reads as text too."""
  cells = [list(map(str, row)) for row in [head, ["---"] * len(head), *rows]]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]


def format_number(value, digits=3):
  """A number with `digits` significant digits, or "-" for None."""
  return "-" if value is None else f"{value:.{digits}g}"
