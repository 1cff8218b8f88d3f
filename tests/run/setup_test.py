import json
import types

import jax
import pytest
import tiny

from ares_jax.grading import pool as pool_lib
from ares_jax.run import config as run_config
from ares_jax.run import data, setup
from ares_jax.system import mesh
from ares_jax.system.config import ConfigError

NO_FILES = dict(warmup=(), sft=(), rl=(), eval=())


@pytest.mark.parametrize("changes, words", [
  ({"aepo.entropy.window": 0}, "config.aepo.entropy.window = 0"),
  ({"aepo.entropy.quantile": 1.5}, "quantile = 1.5"),
  ({"aepo.reward.medium": 0.9}, "medium = 0.9 <= easy = 0.75"),
  ({"aepo.reward.kind": "grpo"}, "config.aepo.reward.kind is 'grpo'"),
  ({"aepo.loss.clip_dual": 1.0}, "clip_dual = 1.0"),
  ({"aepo.kl.rate": 2.0}, "rate = 2.0"),
  ({"aepo.kl.start": (0.01, 1.0, 1.0)}, "low = 0.1"),
  ({"aepo.filter.low": 1.0}, "low = 1.0, high = 0.99"),
  ({"aepo.sampling.top_p": 0.0}, "config.aepo.sampling.top_p = 0.0"),
  ({"evaluate.top_p": 0.0}, "config.evaluate.top_p = 0.0"),
  ({"aepo.reward.alpha_rate": 0.0}, "alpha_rate = 0.0 > 0"),
  ({"model.sizes.vision.temporal_patch": 1}, "vision.temporal_patch is 1; only 2"),
  ({"aepo.steps": True}, "config.aepo.steps is True"),
  ({"curate.count": 9}, "count = 9 responses from problems = 8"),
  ({"adacs.row_tokens": ()}, "config.adacs.row_windows = 24 must be >= 0, row_tokens = ()"),
  ({"curate.pass_rates": "colum"}, "config.curate.pass_rates is 'colum', not one of its values; "
                                   "did you mean 'column'"),
  ({"data.digits.problem.levels": 9}, "levels = 9"),
  ({"threads": 0}, "threads = 0"),
  ({"data.digits": None, "data.files": NO_FILES | dict(eval=[dict(
    path="a", schema="virl39", split="", weight=1)])},
   "config.data.files.eval[0].schema is 'virl39'; did you mean 'virl39k'"),
  ({"data.digits": None, "data.files": NO_FILES | dict(eval=[dict(
    path="a", schema="plain", split="", weight=0)])}, "config.data.files.eval[0].weight = 0.0"),
  ({"grade.timeout_share": 1.5}, "config.grade.timeout_share = 1.5"),
  ({"data.digits.curated": 3}, "config.data.digits.curated is called config.data.digits.sft since"),
  ({"data.digits.teacher.last_lesson": 3}, "called config.data.digits.teacher.last_warmup since"),
  ({"data.digits": None, "data.files": NO_FILES | dict(prompts=())},
   "config.data.files.prompts is called config.data.files.rl since version 0.2; rename it"),
  ({"model.path": "nowhere"}, "config.model.path 'nowhere' is no folder"),
  ({"data.digits": None, "data.files": NO_FILES},
   "model.path is missing"),
  ({"model.path": "nowhere", "data.digits": None, "data.files": NO_FILES},
   "config.model.path 'nowhere' is no folder"),
])
def test_a_mistake_in_a_config_is_one_line(changes, words):
  with pytest.raises(ConfigError) as error:
    tiny.read(**changes)
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("devices, changes, words", [
  (1, {"evaluate.problems": 9}, "config.evaluate.problems needs 9 rows of the 'eval' data, which "
                                "has 8"),
  (1, {"curate.problems": 9}, "config.curate.problems needs 9"),
  (1, {"engine.slots": 4, "engine.cache_gib": 1e-5}, "config.evaluate.batch = .* lower the"),
  (1, {"warmup.steps": 0, "adacs.steps": 0, "aepo.steps": 0}, "steps are all 0: nothing is train"),
  (1, {"aepo.frozen": ("vison",)}, "config.aepo.frozen names vison, no part .* are embed, blocks"),
  (4, {"warmup.microbatch": 2}, "config.warmup.microbatch = 2 does not divide over 4 devices"),
  (4, {"aepo.microbatch": 2}, "config.aepo.microbatch = 2 does not divide over 4"),
  (4, {"aepo.frozen": (), "aepo.minibatch": 8},
   "config.aepo.minibatch / aepo.group = 2 does not divide over 4"),
])
def test_what_cannot_run_is_refused_before_anything_does(devices, changes, words):
  config = tiny.read(**changes)
  with jax.set_mesh(mesh.make_mesh(-1, 1, devices=jax.devices()[:devices])):
    with pytest.raises(ValueError, match=words), setup.open_run(config):
      pass


def test_truths_that_no_answer_meets_are_found_before_training(tmp_path):
  for name, answers in (("rl", ["3", "\\frac{1}{2"]), ("eval", ["4"] * 6)):
    (tmp_path / f"{name}.jsonl").write_text("".join(
      json.dumps({"question": "q", "answer": answer}) + "\n" for answer in answers))
  files = {name: [dict(path=str(tmp_path / f"{name}.jsonl"), schema="plain", split="", weight=1)]
           for name in ("rl", "eval")}
  values = tiny.values(
    model__path=str(tmp_path), data__digits=None, warmup__steps=0, adacs__steps=0,
    data__files=NO_FILES | files)
  with jax.set_mesh(mesh.make_mesh(-1, 1)), pool_lib.GradingPool(workers=1) as pool:
    config = run_config.read_config(values)
    run = setup.Run(config, None, None, types.SimpleNamespace(grader=pool), None,
                    data.RunData(config, None, pool, None))
    with pytest.raises(ValueError, match="1 of 2 truths of the 'rl' data cannot be met: "
                                         "rl.jsonl:1 .rl 0:1.: the truth '.*' counts as wrong"):
      setup.check_run(run)


@pytest.mark.parametrize("name", ["aepo_7b", "aepo_3b", "aepo_3b_lora_colab", "own_data"])
def test_configs_of_the_repository_are_complete(name):
  tiny.read()
  values = tiny.config_lib.load(str(tiny.ROOT / "configs" / f"{name}.py"))
  with pytest.raises(ConfigError, match=r"config.model.path 'Qwen2.5-VL-\dB-Instruct' is no"):
    run_config.read_config(values)


def test_a_command_that_trains_nothing_needs_no_training_data(monkeypatch):
  def missing(self, kind):
    raise ValueError(f"no data {kind}")

  monkeypatch.setattr(setup, "check_run", lambda run: None)
  monkeypatch.setattr(data.RunData, "source", missing)
  config = tiny.read(aepo__steps=1, aepo__epochs=0.5)
  with setup.open_run(config, check=False) as run:
    assert run.config == config
  with pytest.raises(ValueError, match="no data"), setup.open_run(config):
    pass


def test_reward_functions_are_tried_without_entropies_on_a_teacher_s_answers(monkeypatch):
  tried = []
  monkeypatch.setattr(setup.Scorer, "try_out", lambda _, rows, entropies: tried.append(entropies))
  with jax.set_mesh(mesh.make_mesh(1, 1, devices=jax.devices()[:1])), setup.open_run(
      tiny.read(reward__weights="accuracy=1, format=0.1")):
    assert tried == [True, True, False]  # eval, rl, sft
