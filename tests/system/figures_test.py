import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ares_jax.system import figures
from ares_jax.system.figures import Curve


def pixels(figure):
  return np.asarray(Image.open(io.BytesIO(figures.png_bytes(figure))).convert("RGB"))


def has_colour(picture, name):
  """bool [height, width]: the pixels that have a colour."""
  return (picture == [int(name[at : at + 2], 16) for at in (1, 3, 5)]).all(-1)


def test_matplotlib_is_imported_when_a_picture_is_drawn_and_pyplot_never():
  code = ("import sys; from ares_jax.system import figures; assert 'matplotlib' not in sys.modules;"
          "figure, [panel] = figures.new_figure('a'); figures.draw_histogram(panel, [1, 2]);"
          "assert figures.png_bytes(figure) and 'matplotlib.pyplot' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_curve_stops_at_gaps():
  figure, [panel] = figures.new_figure("curve")
  figures.draw_curves(panel, [Curve("one", [0, 1, 2, 3], [0.0, 1.0, None, 1.0])])
  columns = np.flatnonzero(has_colour(pixels(figure), figures.COLOURS[0]).any(0))
  # The line from 0 to 1 and the lone marker at 3; nothing between.
  assert np.diff(columns).max() > 0.4 * np.ptp(columns)


@pytest.mark.parametrize("steps", [[3], [1, 2], list(range(1, 121))])
def test_whole_numbers_on_x_have_whole_ticks(steps):
  figure, [panel] = figures.new_figure("curve")
  figures.draw_curves(panel, [Curve("one", steps, [1.0] * len(steps))])
  low, high = panel.get_xlim()
  shown = [place for place in panel.get_xticks() if low <= place <= high]
  assert shown and all(place == int(place) for place in shown)


@pytest.mark.parametrize("values, low, high", [
  ([0.0, 1e-12], -0.05, 1.0), ([0.25, 0.25], 0.225, 0.275), ([1.0, 3.0], 0, 3.1),
  ([None, 2.0], 1.8, 2.2), ([1e-6, 1e-7], 0, 1.05e-6)])
def test_the_y_axis_never_shows_rounding_errors(values, low, high):
  figure, [panel] = figures.new_figure("curve")
  figures.draw_curves(panel, [Curve("one", [1, 2], values)])
  figures.png_bytes(figure)
  assert panel.get_ylim()[0] <= low + 1e-9 and panel.get_ylim()[1] == pytest.approx(high, rel=0.3)


def test_a_bar_of_half_the_value_is_half_as_wide_and_bars_of_a_group_differ():
  figure, [panel] = figures.new_figure("bars")
  figures.draw_bars(panel, [("a", [(10, "ten")]), ("b", [(5, "five"), (2.5, "")])])
  long, short, second = panel.patches
  assert (long.get_width(), short.get_width()) == (10, 5)
  assert long.get_facecolor() == short.get_facecolor() != second.get_facecolor()
  assert long.get_hatch() != second.get_hatch()


def test_grouped_bars_leave_out_what_is_missing_and_draw_whiskers():
  figure, [panel] = figures.new_figure("bars")
  figures.draw_grouped_bars(panel, ["all", "hard"], {"x": [(1, 0.5), None], "y": [(2, None)] * 2})
  figures.draw_legend(panel)
  assert [bar.get_height() for bar in panel.patches] == [1, 2, 2]
  assert figures.png_bytes(figure)


def test_a_state_has_the_tint_of_its_first_word():
  figure, [panel] = figures.new_figure("states")
  figures.draw_states(panel, ["r"], ["x", "y", "z"], [["calm", "wild", "calm *"]],
                      {"calm": "#c3e6cb", "wild": "#f2b8b5"})
  picture = pixels(figure)
  calm, wild = (has_colour(picture, tint).any(0) for tint in ("#c3e6cb", "#f2b8b5"))
  part = picture.shape[1] // 3
  assert calm[:part].any() and calm[-part:].any() and wild[part:-part].any()
  assert not wild[-part:].any() and not calm[part + part // 4 : -part - part // 4].any()


def test_text_of_a_model_is_drawn_as_it_stands(recwarn):
  figure, [panel] = figures.new_figure(r"$\frac{$ \x00 你")
  figures.draw_bars(panel, [("$x$\n\x00", [(1, r"$\undefined$")])])
  assert figures.png_bytes(figure) and not recwarn
  assert panel.get_yticklabels()[0].get_text() == r"\$x\$??"


def test_a_figure_always_becomes_the_same_file_and_svg(tmp_path):
  def draw():
    figure, [panel] = figures.new_figure("lengths", x_label="pass rate", y_labels=["tokens"])
    figures.draw_intervals(panel, [0, 1], {"before": ([1, 2], [2, None], [3, 4])})
    figures.draw_points(panel, [Curve("a", [0, 1], [1, 2])], line=(1.0, 1.0))
    figures.draw_legend(panel)
    return figure

  [path] = figures.save_pngs({"a": draw()}, str(tmp_path / "new"))
  assert open(path, "rb").read() == figures.png_bytes(draw())
  assert figures.svg_text(draw()).startswith("<svg")
  assert figures.svg_text(draw()) == figures.svg_text(draw())
