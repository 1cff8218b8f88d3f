import jax
import numpy as np
import pytest
import tiny

from ares_jax.run import model as model_lib
from ares_jax.sampling.sampler import EngineConfig
from ares_jax.sampling.scheduler import CachePlan, PromptScheduler, plan_cache
from ares_jax.system import mesh


def test_plans_as_many_slots_as_cache_gib_holds():
  # 2 layers x 1 kv head x 16 x keys and values, float32: 256 bytes per token.
  model = model_lib.model_config(tiny.read().model)
  sizes = dict(prompts=400, prompt_tokens=32, group=4, tokens=64)

  def plan(gib=1.0, count=0, **changes):
    with jax.set_mesh(mesh.make_mesh(4, 1)):
      return plan_cache(model, EngineConfig(count, 4, 16, gib), **sizes | changes)

  # A device has 3 slots, prompt slots for 3 times the prompts that fill them and for a read of 1,
  # and the read itself.
  gib = (3 * 64 + (3 + 1 + 1) * 32) * 256 / 2**30
  assert plan(gib) == CachePlan(slots=3, prompt_slots=4, read=1)
  assert plan(gib, 9) == CachePlan(slots=3, prompt_slots=4, read=1)  # 4 devices divide it
  assert plan(prompts=8) == CachePlan(slots=8, prompt_slots=2, read=1)  # one a row
  assert plan(prompts=8, count=100) == plan(prompts=8)
  assert plan(count=36) == CachePlan(slots=9, prompt_slots=3 * 3 + 1, read=1)
  with pytest.raises(ValueError, match="engine.slots to 12 or less"):
    plan(gib, 16)
  with pytest.raises(ValueError, match="raise engine.cache_gib"):
    plan(gib / 4)


def test_a_prompt_slot_is_reused_when_all_rows_of_its_prompt_have_ended():
  # Two devices with 3 prompts of 2 rows and 2 prompt slots each; some of the 8 slots are idle.
  scheduler = PromptScheduler(2, 3, CachePlan(slots=8, prompt_slots=2, read=1))
  left = np.full(6, 2)
  assert [x.tolist() for x in scheduler.next_read(left)] == [[[0], [0]], [[0], [0]]]
  assert [x.tolist() for x in scheduler.next_read(left)] == [[[1], [1]], [[1], [1]]]
  assert scheduler.next_read(left) is None
  left[4] = 0  # Of device 1, prompt 1.
  # Device 0 reads nothing: prompt 3 and prompt slot 2 do not exist.
  assert [x.tolist() for x in scheduler.next_read(left)] == [[[3], [2]], [[2], [1]]]
  left[0] = 1
  assert scheduler.next_read(left) is None
  left[0] = 0
  assert [x.tolist() for x in scheduler.next_read(left)] == [[[2], [3]], [[0], [2]]]
  assert scheduler.next_read(np.zeros(6, int)) is None


def test_devices_read_together_unless_one_is_short_of_rows():
  # Two devices with 4 prompts of 4 rows, 3 prompt slots and 4 slots each.
  scheduler = PromptScheduler(2, 4, CachePlan(slots=4, prompt_slots=3, read=1))
  left = np.full(8, 4)
  while scheduler.next_read(left) is not None:
    pass
  assert scheduler.read_D.tolist() == [3, 3]
  left[[0, 1]] = 0  # device 0 has two free prompt slots, and 4 rows for its 4 slots
  assert scheduler.next_read(left) is None
  left[2] = 3
  assert scheduler.next_read(left) is None  # a quarter of its slots has no row, not more
  left[2] = 2
  assert [x.tolist() for x in scheduler.next_read(left)] == [[[3], [4]], [[0], [3]]]
  left[4] = 0  # device 0 has nothing to read, device 1 need not wait for it
  assert [x.tolist() for x in scheduler.next_read(left)] == [[[4], [3]], [[3], [0]]]
