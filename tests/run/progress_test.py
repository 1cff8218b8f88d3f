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


def shown(progress, stream, clock, ends):
  """"S s/step, LEFT left" after each of some steps, given the time at which each ends."""
  for step, clock.now in enumerate(ends, start=1):
    progress.update(step)
  return [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]


def test_the_time_left_is_that_of_the_median_step():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(10, "aepo", stream=stream, clock=clock, every=0.0)
  lines = shown(progress, stream, clock, (30.0, 31.0, 32.0, 52.0, 53.0))
  assert lines[0] == "30.00 s/step, 4m30s left"
  assert lines[2:] == ["1.00 s/step, 0m07s left", "1.00 s/step, 0m06s left",
                       "1.00 s/step, 0m05s left"]


def test_only_recent_steps_count():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(1000, "aepo", stream=stream, clock=clock, every=0.0)
  slow = [10.0 * step for step in range(1, 101)]
  lines = shown(progress, stream, clock, slow + [1000.0 + step for step in range(1, 31)])
  assert lines[99].startswith("10.00 s/step") and lines[129].startswith("1.00 s/step")


def test_seconds_of_compiling_do_not_count(monkeypatch):
  clock, stream, spent = Clock(), io.StringIO(), [5.0]
  monkeypatch.setattr(progress_lib.compiling, "seconds", lambda: spent[0])
  progress = progress_lib.Progress(10, "aepo", stream=stream, clock=clock, every=0.0)
  spent[0] = 305.0
  clock.now = 301.0
  progress.update(1)
  assert stream.getvalue() == "aepo 1/10 1.00 s/step, 0m09s left\n"


def test_curation_counts_problems():
  clock, stream = Clock(), io.StringIO()
  progress = progress_lib.Progress(100, "curation", unit="problem", stream=stream, clock=clock)
  clock.now = 16.0
  progress.update(64)
  assert stream.getvalue() == "curation 64/100 0.25 s/problem, 0m09s left\n"


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
