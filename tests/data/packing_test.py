import numpy as np
import pytest

from ares_jax.data.packing import Families, first_fit, fit_families, lay_out


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


def test_sequences_of_a_family_share_their_head():
  families = Families(np.array([0, 0, 1, 0]), np.array([3, 3, 0, 3]), step=2)
  layout = lay_out([[0, 2, 3], [1]], [5, 4, 3, 6], 14, families)
  np.testing.assert_array_equal(layout.sequence, [[0, 0, 0, 0, 0, 0, 3, 3, 3, 2, 2, 2, 0, 0],
                                                  [1, 1, 1, 1] + [0] * 10])
  np.testing.assert_array_equal(layout.index, [[0, 1, 2, 0, 3, 4, 3, 4, 5, 0, 1, 2, 0, 0],
                                               [0, 1, 2, 3] + [0] * 10])
  # A rest begins at a multiple of the step; what stands alone in its row does not share.
  np.testing.assert_array_equal(layout.segment, [[1, 1, 1, 0, 2, 2, 3, 3, 3, 4, 4, 4, 0, 0],
                                                 [1, 1, 1, 1] + [0] * 10])
  np.testing.assert_array_equal(layout.head, [[1, 1, 1, 0, 1, 1, 1, 1, 1, 4, 4, 4, 0, 0],
                                              [1, 1, 1, 1] + [0] * 10])
  assert families.shared_tokens([0, 2, 3]) == 3 and families.shared_tokens([1]) == 0


def test_heads_too_short_for_the_gaps_are_not_shared():
  lengths, families = np.array([9, 9]), Families(np.zeros(2, int), np.array([8, 8]), step=4)
  assert len(fit_families(lengths, families, 18)) == 1
  assert (lay_out([[0, 1]], lengths, 18, families).head == [[1] * 9 + [2] * 9]).all()


@pytest.mark.parametrize("step", [1, 4])
def test_sharing_never_takes_more_rows_than_sequences_alone(step):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    number, row = np.repeat(np.arange(6), 4), int(rng.integers(60, 90))
    head = np.repeat(rng.integers(0, 30, 6), 4)
    lengths = head + rng.integers(1, 30, 24)
    families = Families(number, head, step)
    rows = fit_families(lengths, families, row)
    assert sorted(sum(rows, [])) == list(range(24))
    layout = lay_out(rows, lengths, row, families)  # refuses what does not fit
    # No row but the last has fewer sequences than surely fit.
    assert len(rows) <= -(-24 // (row // lengths.max()))
    shared = sum(map(families.shared_tokens, rows))
    assert (layout.segment > 0).sum() == lengths.sum() - shared
  assert shared > 0
