import numpy as np

from ares_jax.report import drawing


def colour(name):
  return tuple(int(name[place : place + 2], 16) for place in (1, 3, 5))


def where(image, name):
  """bool [height, width]: which pixels have a colour."""
  return (np.asarray(image) == colour(name)).all(-1)


def test_a_bar_of_half_the_value_is_half_as_wide():
  image = drawing.bars("title", [("a", [(10, "ten")]), ("b", [(5, "five"), (2.5, "")])])
  long, short = (where(image, drawing.COLOURS[0])[at:].any(0).sum() for at in (
    0, int(drawing.SCALE * (drawing.TOP + 10 + 30))))
  assert abs(long / short - 2) < 0.02
  assert where(image, drawing.COLOURS[1]).any()  # the second of a group has its own colour


def test_states_are_told_by_a_tint_that_a_mark_does_not_change():
  image = drawing.cells("title", ["r"], ["x", "y", "z"], [["calm", "wild", "calm *"]],
                        tints={"calm": "#c3e6cb", "wild": "#f2b8b5"}, label="", note="")
  calm, wild = (where(image, tint).any(0) for tint in ("#c3e6cb", "#f2b8b5"))
  part = image.width // 4
  assert calm[:part].any() and calm[-part:].any() and wild[part:-part].any()
  assert not wild[-part:].any()


def test_a_curve_goes_through_its_values_and_stops_at_gaps():
  image = drawing.lines("title", [("one", [0, 1, 2, 3], [0.0, 1.0, None, 1.0])])
  drawn = where(image, drawing.COLOURS[0])[: drawing.SCALE * (drawing.HEIGHT - 70)]
  columns = np.flatnonzero(drawn.any(0))
  left, width = drawing.LEFT, drawing.WIDTH - drawing.LEFT - drawing.RIGHT
  # Past the second value nothing but marks: no line reaches the third step.
  beyond = columns[columns > drawing.SCALE * (left + width / 3) + 20]
  assert beyond.size == 0 or beyond.min() > drawing.SCALE * (left + 2 * width / 3)
