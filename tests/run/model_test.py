import dataclasses
import shutil

import pytest
import tiny
from models import make_golden

from ares_jax.models.config import PUBLISHED_SIZES
from ares_jax.run.model import model_config, open_model

SECTION = tiny.read().model


def test_a_fresh_model_has_the_vocabulary_of_its_tokenizer():
  opened = open_model(SECTION)
  tokens, words = opened.tokens, len(opened.tokens.tokenizer)
  assert opened.config == model_config(SECTION)
  assert 0 <= opened.config.vocab - words < 8 and opened.config.vocab % 8 == 0
  assert tokens.end == (tokens.tokenizer.eos_token_id,) and tokens.allowed[tokens.end[0]]
  assert not tokens.allowed[opened.config.image_token]
  assert not tokens.allowed[words:].any()


def test_the_sizes_of_a_published_model_need_no_file():
  name = "Qwen2.5-VL-3B-Instruct"
  section = dataclasses.replace(SECTION, path=f"not/there/{name}", sizes=None, remat="dots")
  found = model_config(section)
  assert found == dataclasses.replace(PUBLISHED_SIZES[name], compute_dtype="float32", remat="dots")
  with pytest.raises(ValueError, match="is no folder; give the folder of a Hugging Face"):
    open_model(section)
  with pytest.raises(ValueError, match="ends in no name whose sizes are known: Qwen2.5-VL-3B"):
    model_config(dataclasses.replace(section, path="Qwen2-VL"))


def test_a_folder_whose_images_are_made_otherwise_is_refused(tmp_path):
  shutil.copy(make_golden.folder("tied") / "config.json", tmp_path)
  (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
  with pytest.raises(ValueError, match="image_mean is .*only .*is implemented"):
    open_model(dataclasses.replace(SECTION, path=str(tmp_path), sizes=None))
