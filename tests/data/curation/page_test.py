import re

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


def test_a_terminal_sees_length_against_pass_rate_before_and_after():
  found = report()
  lines = page.curation_text(found).splitlines()
  assert lines[0].startswith("adacs: 18 responses chosen of 180 right ones to 90 problems (90 ")
  row = next(line for line in lines if line.startswith("0/8")).split()
  before, after = (found["bracket_quartiles"][which][0][1] for which in ("before", "after"))
  assert row == ["0/8", "10", "2", f"{before:.0f}", f"{after:.0f}"]
  assert next(line for line in lines if line.startswith("b ")).split()[:3] == ["b", "45", "9"]


def test_the_page_draws_every_median_and_counts_every_source():
  found = report()
  shown = page.curation_html(found)
  # Three pictures of nine brackets, and a mark of the legend each.
  assert shown.count("<circle") == 3 * 10 == shown.count("<rect") and shown.count("<svg") == 3
  assert shown.count("<polyline") == 2  # a target is a source's
  heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', shown)][:9]
  medians = [row[1] for row in found["bracket_quartiles"]["before"]]
  assert list(np.argsort(heights)) == list(np.argsort(-np.array(medians)))
  assert all(f"<h2>{title}</h2>" in shown for title in ("All sources", "a", "b"))
  assert "<td>9</td>" in shown


def test_names_of_sources_run_nothing():
  shown = page.curation_html(report((EVIL, "b")))
  assert "<script" not in shown and shown.count("</svg>") == 3


def test_brackets_without_responses_are_left_out():
  found = select.curation_report([{"problem": 0, "source": "a", "passes": 0, "tokens": [None]}],
                        selection="adacs", count=1, samples=8, rng=np.random.default_rng(0))
  assert "0 responses chosen" in page.curation_text(found)
  assert page.curation_html(found).count("<circle") == 1
