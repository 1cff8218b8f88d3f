"""Validation while training, with a reward function, in the smallest run; the best is exported."""

import dataclasses
import json
import pathlib
import types

import jax
import pytest
import tiny

from ares_jax import aepo, export, train
from ares_jax.evaluation import validate
from ares_jax.run import config as run_config
from ares_jax.run import setup
from ares_jax.system import mesh

REWARDS = pathlib.Path(__file__).parent.parent / "grading" / "rewards"


def run(workdir):
  workdir.mkdir(exist_ok=True)
  own = workdir / "own.jsonl"
  own.write_text(json.dumps({"question": "Compute 3 + 4", "answer": "7"}) + "\n")
  values = tiny.values(
    warmup__steps=0, adacs__steps=0, aepo__validate=(2, 6, 2), aepo__validate_on=(str(own),),
    # 64 rows, 4 an iteration: 0.17 epochs are 3 iterations, over which the learning rate falls.
    aepo__steps=1, aepo__epochs=0.17, aepo__optimizer__schedule="cosine", aepo__loop__save_every=2,
    aepo__loop__keep_best="rollout/batches",  # 1 in every step: the first is the best
    reward__function=f"{REWARDS}/easyr1.py:compute_score, {REWARDS}/trl.py:short_reward",
    reward__weights="overall=1, short_reward=0.5")
  (workdir / "config.json").write_text(values.to_json_best_effort())
  config = run_config.read_config(values)
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(config, workdir=str(workdir)) as parts:
    train.train(parts, str(workdir))


def untimed(workdir):
  return [{name: value for name, value in json.loads(line).items()
           if not name.startswith(("seconds", "device", "speed", "memory"))}
          for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_killed_validates_and_ends_like_one_that_was_not(tmp_path, monkeypatch):
  straight, cut = tmp_path / "straight", tmp_path / "cut"
  run(straight)
  step, calls = aepo.aepo_step, []

  def power_cut(*args):
    calls.append(1)
    if len(calls) == 3:  # after the validation of step 2
      raise RuntimeError("power cut")
    return step(*args)

  monkeypatch.setattr(aepo, "aepo_step", power_cut)
  with pytest.raises(RuntimeError, match="power cut"):
    run(cut)
  monkeypatch.setattr(aepo, "aepo_step", step)
  run(cut)
  found = untimed(straight)
  assert untimed(cut) == found
  assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 3]
  for line in (found[0], found[3], found[5]):
    assert {"validate/accuracy", "validate/pass_at_k", "validate/tokens", "validate/truncated",
            "validate/tokens/hard", "validate/accuracy/level/1",
            "validate/own/accuracy"} <= line.keys()
  assert found[1]["component/short_reward"] is not None and "component/overall/easy" in found[1]
  seconds = json.loads((straight / "results.json").read_text())["aepo"]["seconds"]
  assert seconds["validation"] > 0
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    for best, step in ((True, 1), (False, 3)):
      result = export.export(str(cut), str(tmp_path / f"step {step}"), best=best)
      assert result["step"] == step


def test_two_files_of_one_name_are_refused(monkeypatch):
  config = tiny.read(aepo__validate=(2, 6, 2), aepo__validate_on=("a/own.jsonl", "b/own.jsonl"))
  parts = types.SimpleNamespace(source=lambda kind: [{}] * 6, config=config, generator=Generator())
  monkeypatch.setattr(validate, "open_problems", lambda parts, path: ("own", [{}]))
  with pytest.raises(ValueError, match="'b/own.jsonl' and another entry would both"):
    validate.Validation(parts)


@dataclasses.dataclass
class Generator:
  phases: object = None


def test_a_file_of_ones_own_is_opened_under_its_name(tmp_path):
  path = tmp_path / "held.jsonl"
  path.write_text(json.dumps({"question": "3 + 4?", "answer": "7"}) + "\n")
  parts = types.SimpleNamespace(
    generator=types.SimpleNamespace(encoder=types.SimpleNamespace(encode=lambda row: row)),
    config=types.SimpleNamespace(threads=1))
  name, rows = validate.open_problems(parts, str(path))
  assert name == "held" and rows[0]["answer"] == ["7"]
