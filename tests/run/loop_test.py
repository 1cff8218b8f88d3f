import dataclasses
import json
import os
import shutil
import signal
import time

import flax.struct
import jax
import jax.numpy as jnp
import pytest

from ares_jax.run import best, identity, loop
from ares_jax.run.checkpoint import reader
from ares_jax.run.config import LoopConfig
from ares_jax.run.loop import run_stage
from ares_jax.system import heartbeat


@flax.struct.dataclass
class Counter:
  step: jax.Array
  total: jax.Array


def fresh():
  return Counter(jnp.int32(0), jnp.float32(0))


def begin_adding(log, stop_at=None, fail_at=None):
  def begin(state):
    log.append(int(state.step))

    def step(state):
      number = int(state.step)
      if number == fail_at:
        raise RuntimeError("power cut")
      if number == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      return Counter(state.step + 1, state.total + number), {"number": number}, ""

    return step

  return begin


def run(workdir, steps=5, log=None, save_every=2, **events):
  return run_stage("aepo", fresh(), begin_adding([] if log is None else log, **events),
                   steps=steps, workdir=str(workdir), config=LoopConfig(save_every, 1, False, 2))


def validated(workdir, values, steps=6, every=2, keep_best="validate/accuracy", patience=0,
              stop_at=None, save_every=3):
  """A stage whose validation at step s gives values[s]; a stop comes in the validation there."""
  asked = []

  def measure(state):
    step = int(state.step)
    asked.append(step)
    if step == stop_at:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.05)
      raise heartbeat.StopRequested
    return {"validate/accuracy": values[step]}, f"validated: {values[step]}"

  config = LoopConfig(save_every, 1, False, 2, keep_best=keep_best, patience=patience)
  state = run_stage("aepo", fresh(), begin_adding([]), steps=steps, workdir=str(workdir),
                    config=config, validation=loop.Validation(every, measure))
  return state, asked


RISES_AND_FALLS = {0: 0.1, 2: 0.5, 4: 0.4, 6: 0.3}


def test_validation_comes_before_the_first_step_and_after_the_last(tmp_path, capsys):
  state, asked = validated(tmp_path, RISES_AND_FALLS | {5: 0.2}, steps=5)
  assert asked == [0, 2, 4, 5] and state.total == 10
  assert lines(tmp_path) == [0, 1, 2, 2, 3, 4, 4, 5, 5]
  assert "aepo 4/5  validated: 0.4, best 0.5 at 2" in capsys.readouterr().err
  assert validated(tmp_path, {}, steps=5)[1] == []  # a second run does nothing


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
  validated(tmp_path, RISES_AND_FALLS)
  folder = str(tmp_path / "aepo")
  assert reader.all_steps(folder) == [2, 6]
  config = LoopConfig(3, 1, False, 2, keep_best="validate/accuracy")
  assert best.best_step(str(tmp_path), "aepo", config) == 2
  # A better one whose save failed does not count.
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"stage": "aepo", "step": 7, "validate/accuracy": 0.9}) + "\n")
  assert best.best_step(str(tmp_path), "aepo", config) == 2
  less = dataclasses.replace(config, keep_best="-validate/accuracy")
  with pytest.raises(ValueError, match=r"no checkpoint of aepo at step 0, .*there are \[2, 6\]"):
    best.best_step(str(tmp_path), "aepo", less)
  (tmp_path / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match="no checkpoint of aepo at step None"):
    best.best_step(str(tmp_path), "aepo", config)
  with pytest.raises(ValueError, match="keep_best was not set"):
    best.best_step(str(tmp_path), "aepo", dataclasses.replace(config, keep_best=""))


@pytest.mark.parametrize("stop_at", [0, 2, 4, 6])
def test_a_stop_during_a_validation_loses_nothing(tmp_path, stop_at):
  straight, stopped = tmp_path / "straight", tmp_path / "stopped"
  validated(straight, RISES_AND_FALLS)
  with pytest.raises(KeyboardInterrupt, match=f"saved at step {stop_at} of 6"):
    validated(stopped, RISES_AND_FALLS, stop_at=stop_at)
  state, asked = validated(stopped, RISES_AND_FALLS)
  assert asked[0] == stop_at and state.total == 15

  def untimed(folder):
    return [{name: value for name, value in json.loads(line).items() if "seconds/" not in name}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]

  assert untimed(stopped) == untimed(straight)
  assert reader.all_steps(str(stopped / "aepo")) == [2, 6]


def test_a_stage_ends_when_no_value_is_the_best_for_long_enough(tmp_path):
  state, asked = validated(tmp_path, RISES_AND_FALLS, steps=20, patience=2)
  assert asked == [0, 2, 4, 6] and int(state.step) == 6
  state, asked = validated(tmp_path, {}, steps=20, patience=2)  # it has ended for good
  assert asked == [] and int(state.step) == 6


def test_a_metric_that_no_validation_measures_is_named(tmp_path):
  with pytest.raises(ValueError, match="names 'validate/acuracy'.*mean 'validate/accuracy'"):
    validated(tmp_path, RISES_AND_FALLS, keep_best="validate/acuracy")


