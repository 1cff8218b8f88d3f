import time

import flax.struct
import jax
import jax.numpy as jnp
import pytest

from ares_jax import profiler
from ares_jax.loop import LoopConfig, run_stage
from ares_jax.metrics import PhaseTimer


@pytest.mark.parametrize("text, message", [
  ("3", "--profile=3 is not START:STOP"), ("a:b", "is not START:STOP"), ("-1:2", "is not START"),
  ("2:2", "0 <= START < STOP <= 9, the steps of aepo"), ("3:10", "STOP <= 9")])
def test_what_is_no_range_of_the_stage_is_refused(text, message):
  with pytest.raises(ValueError, match=message) as error:
    profiler.steps(text, "aepo", 9)
  assert "\n" not in str(error.value)


def test_a_range_is_two_numbers():
  assert profiler.steps("0:9", "aepo", 9) == (0, 9)


@flax.struct.dataclass
class Counter:
  step: jax.Array


def run(workdir, name="stage", steps=4):
  timer, seen = PhaseTimer(), []

  def begin(state):
    def step(state):
      with timer("rollout"):
        seen.append(bool(profiler._running))
        time.sleep(0.001)
      return Counter(state.step + 1), {}, ""
    return step

  run_stage(name, Counter(jnp.int32(0)), begin, steps=steps, workdir=str(workdir),
            config=LoopConfig(1, 1, False, 2), phases=timer)
  return seen


def test_the_steps_that_were_asked_for_are_traced_with_their_phases(tmp_path):
  folder = tmp_path / "profile"
  with profiler.requested(str(folder), "stage", 1, 3):
    assert run(tmp_path, "other") == [False] * 4
    assert run(tmp_path) == [False, True, True, False]
  [trace] = folder.rglob("*.xplane.pb")
  names = trace.read_bytes()
  assert b"rollout" in names and b"step" in names and b"save" in names


def test_what_comes_after_the_stage_is_not_traced(tmp_path):
  with profiler.requested(str(tmp_path / "profile"), "stage", 1, 2):
    assert run(tmp_path, steps=2) == [False, True]
    assert not profiler._running


def test_a_run_that_ends_inside_the_range_leaves_no_trace_running(tmp_path):
  with pytest.raises(RuntimeError), profiler.requested(str(tmp_path / "p"), "stage", 0, 9):
    profiler.at("stage", 0)
    assert profiler._running
    raise RuntimeError("power cut")
  assert not profiler._running
