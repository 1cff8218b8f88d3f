import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.run import metrics
from ares_jax.run import progress as progress_lib


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


def test_resuming_removes_lines_after_the_checkpoint_and_keeps_other_stages(tmp_path):
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
