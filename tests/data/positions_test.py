import numpy as np
import pytest
from models import golden_batch, make_golden

from ares_jax.data.positions import mrope_positions

IMAGE = 9


def test_text_counts_up_on_all_axes():
  np.testing.assert_array_equal(mrope_positions([1, 2, 3], IMAGE, [], merge=2), [[0, 1, 2]] * 3)


def test_image_positions_form_a_grid_and_text_continues_after_its_longer_side():
  # One token of text, then 2 x 3 units (4 x 6 patches), then text.
  positions = mrope_positions([1] + [IMAGE] * 6 + [2, 3], IMAGE, [(1, 4, 6)], merge=2)
  np.testing.assert_array_equal(positions, [
    [0, 1, 1, 1, 1, 1, 1, 4, 5],
    [0, 1, 1, 1, 2, 2, 2, 4, 5],
    [0, 1, 2, 3, 1, 2, 3, 4, 5]])
  assert positions.dtype == np.int32


def test_images_without_text_between_them_follow_each_other():
  positions = mrope_positions([IMAGE] * 3, IMAGE, [(1, 2, 4), (1, 2, 2)], merge=2)
  np.testing.assert_array_equal(positions, [[0, 0, 2], [0, 0, 2], [0, 1, 2]])


def test_no_tokens_have_no_positions():
  assert mrope_positions([], IMAGE, [], merge=2).shape == (3, 0)


@pytest.mark.parametrize("tokens, grids, message", [
  ([1, IMAGE, 2], [], "1 image tokens at 1 have no image left: 0 images were given"),
  ([IMAGE] * 3, [(1, 4, 4)], r"image of grid \(1, 4, 4\) needs 4 tokens, 3 follow at 0"),
  ([1, 2], [(1, 2, 2)], "1 of 1 images have no image tokens"),
])
def test_placeholders_that_do_not_match_the_images_are_errors(tokens, grids, message):
  with pytest.raises(ValueError, match=message):
    mrope_positions(tokens, IMAGE, grids, merge=2)


@pytest.mark.parametrize("name", ["image", "unit", "images"])
def test_positions_equal_those_of_transformers(name):
  tokens, pictures = make_golden.case(name)
  grids = [(1, picture.shape[0] // 14, picture.shape[1] // 14) for picture in pictures]
  with golden_batch.references("tied") as reference:
    np.testing.assert_array_equal(mrope_positions(tokens, make_golden.IMAGE, grids, merge=2),
                                  reference[f"{name}/positions"])
