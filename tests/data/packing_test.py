import numpy as np
import pytest

from ares_jax.data.packing import first_fit, lay_out


def test_first_fit_fills_bins_in_decreasing_order():
  assert first_fit([(5,), (4,), (3,), (2,)], (7,)) == [[0, 3], [1, 2]]
  assert first_fit([(2, 9), (2, 9)], (8, 10)) == [[0], [1]]  # the second resource is full


def test_sequences_of_a_row_follow_each_other():
  layout = lay_out([[2, 0], [1], []], [2, 3, 1], 4)
  np.testing.assert_array_equal(layout.sequence, [[2, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(layout.index, [[0, 0, 1, 0], [0, 1, 2, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(layout.segment, [[1, 2, 2, 0], [1, 1, 1, 0], [0, 0, 0, 0]])


def test_a_sequence_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="sequences of 5 tokens do not fit a row of 4; raise row_to"):
    lay_out([[0, 1]], [2, 3], 4)
