"""What AdaCS chose and why: length against pass rate before and after, for a terminal and as HTML.

Both show a report of data/curate.py. Names of sources are escaped.
"""

import html as markup

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 44rem;
  padding: 0 1rem; color: #1f2933; background: #fff } h2 { margin-top: 2.5rem }
svg { width: 100%; height: auto } svg text { font-size: 13px; fill: #4a5563 }
div { overflow-x: auto } table { border-collapse: collapse } caption { text-align: left }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #d9dee4 }"""
_BEFORE, _AFTER, _TARGET, _FAINT = "#8a5a00", "#1f5fa8", "#1f2933", "#d9dee4"
_WIDTH, _HEIGHT, _LEFT, _TOP, _FLOOR = 640, 320, 64, 34, 264  # px of a picture
_PICTURES = 12  # sources with a picture of their own; all are counted
_HEAD = ("pass rate", "problems", "chosen", "tokens before", "tokens after", "target")


def curation_text(report):
  """The report as tables for a terminal."""
  lines = [_summary(report), *_table(_rows(report))]
  lines += _table(_sources(report))
  return "\n".join([*lines, *report["notes"]])


def curation_html(report):
  """The page: a picture and a table of all sources together, then of each."""
  sections = [_section(report, None)]
  names = sorted(report["source_brackets"], key=lambda name: -sum(
    report["source_brackets"][name]["problems"]))
  if len(names) > 1:
    sections.append(_html_table("By source", _sources(report)))
    sections += [_section(report, name) for name in names[:_PICTURES]]
  if len(names) > _PICTURES:
    sections.append(f"<p>{len(names) - _PICTURES} smaller sources have no picture.</p>")
  notes = "".join(f"<li>{markup.escape(note)}</li>" for note in report["notes"])
  return ("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Curation</title>"
          "<meta name=\"viewport\" content=\"width=device-width\">"
          "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
          "style-src 'unsafe-inline'\">"
          f"<style>{_STYLE}</style><h1>Curation</h1><p>{markup.escape(_summary(report))}</p>"
          f"{''.join(sections)}<ul>{notes}</ul></html>\n")


def _summary(report):
  return (f"{report['selection']}: {len(report['chosen'])} responses chosen of "
          f"{report['candidates']} right ones to {report['problems']} problems "
          f"({report['wrong_candidates_dropped']} wrong ones dropped); tokens are medians")


def _part(report, name):
  """(problems, chosen, quartiles, target) by bracket, of a source or, without a name, of all."""
  if name is None:
    chosen = list(report["bracket_chosen"].values())
    targets = report["target_tokens"].values()
    one = next(iter(targets)) if len(targets) == 1 else None
    return report["bracket_problems"], chosen, report["bracket_quartiles"], one
  counts = report["source_brackets"][name]
  return (counts["problems"], counts["chosen"], report["source_quartiles"][name],
          report["target_tokens"].get(name))


def _rows(report, name=None):
  """Head and a row a bracket; several sources have no one target."""
  problems, chosen, quartiles, target = _part(report, name)
  last = len(problems) - 1

  def median(values):
    return "" if values is None else f"{values[1]:.0f}"

  rows = [_HEAD, *((f"{bracket}/{last}", str(problems[bracket]), str(chosen[bracket]),
                    median(quartiles["before"][bracket]), median(quartiles["after"][bracket]),
                    "" if target is None else f"{target[bracket]:.0f}")
                   for bracket in range(last + 1))]
  return rows if target is not None else [row[:-1] for row in rows]


def _sources(report):
  rows = [("source", "problems", "chosen", "target at 0", "target at 1")]
  for name, counts in report["source_brackets"].items():
    target = report["target_tokens"].get(name)
    ends = ("", "") if target is None else (f"{target[0]:.0f}", f"{target[-1]:.0f}")
    rows.append((name, str(sum(counts["problems"])), str(sum(counts["chosen"])), *ends))
  return rows


def _table(rows):
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  return ["", *("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
    row[1:], widths[1:], strict=True))]) for row in rows)]


def _section(report, name):
  title = "All sources" if name is None else name
  return (f"<h2>{markup.escape(title)}</h2>{_picture(report, name)}"
          + _html_table(f"Length by pass rate, {title}", _rows(report, name)))


def _html_table(caption, table):
  head, *rows = table
  cells = "".join(f"<th scope=\"col\">{cell}</th>" for cell in head)
  body = "".join("<tr>" + "".join(f"<td>{markup.escape(cell)}</td>" for cell in row) + "</tr>"
                 for row in rows)
  return (f"<div><table><caption>{markup.escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
          f"<tbody>{body}</tbody></table></div>")


def _picture(report, name):
  """SVG of the quartiles of lengths by bracket, before and after, and of the target length."""
  problems, _, quartiles, target = _part(report, name)
  last = len(problems) - 1
  known = [row[2] for rows in quartiles.values() for row in rows if row] + (target or [])
  top = max(known, default=1) * 1.05

  def x(bracket):
    return _LEFT + 24 + bracket * (_WIDTH - _LEFT - 48) / last

  def y(tokens):
    return _FLOOR - tokens / top * (_FLOOR - _TOP)

  shapes = []
  for share in (0, 0.25, 0.5, 0.75, 1):
    place = y(share * top)
    shapes += [_line(_LEFT, place, _WIDTH, place, _FAINT, 1),
               _words(_LEFT - 6, place + 4, f"{share * top:.0f}", "end")]
  for bracket in range(last + 1):
    shapes.append(_words(x(bracket), _FLOOR + 20, f"{bracket}/{last}", "middle"))
    for which, colour, aside in (("before", _BEFORE, -6), ("after", _AFTER, 6)):
      if quartiles[which][bracket]:
        low, median, high = quartiles[which][bracket]
        place = x(bracket) + aside
        shapes += [_line(place, y(low), place, y(high), colour, 4),
                   _mark(which, place, y(median), colour)]
  if target is not None:
    points = " ".join(f"{x(bracket):.1f},{y(tokens):.1f}" for bracket, tokens in enumerate(target))
    shapes.append(f'<polyline points="{points}" fill="none" stroke="{_TARGET}" stroke-width="1.5" '
                  'stroke-dasharray="5 4"/>')
  shapes += [_words((_LEFT + _WIDTH) / 2, _FLOOR + 42, "pass rate of the probe", "middle"),
             _words(_LEFT - 6, 16, "tokens", "end"),
             _mark("before", _LEFT + 12, 12, _BEFORE), _words(_LEFT + 24, 16, "before", "start"),
             _mark("after", _LEFT + 92, 12, _AFTER), _words(_LEFT + 104, 16, "after", "start"),
             _words(_LEFT + 164, 16, "median and quartiles; dashed: target length"
                    if target is not None else "median and quartiles", "start")]
  label = f"Response length against pass rate before and after curation, {name or 'all sources'}"
  return (f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{markup.escape(label)}">'
          f'{"".join(shapes)}</svg>')


def _line(x1, y1, x2, y2, colour, width):
  return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
          f'stroke-width="{width}"/>')


def _mark(which, x, y, colour):
  """A circle before, a square after: told without colours."""
  if which == "before":
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>'
  return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>'


def _words(x, y, text, anchor):
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{markup.escape(text)}</text>'