def lines(workdir):
  return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_runs_all_steps_and_a_second_run_does_nothing(tmp_path):
  assert run(tmp_path).total == 0 + 1 + 2 + 3 + 4
  log = []
  state = run(tmp_path, log=log)
  assert state.total == 10 and log == []
  assert lines(tmp_path) == [1, 2, 3, 4, 5]


def test_resumes_from_the_last_checkpoint_without_repeating_log_lines(tmp_path):
  with pytest.raises(RuntimeError, match="power cut"):
    run(tmp_path, fail_at=3)
  log = []
  assert run(tmp_path, log=log).total == 10
  assert log == [2]  # saved at 2, step 3 was lost and repeated
  assert lines(tmp_path) == [1, 2, 3, 4, 5]


def test_a_step_that_refuses_its_data_loses_no_finished_step(tmp_path):
  def begin(state):
    def step(state):
      if int(state.step) == 3:
        raise ValueError("grader 'a:b' returns nan")
      return Counter(state.step + 1, state.total + state.step), {}, ""

    return step

  config = LoopConfig(100, 1, False, 2)
  with pytest.raises(ValueError, match="'a:b' returns nan; adding is saved at step 3 of 5"):
    run_stage("adding", fresh(), begin, steps=5, workdir=str(tmp_path), config=config)
  log = []
  state = run_stage("adding", fresh(), begin_adding(log), steps=5, workdir=str(tmp_path),
                    config=config)
  assert log == [3] and state.total == 10


def test_a_stop_request_finishes_the_step_and_saves_it(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt, match="saved at step 2 of 5"):
    run(tmp_path, stop_at=1, save_every=100)
  assert signal.getsignal(signal.SIGTERM) == before
  log = []
  assert run(tmp_path, log=log).total == 10 and log == [2]


def test_a_stop_request_in_the_last_step_is_not_lost(tmp_path):
  with pytest.raises(KeyboardInterrupt, match="saved at step 5 of 5"):
    run(tmp_path, stop_at=4)
  assert run(tmp_path).total == 10


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
  run(tmp_path)
  with pytest.raises(ValueError, match="step 5, beyond the 3 steps"):
    run(tmp_path, steps=3)


def test_save_every_0_is_refused():
  with pytest.raises(ValueError, match="save_every"):
    LoopConfig(0, 1, False, 2)


def test_a_stop_request_inside_a_step_leaves_it_undone_and_saves_the_one_before(tmp_path):
  def begin(state):
    def step(state):
      if int(state.step) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):  # chunks of a rollout
          heartbeat.heartbeat()
          time.sleep(0.01)
      return Counter(state.step + 1, state.total + state.step), {}, ""

    return step

  with pytest.raises(KeyboardInterrupt, match="adding is saved at step 3 of 5; run the same"):
    run_stage("adding", fresh(), begin, steps=5, workdir=str(tmp_path),
              config=LoopConfig(100, 1, False, 2))
  assert not heartbeat.stop_requested() and lines(tmp_path) == [1, 2, 3]
  log = []
  state = run_stage("adding", fresh(), begin_adding(log), steps=5, workdir=str(tmp_path),
                    config=LoopConfig(100, 1, False, 2))
  assert log == [3] and state.total == 10


def test_steps_in_a_row_without_a_finite_gradient_stop_the_run(tmp_path):
  def begin(state):
    def step(state):
      number = int(state.step)
      metrics = {"skipped": float(number in (0, 1, 3, 4, 5))}
      return Counter(state.step + 1, state.total + (not metrics["skipped"])), metrics, ""

    return step

  with pytest.raises(ValueError, match="3 steps in a row were skipped, for gr.*; step 6 is saved"):
    run_stage("aepo", fresh(), begin, steps=9, workdir=str(tmp_path),
              config=LoopConfig(4, 1, False, 2))
  assert run(tmp_path, steps=7).total == 1 + 6  # step 2 alone had a gradient


def test_a_failed_save_is_repeated_at_the_next_step(tmp_path, monkeypatch):
  verify, failures = reader.verify_on_disk, [1, 1]

  def fail(*arguments):
    if failures:
      failures.pop()
      raise OSError(28, "No space left on device")
    verify(*arguments)

  monkeypatch.setattr(reader, "verify_on_disk", fail)
  monkeypatch.setattr(loop, "_RETRY_PAUSES", (0, 0))
  assert run(tmp_path, steps=5).total == 10 and not failures
  failures += [1] * 9
  with pytest.raises(OSError, match="saving checkpoint 6 .* step 5 is intact.*No space left"):
    run(tmp_path, steps=6)
  assert sorted(os.listdir(tmp_path / "aepo")) == ["5"]


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(tmp_path):
  for folder, seed in (("one", 0), ("two", 1)):
    identity.keep_records(str(tmp_path / folder), {"config.json": {"seed": seed, "threads": seed}})
    run(tmp_path / folder, steps=2)
  shutil.rmtree(tmp_path / "two" / "aepo")
  shutil.copytree(tmp_path / "one" / "aepo", tmp_path / "two" / "aepo")
  with pytest.raises(ValueError, match="^checkpoint 2 of aepo was made with .*: seed differ"):
    run(tmp_path / "two", steps=3)
  identity.keep_records(str(tmp_path / "one"), {"config.json": {"seed": 1, "threads": 4}}, ("seed",
                                                                                            ))
  assert run(tmp_path / "one", steps=3).total == 3
