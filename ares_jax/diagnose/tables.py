"""Text tables."""


def text_table(head, rows):
  """Lines of columns; the first is aligned left, the others right."""
  cells = [list(map(str, row)) for row in [head, *rows]]
  widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
  return "\n".join("  ".join(
    cell.ljust(width) if column == 0 else cell.rjust(width)
    for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
    for row in cells)


def format_number(value, digits=3):
  """A number for people; "-" for None."""
  return "-" if value is None else f"{value:.{digits}g}"
