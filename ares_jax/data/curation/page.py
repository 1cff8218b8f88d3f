"""Shows a report of select.py, length by pass rate before and after curation, as text and as HTML.

Names of sources are escaped.
"""

import html as markup

from ares_jax.system import figures
from ares_jax.system.tables import text_table

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 44rem;
  padding: 0 1rem; color: #1f2933; background: #fff } h2 { margin-top: 2.5rem }
svg { width: 100%; height: auto }
div { overflow-x: auto } table { border-collapse: collapse } caption { text-align: left }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #d9dee4 }"""
_FIGURES = 12  # largest number of sources with a figure; the table counts all
_HEAD = ("pass rate", "problems", "chosen", "tokens before", "tokens after", "target")


def curation_text(report):
  """The report as tables for a terminal."""
  tables = (text_table(head, rows) for head, *rows in (_rows(report), _sources(report)))
  return "\n".join([_summary(report), *(f"\n{table}" for table in tables), *report["notes"]])


def curation_html(report):
  """The page: a figure and a table of all sources together, then of each source."""
  sections = [_section(report, None)]
  names = sorted(report["source_brackets"], key=lambda name: -sum(
    report["source_brackets"][name]["problems"]))
  if len(names) > 1:
    sections.append(_html_table("By source", _sources(report)))
    sections += [_section(report, name) for name in names[:_FIGURES]]
  if len(names) > _FIGURES:
    sections.append(f"<p>{len(names) - _FIGURES} smaller sources have no figure.</p>")
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
  """(problems, chosen, quartiles, target) by bracket, of a source, or of all where name is None."""
  if name is None:
    chosen = list(report["bracket_chosen"].values())
    targets = list(report["target_tokens"].values())
    target = targets[0] if len(targets) == 1 else None
    return report["bracket_problems"], chosen, report["bracket_quartiles"], target
  counts = report["source_brackets"][name]
  return (counts["problems"], counts["chosen"], report["source_quartiles"][name],
          report["target_tokens"].get(name))


def _rows(report, name=None):
  """The head and a row for each bracket; without the target where there are several sources."""
  problems, chosen, quartiles, target = _part(report, name)
  rows = [_HEAD if target else _HEAD[:-1]]
  for bracket, counts in enumerate(zip(problems, chosen, strict=True)):
    row = [f"{bracket}/{len(problems) - 1}", *map(str, counts)]
    for when in ("before", "after"):
      lengths = quartiles[when][bracket]
      row.append("" if lengths is None else f"{lengths[1]:.0f}")
    rows.append([*row, f"{target[bracket]:.0f}"] if target else row)
  return rows


def _sources(report):
  rows = [("source", "problems", "chosen", "target at 0", "target at 1")]
  for name, counts in report["source_brackets"].items():
    target = report["target_tokens"].get(name)
    ends = ("", "") if target is None else (f"{target[0]:.0f}", f"{target[-1]:.0f}")
    rows.append((name, str(sum(counts["problems"])), str(sum(counts["chosen"])), *ends))
  return rows


def _section(report, name):
  title = "All sources" if name is None else name
  label = markup.escape(f"Response length by pass rate before and after curation, {title}")
  picture = figures.svg_text(_figure(report, name))
  return (f'<h2>{markup.escape(title)}</h2><div role="img" aria-label="{label}">{picture}</div>'
          + _html_table(f"Length by pass rate, {title}", _rows(report, name)))


def _html_table(caption, table):
  head, *rows = table
  cells = "".join(f"<th scope=\"col\">{cell}</th>" for cell in head)
  body = "".join("<tr>" + "".join(f"<td>{markup.escape(cell)}</td>" for cell in row) + "</tr>"
                 for row in rows)
  return (f"<div><table><caption>{markup.escape(caption)}</caption><thead><tr>{cells}</tr></thead>"
          f"<tbody>{body}</tbody></table></div>")


def _figure(report, name):
  """Median and quartiles of lengths by pass rate, before and after curation, and the target."""
  problems, _, quartiles, target = _part(report, name)
  brackets, last = range(len(problems)), len(problems) - 1
  figure, (panel,) = figures.new_figure(
    "", x_label="pass rate of the probe", y_labels=["tokens: median and quartiles"], height=3.2)
  figures.draw_intervals(panel, brackets, {
    when: list(zip(*(row or [None] * 3 for row in quartiles[when]), strict=True))
    for when in ("before", "after")})
  if target is not None:
    figures.draw_curves(panel, [figures.Curve("target length", brackets, target)])
  figures.draw_legend(panel)
  panel.set_xticks(brackets, [f"{bracket}/{last}" for bracket in brackets])
  highest = [row[2] for rows in quartiles.values() for row in rows if row] + (target or [])
  panel.set_ylim(0, 1.05 * max(highest, default=1))
  return figure
