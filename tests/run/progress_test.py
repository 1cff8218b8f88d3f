import io
import types

import jax
import pytest

from ares_jax.run import progress as progress_lib
from ares_jax.system import chips


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_progress_shows_the_time_left_of_a_resumed_stage():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(100, "aepo", start=40, stream=stream, clock=clock)
  progress.update(40)
  clock.now = 20.0
  progress.update(50, "accuracy 0.61")  # 10 steps in 20 s, 50 to go
  assert stream.getvalue() == "aepo 40/100\naepo 50/100 2.00 s/step, 1m40s left  accuracy 0.61\n"


def test_the_first_step_compiles_and_does_not_count_later():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(10, "aepo", stream=stream, clock=clock, every=0.0)
  for clock.now, step in ((30.0, 1), (31.0, 2), (32.0, 3)):
    progress.update(step)
  lines = stream.getvalue().splitlines()
  assert "30.00 s/step" in lines[0]
  assert "1.00 s/step, 0m08s left" in lines[1] and "1.00 s/step, 0m07s left" in lines[2]


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(30, "aepo", stream=stream, clock=clock)
  for step in range(1, 31):
    clock.now = float(step)
    progress.update(step)
  assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
    "1/30", "11/30", "21/30", "30/30"
  ]  # fmt: skip


def test_on_a_terminal_progress_is_one_line():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream, clock = Terminal(), Clock()
  progress = progress_lib.Progress(2, "aepo", stream=stream, clock=clock)
  clock.now = 7200.0
  progress.update(1)
  progress.update(2)
  progress.close()
  text = stream.getvalue()
  assert text.count("\n") == 1 and text.endswith("\n") and "2h00m left" in text
  assert "[##########..........] aepo 1/2" in text


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
  found = progress_lib.speed_metrics(WORK, 2.0)
  assert found == {"speed/tokens": 500, "speed/mfu": 0.25, "memory/peak": 12, "memory/limit": 16}
  assert progress_lib.speed_note(found) == "500 tokens/s, MFU 25.0%, HBM 12.0 of 16.0 GiB"


def test_unknown_numbers_are_left_out(devices):
  devices(device("some new chip"))
  assert progress_lib.speed_metrics(WORK, 2.0) == {"speed/tokens": 500}
  assert progress_lib.speed_metrics({}, 2.0) == {} and progress_lib.speed_note({}) == ""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_chip_is_known_by_the_name_that_jax_gives_it(topology):
  pytest.importorskip("libtpu")
  chip, found = chips.describe_slice(topology)
  assert chips.chip_of(found[0]) == chip
