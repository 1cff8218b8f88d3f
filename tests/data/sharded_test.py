"""What the processes of a run send each other comes back unchanged."""

import numpy as np
import pytest

from ares_jax.data import sharded
from ares_jax.data.prompts import EncodedPrompt


def test_a_row_and_its_prompt_come_back():
  prompt = EncodedPrompt(np.int32([1, 2]), np.zeros((3, 2), np.int32), np.bool_([0, 1]),
                         [(np.uint8([[7, 8]]), (1, 2, 2))])
  row = {"id": "a", "answer": ["3", "ü"], "level": None, "images": [b"\x00\xff", "x.png"],
         "tolerance": 0.1 + 0.2, "cells": [["red", 5]], "right": True, "number": np.float32(0.5)}
  (back, (encoded, count)), = sharded.from_bytes(sharded.to_bytes([(row, (prompt, np.int64(9)))]))
  assert back == row and list(back) == list(row) and count == 9
  assert isinstance(encoded, EncodedPrompt) and tuple(encoded.images[0][1]) == (1, 2, 2)
  np.testing.assert_array_equal(encoded.tokens, prompt.tokens)
  np.testing.assert_array_equal(encoded.positions, prompt.positions)
  np.testing.assert_array_equal(encoded.learnt, [False, True])
  np.testing.assert_array_equal(encoded.images[0][0], [[7, 8]])


@pytest.mark.parametrize("array", [
  np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.int32([[1, -2]]).T, np.int64([2**40]),
  np.float32([0.1, np.inf]), np.float64([0.1]), np.bool_([True, False]), np.zeros((0, 1176), "u1"),
  np.arange(6).reshape(2, 3)[:, ::2]], ids=lambda array: f"{array.dtype}{array.shape}")
def test_an_array_keeps_dtype_shape_and_values(array):
  back, = sharded.from_bytes(sharded.to_bytes([array]))
  assert back.dtype == array.dtype
  np.testing.assert_array_equal(back, array)
