import dataclasses

import pytest
from models import golden_batch

from ares_jax.models import weights
from ares_jax.models.config import PUBLISHED_SIZES

CONFIG = golden_batch.config("tied")


@pytest.mark.parametrize("change, message", [
  ({"heads": 3}, "heads 3 is not a multiple of kv_heads 2"),
  ({"mrope_sections": (2, 2, 2)}, r"mrope_sections \(2, 2, 2\) must sum to head_dim / 2 = 4"),
  ({"embed": 64}, "vision.out 32 differs from embed 64"),
  ({"image_token": 128}, "image_token 128 is outside the vocabulary of 128"),
  ({"layers": 0}, "layers is 0; it must be at least 1"),
  ({"unroll": 0}, "unroll is 0"),
  ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
  ({"vision": dataclasses.replace(CONFIG.vision, deepstack=(0, 1, 2, 3))}, "has more blocks than"),
])
def test_sizes_that_do_not_fit_are_errors(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("change, message", [
  ({"heads": 5}, "hidden 32 over heads 5 is not a multiple of 4"),
  ({"window": 42}, "window 42 px is not a multiple of patch \\* merge = 28 px"),
  ({"full_attention": (1, 4)}, r"full_attention \(1, 4\) names a block outside 0..3"),
  ({"window": -28}, "window -28 px is not a multiple"),
  ({"window": 0, "merge": 3}, "merge 3 is not 1, 2, 4 or 8, and there are no windows"),
  ({"family": "qwen3"}, "family 'qwen3' is not one of qwen2_5_vl, qwen2_vl, qwen3_vl"),
  ({"positions": -1}, "positions is -1; it must be at least 0"),
  ({"deepstack": (1, 4)}, r"deepstack \(1, 4\) must name blocks of 0..3 in ascending order"),
  ({"deepstack": (2, 1)}, r"deepstack \(2, 1\) must name"),
  ({"deepstack": (1, 1)}, r"deepstack \(1, 1\) must name"),
])
def test_vision_sizes_that_do_not_fit_are_errors(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG.vision, **change)


def test_a_window_of_112_px_holds_64_patches_in_16_units():
  vision = dataclasses.replace(CONFIG.vision, window=112)
  assert (vision.window_patches, vision.unit, vision.patch_dim) == (64, 4, 1176)


def test_the_published_sizes_have_the_published_number_of_parameters():
  # Qwen3-VL: 2.13, 4.44 and 8.77 billion; a matrix that is embedding and unembedding counts once.
  billions = {name: weights.count(config) / 1e9 for name, config in PUBLISHED_SIZES.items()}
  assert {name: round(number, 2) for name, number in billions.items()
          if not name.endswith("Thinking")} == {
    "Qwen2.5-VL-3B-Instruct": 3.75, "Qwen2.5-VL-7B-Instruct": 8.29, "Qwen3-VL-2B-Instruct": 2.13,
    "Qwen3-VL-4B-Instruct": 4.44, "Qwen3-VL-8B-Instruct": 8.77}


def test_is_hashable_so_that_jit_takes_it_as_static():
  assert hash(CONFIG) == hash(dataclasses.replace(CONFIG))
