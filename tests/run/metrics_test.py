import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.run import metrics
from ares_jax.run import progress as progress_lib
from ares_jax.system import profiler


def lines(workdir):
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    return [json.loads(line) for line in file.read().split("\n")[:-1]]


def write(workdir, stage, step, steps):
  with metrics.MetricWriter(str(workdir), stage, step=step) as writer:
    for s in steps:
      writer.write_scalars(s, {"loss": 1.0 / s})


def test_writes_one_object_a_step_and_tensorboard_events(tmp_path):
  with metrics.MetricWriter(str(tmp_path), "aepo", step=0) as writer:
    writer.write_scalars(
      1, {"loss": np.float32(0.5), "rows": jnp.int32(8), "x": jnp.ones((1,)), "bad": np.nan}
    )
  assert lines(tmp_path) == [
    {"stage": "aepo", "step": 1, "loss": 0.5, "rows": 8, "x": 1.0, "bad": None}
  ]
  assert os.listdir(tmp_path / "tensorboard" / "aepo")[0].startswith("events.out.tfevents")


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
  with metrics.MetricWriter(str(tmp_path), "aepo", step=0) as writer:
    writer.write_scalars(1, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1


def test_resuming_cuts_the_stage_after_the_checkpoint_and_keeps_the_others(tmp_path):
  write(tmp_path, "adacs", 0, [1, 2, 3])
  write(tmp_path, "aepo", 0, [1, 2, 3, 4])
  write(tmp_path, "aepo", 2, [3, 4])
  seen = [(line["stage"], line["step"]) for line in lines(tmp_path)]
  assert seen == [("adacs", 1), ("adacs", 2), ("adacs", 3)] + [("aepo", s) for s in (1, 2, 3, 4)]
  assert not os.path.exists(tmp_path / "metrics.jsonl.tmp")


def test_a_line_torn_by_a_kill_is_removed(tmp_path):
  write(tmp_path, "aepo", 0, [1, 2])
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"stage": "aepo", "step": 3, "lo')
  write(tmp_path, "aepo", 2, [3])
  assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_log_with_nothing_to_cut_is_not_rewritten(tmp_path):
  write(tmp_path, "aepo", 0, [1, 2])
  before = os.stat(tmp_path / "metrics.jsonl").st_ino
  write(tmp_path, "aepo", 2, [])
  assert os.stat(tmp_path / "metrics.jsonl").st_ino == before
  write(tmp_path, "aepo", 1, [])
  assert os.stat(tmp_path / "metrics.jsonl").st_ino != before  # replaced, not edited in place


def test_a_foreign_line_is_an_error_and_the_file_is_left_alone(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"stage": "aepo", "step": 9}\nhello\n')
  with pytest.raises(ValueError, match="metrics.jsonl line 2 is not an object with stage and step"):
    metrics.MetricWriter(str(tmp_path), "aepo", step=0)
  assert (tmp_path / "metrics.jsonl").read_text() == '{"stage": "aepo", "step": 9}\nhello\n'


def test_refuses_arrays_and_reserved_names(tmp_path):
  with metrics.MetricWriter(str(tmp_path), "aepo", step=0) as writer:
    with pytest.raises(ValueError, match=r"'lambda' has shape \(3,\)"):
      writer.write_scalars(1, {"lambda": np.zeros(3)})
    with pytest.raises(ValueError, match="cannot be called 'step'"):
      writer.write_scalars(1, {"step": 3})
  assert lines(tmp_path) == []


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  write(tmp_path, "aepo", 0, [1])
  stream = io.StringIO()
  progress = progress_lib.Progress(2, "aepo", stream=stream)
  progress.update(2)
  progress.close()
  assert os.listdir(tmp_path) == [] and stream.getvalue() == ""


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_progress_tells_the_time_left_of_a_resumed_stage():
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


def test_on_a_terminal_it_is_one_line_drawn_over():
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


def test_phases_add_up_and_start_anew():
  clock = Clock()
  timer = profiler.PhaseTimer(clock)
  for seconds in (1.0, 2.0):
    with timer("rollout"):
      clock.now += seconds
  with timer("grading"):
    clock.now += 0.5
  assert timer.take() == {"seconds/rollout": 3.0, "seconds/grading": 0.5}
  with timer("rollout"):
    clock.now += 4.0
  assert timer.take() == {"seconds/rollout": 4.0}


def test_devices_are_idle_where_no_work_of_a_step_is_on_them():
  clock = Clock()
  timer = profiler.PhaseTimer(clock)
  with timer("step"):
    clock.now += 1.0
    for seconds in (2.0, 1.0):
      with timer("rollout"), timer("device"):
        clock.now += seconds
  assert timer.take()["device/idle"] == 0.25
  with timer("step"):
    clock.now += 1.0
  assert "device/idle" not in timer.take()  # nothing was measured
