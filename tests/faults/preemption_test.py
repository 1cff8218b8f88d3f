import os
import signal
import types

import jax
import numpy as np
import pebble
import pytest
import tiny

from ares_jax.grading.pool import GradingPool
from ares_jax.run import model as model_lib
from ares_jax.sampling import sampler, slots
from ares_jax.sampling.state import Drawing, Status
from ares_jax.system import heartbeat, mesh


def test_a_rollout_stops_between_two_chunks(monkeypatch):
  chunks = []
  # One row is never done.
  status = Status(np.zeros(1, bool), *map(np.int32, ([4], [4], [0])))

  def decode(*_, **__):
    chunks.append(1)
    if len(chunks) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return None, status

  monkeypatch.setattr(sampler, "_read_arrays", lambda *_: ())
  monkeypatch.setattr(sampler, "rollout_weights", lambda model, params: params)
  monkeypatch.setattr(sampler, "empty_state", lambda *_: None)
  monkeypatch.setattr(slots, "read_prompts", lambda *_: None)
  monkeypatch.setattr(slots, "decode", decode)
  model = model_lib.model_config(tiny.read().model)
  with jax.set_mesh(mesh.make_mesh(1, 1, jax.devices()[:1])), heartbeat.stop_signals(), \
      pytest.raises(heartbeat.StopRequested):
    sampler.sample(
      model, None, types.SimpleNamespace(tokens=np.zeros((1, 2)), sizes=np.int32([[2, 0]])),
      Drawing(None, None, None, 1, sampler.SamplingConfig(1.0, 1.0, 0, 0, 64), (0,)),
      sampler.EngineConfig(slots=1, read=1, chunk=4, cache_gib=1.0))
  assert len(chunks) == 3


class Answered:
  """A future whose answer is there; the stop is asked for while the third one is awaited."""

  awaited = []

  def done(self):
    return False

  def exception(self):
    self.awaited.append(1)
    if len(self.awaited) == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  def result(self):
    return 1.0


def test_grading_stops_between_two_formulas(monkeypatch):
  monkeypatch.setattr(GradingPool, "_submit", lambda self, pair: Answered())
  texts = [f"<think> </think> \\boxed{{x^{{{number}}}+y}}" for number in range(9)]
  with heartbeat.stop_signals(), GradingPool(1) as pool, pytest.raises(heartbeat.StopRequested):
    pool.grade(texts, ["y+x^2"] * 9)
  assert len(Answered.awaited) == 3


class Killed:
  """A future of a worker that a stop has killed."""

  def done(self):
    return True

  def exception(self):
    return pebble.ProcessExpired("killed")


def test_answers_that_a_stop_interrupts_get_no_grade(monkeypatch):
  monkeypatch.setattr(GradingPool, "_submit", lambda self, pair: Killed())
  with heartbeat.stop_signals(), GradingPool(1) as pool:
    os.kill(os.getpid(), signal.SIGTERM)
    assert heartbeat.stop_requested()
    grading = pool.begin()
    # Other processes decode on: they are left together, at the next chunk.
    grading.add(0, r"<think> </think> \boxed{x^2+y}", "y+x^2")
    with pytest.raises(heartbeat.StopRequested):
      grading.finish()
    assert not pool._verdicts
