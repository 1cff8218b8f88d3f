"""Algorithms by name, through the flags of the real command."""

import math
import shutil
import subprocess
import sys

import pytest
import tiny
from absl import flags
from ml_collections import config_flags

from ares_jax.run import config as run_config
from ares_jax.run import recipe
from ares_jax.run.identity import flatten
from ares_jax.system import config as config_lib


def config(name):
  return flatten(config_lib.load(str(tiny.ROOT / "configs" / name)).to_dict())


IMAGES = ["prompt.windows", "warmup.row_windows", "adacs.row_windows"]
NAMES = ("aepo_7b.py", "aepo_3b.py", "aepo_qwen3vl_8b.py", "aepo_qwen3vl_4b.py",
         "aepo_3b_lora_colab.py", "ares_tiny.py")


def changed(name, algorithm):
  """What an algorithm changes of a config, all else being equal."""
  plain, other = config(name), config(f"{name}:{algorithm}")
  assert plain.keys() == other.keys()
  return {key: other[key] for key in plain if plain[key] != other[key]}


def test_grpo_is_aepo_without_its_two_parts():
  for name in NAMES:
    assert changed(name, "grpo") == {"aepo.reward.kind": "accuracy", "aepo.kl.dynamic": False}
    assert changed(name, "aepo") == {}


def test_dapo_clips_higher_filters_and_has_no_kl():
  expected = {"aepo.reward.kind": "accuracy", "aepo.kl.dynamic": False,
              "aepo.kl.beta": (0.0, 0.0, 0.0), "aepo.loss.clip_high": 0.28,
              "reward.weights": "accuracy=1, overlong=0.5"}
  assert changed("aepo_7b.py", "dapo") == expected
  assert changed("ares_tiny.py", "dapo") == expected | {"aepo.filter.batches": 20}


@pytest.mark.parametrize("algorithm, parts", [
  ("drgrpo", {"advantage": "none", "average": "constant", "clip_high": 0.2}),
  ("rloo", {"advantage": "leave_one_out", "average": "sum", "clip_high": math.inf}),
  ("gspo", {"average": "sequence", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
  ("cispo", {"clip": "weight", "clip_low": 1.0, "clip_high": 4.0})])
def test_other_baselines_change_the_loss_and_the_kl_alone(algorithm, parts):
  found = changed("aepo_7b.py", algorithm)
  assert found.items() >= {f"aepo.loss.{key}": value for key, value in parts.items()}.items()
  others = {key for key in found if not key.startswith(("aepo.loss.", "aepo.kl."))}
  assert others == {"aepo.reward.kind"}


@pytest.mark.parametrize("name", (*NAMES, "aepo_smollm2.py", "own_data.py"))
def test_every_setting_can_be_given_on_the_command_line(name):
  missing = config_lib.setting_defaults(run_config.TrainConfig).keys() - config(name).keys()
  # Those of a problem or a model that the config lacks; ares_tiny.py has no other tower.
  elsewhere = ("model.sizes.",) if name == "ares_tiny.py" else ("model.sizes.", "data.digits.")
  assert [key for key in sorted(missing) if not key.startswith(elsewhere)] == []


@pytest.mark.parametrize("algorithm", list(recipe.PRESETS))
def test_every_algorithm_is_a_config_of_a_run(algorithm):
  values = config_lib.load(str(tiny.ROOT / "configs" / f"ares_tiny.py:{algorithm}"))
  assert run_config.read_config(values).aepo.reward.kind == (
    "aepo" if algorithm == "aepo" else "accuracy")


def test_other_models_differ_from_7b_by_their_model_and_images_alone():
  seven = config("aepo_7b.py")
  for name, others in (("aepo_3b.py", []), ("aepo_qwen3vl_8b.py", IMAGES),
                       ("aepo_qwen3vl_4b.py", IMAGES)):
    other = config(name)
    assert sorted(key for key in seven if seven[key] != other[key]) == sorted(
      ["model.path", *others])


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_config_alone_in_another_folder_is_the_same_config(tmp_path, name):
  shutil.copy(tiny.ROOT / "configs" / name, tmp_path)
  copy = config_lib.load(f"{tmp_path / name}:grpo").to_dict()
  assert flatten(copy) == config(f"{name}:grpo")


def test_a_config_starts_from_the_one_beside_it(tmp_path):
  shutil.copy(tiny.ROOT / "configs" / "aepo_3b.py", tmp_path)
  text = (tiny.ROOT / "configs" / "aepo_7b.py").read_text()
  (tmp_path / "aepo_7b.py").write_text(text.replace("steps=100", "steps=7"))
  copy = config_lib.load(str(tmp_path / "aepo_3b.py"))
  assert copy.aepo.steps == 7 and copy.model.path == "Qwen2.5-VL-3B-Instruct"


def test_a_copy_without_the_config_it_starts_from_says_so(tmp_path, monkeypatch):
  shutil.copy(tiny.ROOT / "configs" / "aepo_3b.py", tmp_path)
  config_lib.load(str(tmp_path / "aepo_3b.py"))  # from the repository's configs/
  monkeypatch.setattr(recipe, "__file__", str(tmp_path / "site" / "ares_jax" / "run" / "recipe.py"))
  with pytest.raises(config_lib.ConfigError, match="starts from aepo_7b.py, which is not be"):
    config_lib.load(str(tmp_path / "aepo_3b.py"))


@pytest.mark.parametrize("text, path, schema", [
  ("mine.jsonl", "mine.jsonl", "plain"), ("a-b/c.jsonl", "a-b/c.jsonl", "plain"),
  ("gs://b/rows.jsonl", "gs://b/rows.jsonl", "plain"), ("virl39k:ViRL39K", "ViRL39K", "virl39k"),
  ("gsm8k:gs://b/x", "gs://b/x", "gsm8k"), ("('a.jsonl', 'b.jsonl')", "a.jsonl", "plain"),
  ("({'path': 'x', 'schema': 'math', 'split': '', 'weight': 2.0},)", "x", "math")])
def test_the_command_line_names_data_files(monkeypatch, text, path, schema):
  holder = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=holder)
  config = tiny.ROOT / "configs" / "own_data.py"
  monkeypatch.setattr(sys, "argv", ["train", f"--config={config}",
                                    f"--config.data.files.rl={text}"])
  holder(sys.argv)
  found = run_config.build_config(holder.config).data.files.rl
  assert (found[0].path, found[0].schema) == (path, schema) and len(found) == 1 + ("b.js" in text)


def test_the_command_takes_them_and_switches_behind_them():
  # A mistake that is found when the config is built, in words that show the algorithm's numbers.
  command = [sys.executable, "-m", "ares_jax.train", "--config=configs/aepo_3b.py:dapo",
             "--config.aepo.kl.low=0.0"]
  result = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
  assert result.returncode == 1
  assert "config.aepo.kl.beta = (0.0, 0.0, 0.0) must be >= 0" in result.stderr


def test_the_command_names_the_new_name_of_a_renamed_setting():
  command = [sys.executable, "-m", "ares_jax.train", "--config=configs/aepo_3b.py",
             "--config.data.files.prompts=()"]
  result = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
  assert result.returncode == 1
  assert result.stderr.endswith("\nerror: config.data.files.prompts is called config.data.files.rl "
                                "now; rename it\n")


def test_a_misspelt_algorithm_is_one_line():
  with pytest.raises(config_lib.ConfigError, match="no algorithm 'dpao'; did you mean 'dapo'?"):
    config("aepo_3b.py:dpao")
