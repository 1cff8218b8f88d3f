import dataclasses

import pytest
from models import golden_batch

CONFIG = golden_batch.config("tied")


@pytest.mark.parametrize("change, message", [
  ({"heads": 3}, "heads 3 is not a multiple of kv_heads 2"),
  ({"mrope_sections": (2, 2, 2)}, r"mrope_sections \(2, 2, 2\) must sum to head_dim / 2 = 4"),
  ({"embed": 64}, "vision.out 32 differs from embed 64"),
  ({"image_token": 128}, "image_token 128 is outside the vocabulary of 128"),
  ({"layers": 0}, "layers is 0; it must be at least 1"),
  ({"unroll": 0}, "unroll is 0"),
  ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
])
def test_sizes_that_do_not_fit_are_errors(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("change, message", [
  ({"heads": 5}, "hidden 32 over heads 5 is not a multiple of 4"),
  ({"window": 42}, "window 42 px is not a multiple of patch \\* merge = 28 px"),
  ({"full_attention": (1, 4)}, r"full_attention \(1, 4\) names a block outside 0..3"),
])
def test_vision_sizes_that_do_not_fit_are_errors(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG.vision, **change)


def test_a_window_of_112_px_holds_64_patches_in_16_units():
  vision = dataclasses.replace(CONFIG.vision, window=112)
  assert (vision.window_patches, vision.unit, vision.patch_dim) == (64, 4, 1176)


def test_is_hashable_so_that_jit_takes_it_as_static():
  assert hash(CONFIG) == hash(dataclasses.replace(CONFIG))
