import types

import numpy as np
import pytest
import tiny
from models import golden_batch, make_golden

from ares_jax.models import flops, hf_files, weights
from ares_jax.run import model

MODEL = model.model_config(tiny.read().model)
EMBED, LAYERS, MLP, WIDTH = 32, 2, 64, 2 * 16  # tests/tiny.py; two heads of 16, one of keys
WEIGHTS = LAYERS * (EMBED * WIDTH * 2 + EMBED * 16 * 2 + 3 * EMBED * MLP)


def test_a_token_costs_two_a_weight_and_attention_half_the_square():
  logits = 2 * MODEL.vocab * EMBED
  assert flops.text_flops(MODEL, 1, heads=0) == 2 * WEIGHTS + 4 * LAYERS * WIDTH / 2
  one, two = (flops.text_flops(MODEL, np.int32([length])) for length in (10, 20))
  assert two - 2 * one == 4 * LAYERS * WIDTH * (20**2 - 2 * 10**2) / 2
  assert flops.text_flops(MODEL, 10) - flops.text_flops(MODEL, 10, heads=0) == 10 * logits


def test_reading_a_prompt_and_drawing_its_answer_is_a_pass_over_both():
  prompt, answer = np.int32([7, 5]), np.int32([4, 9])
  apart = flops.text_flops(MODEL, prompt, heads=0) + flops.decoding_flops(MODEL, prompt, answer)
  np.testing.assert_allclose(apart, flops.text_flops(MODEL, prompt + answer, heads=answer))


def test_images_attend_to_themselves_and_padding_costs_nothing():
  window = MODEL.vision.window_patches
  two = flops.vision_flops(MODEL.vision, np.array([[2 * window, 2 * window**2], [0, 0]]))
  assert two == flops.tower_flops(MODEL.vision, 2 * window, 2 * window**2)
  # One image of both windows.
  assert flops.vision_flops(MODEL.vision, np.array([[2 * window, (2 * window) ** 2]])) > two


@pytest.mark.parametrize("variant", ["tied", *make_golden.FAMILIES])
def test_a_tower_costs_two_a_weight_of_its_matrices(variant):
  size = golden_batch.config(variant).vision
  matrices = {name: int(np.prod(weight.shape)) for name, weight in hf_files.by_name(
    weights.weight_table(golden_batch.config(variant))["vision"]).items()
    if "norm" not in name and "bias" not in name and name != "positions"}
  in_unit = sum(count for name, count in matrices.items() if "merger" in name or "deep" in name)
  # 8 patches, 2 units. Attention is counted apart.
  assert flops.tower_flops(size, 8.0, 64.0) - flops.tower_flops(size, 0.0, 64.0) \
    - 4 * size.hidden * (size.depth - len(size.full_attention)) * 8 * size.window_patches * bool(
      size.window) == 2 * 8 * (sum(matrices.values()) - in_unit) + 2 * 2 * in_unit
  full = len(size.full_attention) if size.window else size.depth
  assert flops.tower_flops(size, 0.0, 64.0) == 4 * 64 * size.hidden * full


def test_a_step_of_fine_tuning_is_three_passes_over_its_examples():
  lengths = np.int32([3, 2, 2])
  for frozen, towers in (((), 3), (("vision",), 1)):
    config = types.SimpleNamespace(frozen=frozen)
    found = flops.sft_flops(config, MODEL, lengths, 4, 100.0, adapters=False)
    np.testing.assert_allclose(found, 3 * flops.text_flops(MODEL, lengths, heads=4) + towers * 100)
  # Under adapters, with a frozen tower too, the weights' own gradients are spared.
  adapted = flops.sft_flops(config, MODEL, lengths, 4, 100.0, adapters=True)
  spared = 2 * WEIGHTS * lengths.sum() + 2 * MODEL.vocab * EMBED * 4
  np.testing.assert_allclose(found - adapted, spared)
  # And the tower's, frozen or not.
  whole = flops.sft_flops(types.SimpleNamespace(frozen=()), MODEL, lengths, 4, 100.0, adapters=True)
  assert whole == adapted


def test_an_update_computes_a_shared_prompt_once():
  prompts, answers = np.int32([7, 5]), np.int32([4, 9, 2, 3])
  config = types.SimpleNamespace(
    group=2, prompts=2, minibatch=4, frozen=("vision",), share_prompts=False,
    loss=types.SimpleNamespace(old_logprob="recompute"))
  found = flops.update_flops(config, MODEL, prompts=prompts, answers=answers, image=100.0,
                             adapters=False)
  # Three passes of the policy and one of the reference.
  np.testing.assert_allclose(found, 100 + 4 * flops.text_flops(
    MODEL, np.repeat(prompts, 2) + answers, heads=answers))
  config.share_prompts = True
  shared = flops.update_flops(config, MODEL, prompts=prompts, answers=answers, image=100.0,
                              adapters=False)
  np.testing.assert_allclose(found - shared, 4 * flops.text_flops(MODEL, prompts, heads=0))
