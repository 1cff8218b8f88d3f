import types

import jax
import pytest

from ares_jax.run import speed
from ares_jax.system import chips

GIB = 2**30


def device(kind, peak=None):
  stats = None if peak is None else {"peak_bytes_in_use": peak * GIB, "bytes_limit": 16 * GIB}
  return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


@pytest.fixture
def devices(monkeypatch):
  def put(*found):
    monkeypatch.setattr(jax, "devices", lambda: list(found))
    monkeypatch.setattr(jax, "local_devices", lambda: list(found))
  return put


WORK = {"work/tokens": 1000, "work/flops": 197e12}


def test_two_chips_that_do_the_work_of_one_are_half_used(devices):
  devices(device("TPU v5 lite", 4), device("TPU v5 lite", 12))
  found = speed.speed_metrics(WORK, 2.0)
  assert found == {"speed/tokens": 500, "speed/mfu": 0.25, "memory/peak": 12, "memory/limit": 16}
  assert speed.speed_note(found) == "500 tokens/s, MFU 25.0%, HBM 12.0 of 16.0 GiB"


def test_unknown_numbers_are_left_out(devices):
  devices(device("some new chip"))
  assert speed.speed_metrics(WORK, 2.0) == {"speed/tokens": 500}
  assert speed.speed_metrics({}, 2.0) == {} and speed.speed_note({}) == ""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_chip_is_known_by_the_name_that_jax_gives_it(topology):
  pytest.importorskip("libtpu")
  chip, found = chips.describe_slice(topology)
  assert chips.chip_of(found[0]) == chip
