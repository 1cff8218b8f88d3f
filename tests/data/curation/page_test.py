import numpy as np

from ares_jax.data.curation import page, select

EVIL = "</svg><script>alert(1)</script>"


def report(names=("a", "b")):
  lines = [("problem", 100 * (number % 3) + 10 * (8 - number % 9), names[number % len(names)])
           for number in range(90)]
  return select.curation_report(
    ({"problem": number, "source": name, "passes": number % 9, "tokens": [tokens, tokens + 5, None]}
     for number, (_, tokens, name) in enumerate(lines)),
    selection="adacs", count=18, samples=8, rng=np.random.default_rng(0))


def test_text_shows_length_by_pass_rate_before_and_after():
  found = report()
  lines = page.curation_text(found).splitlines()
  assert lines[0].startswith("adacs: 18 responses chosen of 180 right ones to 90 problems (90 ")
  row = next(line for line in lines if line.startswith("0/8")).split()
  before, after = (found["bracket_quartiles"][which][0][1] for which in ("before", "after"))
  assert row == ["0/8", "10", "2", f"{before:.0f}", f"{after:.0f}"]
  assert next(line for line in lines if line.startswith("b ")).split()[:3] == ["b", "45", "9"]


def drawn(found, name):
  """(panel, x and medians of each series) of the figure of a source."""
  panel, = page._figure(found, name).axes
  return panel, [series.lines[0].get_xydata() for series in panel.containers]


def test_a_figure_shows_every_median_and_the_target():
  found = report()
  panel, series = drawn(found, "a")
  for when, points in zip(("before", "after"), series, strict=True):
    rows = [(bracket, row[1]) for bracket, row in
            enumerate(found["source_quartiles"]["a"][when]) if row]
    np.testing.assert_allclose(points[:, 0], [bracket for bracket, _ in rows], atol=0.3)
    np.testing.assert_allclose(points[:, 1], [median for _, median in rows])
  np.testing.assert_allclose(panel.lines[-1].get_ydata(), found["target_tokens"]["a"])
  highest = max(row[2] for rows in found["source_quartiles"]["a"].values() for row in rows if row)
  assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > highest
  assert [label.get_text() for label in panel.get_xticklabels()] == [f"{n}/8" for n in range(9)]


def test_all_sources_together_have_no_target_in_their_figure():
  panel, series = drawn(report(), None)
  assert len(series) == 2 and "target length" not in panel.get_legend_handles_labels()[1]


def test_the_page_has_a_figure_and_a_table_of_every_source():
  shown = page.curation_html(report())
  assert shown.count("<svg") == 3 == shown.count('role="img"')
  assert all(f"<h2>{title}</h2>" in shown for title in ("All sources", "a", "b"))
  assert "<td>9</td>" in shown


def test_names_of_sources_cannot_run_code():
  shown = page.curation_html(report((EVIL, "b")))
  assert "<script" not in shown and shown.count("</svg>") == 3


def test_brackets_without_responses_are_left_out():
  found = select.curation_report([{"problem": 0, "source": "a", "passes": 0, "tokens": [None]}],
                        selection="adacs", count=1, samples=8, rng=np.random.default_rng(0))
  assert "0 responses chosen" in page.curation_text(found)
  assert drawn(found, "a")[1] == [] and "<svg" in page.curation_html(found)
