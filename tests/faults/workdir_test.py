"""A run whose disk is full, read-only or gone ends with one clear error and keeps its checkpoint.

It leaves no temporary files, and the same command resumes it when the disk works again.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
import types

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from tensorboardX.event_file_writer import EventsWriter

from ares_jax.run import config, identity, lock, loop, metrics

# A save that fails leaves Orbax's own threads and files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIZE = 3 << 20  # of the disk; a checkpoint of this run takes about 0.4 MiB of it


@flax.struct.dataclass
class State:
  step: jax.Array
  weights: jax.Array


@pytest.fixture
def disk(tmp_path):
  """A small file system for the test, if this user may mount one."""
  folder = tmp_path / "disk"
  folder.mkdir()
  if shutil.which("mount") is None or subprocess.run(
      ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder],
      capture_output=True).returncode:
    pytest.skip("needs the right to mount a file system")
  yield folder
  subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
  """Removes the pauses between retries; returns a list of functions, called one a pause."""
  events = []
  monkeypatch.setattr(loop, "_RETRY_PAUSES", (0, 0))
  monkeypatch.setattr(loop, "time", types.SimpleNamespace(
    sleep=lambda _: events and events.pop(0)()))
  return events


def run(workdir, *, steps=6, at=None, event=None):
  """A run of 6 steps that saves after each; `event` happens after step `at`."""
  def begin(state):
    def step(state):
      if int(state.step) == at:
        event()
      # Logged before the update, as responses are.
      with open(os.path.join(workdir, "rollouts.jsonl"), "a") as file:
        file.write(json.dumps({"stage": "stage", "step": int(state.step) + 1}) + "\n")
      return State(state.step + 1, state.weights + state.step), {"sum": state.step}, ""

    metrics.truncate_lines(os.path.join(workdir, "rollouts.jsonl"), "stage", int(state.step))
    return step

  state = State(jnp.int32(0), jax.random.normal(jax.random.key(0), (300, 300)))
  return loop.run_stage("stage", state, begin, steps=steps, workdir=str(workdir),
                        config=config.LoopConfig(1, 1, False, 2))


def fill(folder, left=0):
  """Function that fills the disk up to `left` bytes, when no save is running."""
  def event():
    while (folder / "run").exists() and os.listdir(folder / "run" / "stage") != ["3"]:
      time.sleep(0.01)
    stat = os.statvfs(folder)
    with open(folder / "filler", "wb") as file:
      file.write(bytes(stat.f_bavail * stat.f_frsize - left))

  return event


def assert_resumes_to_the_end(workdir, alone):
  """The run resumes and ends like an uninterrupted one, without temporary files."""
  assert (run(workdir).weights == alone.weights).all()
  assert sorted(os.listdir(workdir)) == ["metrics.jsonl", "rollouts.jsonl", "stage", "tensorboard"]
  assert os.listdir(workdir / "stage") == ["6"]
  for name in ("metrics.jsonl", "rollouts.jsonl"):
    assert [json.loads(line)["step"] for line in (workdir / name).read_text().splitlines()] == [
      1, 2, 3, 4, 5, 6], name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return run(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("left", [0, 8192, 200_000])
def test_a_full_disk_ends_the_run_with_its_checkpoint_intact(disk, alone, left, caplog):
  workdir = disk / "run"
  # In the last block of a log, in a log, or in a checkpoint: wherever the disk ends.
  with pytest.raises(OSError, match="No space left|RESOURCE_EXHAUSTED|StatusCode|Error writing"):
    run(workdir, at=3, event=fill(disk, left))
  # A line or two before the error: what is tried again, and no stack.
  assert len(caplog.records) <= 3 and not any(one.exc_info for one in caplog.records)
  saved = [name for name in os.listdir(workdir / "stage") if name.isdigit()]
  assert saved and set(saved) <= {"2", "3"}
  os.remove(disk / "filler")
  assert_resumes_to_the_end(workdir, alone)


def test_a_run_waits_for_a_disk_that_is_full_for_a_while(disk, alone, pauses):
  workdir = disk / "run"
  pauses.append(lambda: None)
  pauses.append(lambda: os.remove(disk / "filler"))
  assert (run(workdir, at=3, event=fill(disk, 200_000)).weights == alone.weights).all()
  assert not pauses
  assert_resumes_to_the_end(workdir, alone)


def test_a_disk_that_turns_read_only_ends_the_run(disk, alone):
  workdir, turn = disk / "run", lambda how: subprocess.run(
    ["mount", "-o", f"remount,{how}", disk], check=True)

  def refuse():  # a disk does not turn read-only while a file is open for writing
    raise OSError(30, "Read-only file system")

  with pytest.raises(OSError, match="Read-only file system; stage is saved at step 3 of 6"):
    run(workdir, at=3, event=refuse)
  kept = os.listdir(workdir / "stage")
  turn("ro")
  with pytest.raises(OSError, match="Read-only file system"):
    with lock.lock(str(workdir)):
      pass
  with pytest.raises(OSError, match="Read-only file system"):
    run(workdir)
  with pytest.raises(OSError, match="Read-only file system"):
    identity.keep_records(str(disk / "new"), {"config.json": {}})
  assert os.listdir(workdir / "stage") == kept
  turn("rw")
  assert_resumes_to_the_end(workdir, alone)


def test_a_run_whose_folder_vanishes_ends_and_resumes_when_it_is_back(tmp_path, alone):
  workdir, aside = tmp_path / "run", tmp_path / "aside"
  # The last two are Orbax's, when the folder goes between two of its files.
  missing = "run/.*(No such file|NOT_FOUND|No ArrayMetadata|are missing .zarray)|No such file.*run/"
  with pytest.raises(OSError, match=missing):
    run(workdir, at=3, event=lambda: workdir.rename(aside))
  # Orbax may make the path of a save in flight anew; the run writes nothing there.
  assert not (workdir / "metrics.jsonl").exists()
  while aside.exists():
    shutil.rmtree(workdir, ignore_errors=True)
    with contextlib.suppress(OSError):  # what of that save still runs may write once more
      aside.rename(workdir)
  assert_resumes_to_the_end(workdir, alone)


def test_a_log_that_cannot_be_written_ends_the_run_unless_a_retry_succeeds(tmp_path, alone, pauses,
                                                                      monkeypatch):
  append, left = metrics.MetricWriter._append, [9]

  def fail(self, line):
    if b'"step": 4,' in line and left[0]:
      left[0] -= 1
      raise OSError(5, "Input/output error")
    append(self, line)

  monkeypatch.setattr(metrics.MetricWriter, "_append", fail)
  with pytest.raises(OSError, match="step 4 of stage cannot be logged: .*Input/output error"):
    run(tmp_path)
  assert os.listdir(tmp_path / "stage") == ["3"] and left[0] == 6
  left[0] = 2
  assert_resumes_to_the_end(tmp_path, alone)


def test_a_line_that_does_not_fit_on_the_disk_is_removed(disk):
  with metrics.MetricWriter(str(disk), "aepo", step=0) as writer:
    writer.write_scalars(1, {"loss": 1.0})
    fill(disk)()
    with pytest.raises(OSError, match="No space left"):
      writer.write_scalars(2, {f"a long name {number}": 0.5 for number in range(1000)})
    os.remove(disk / "filler")
    writer.write_scalars(2, {"loss": 0.5})
  assert [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()] \
    == [1, 2]


def test_a_failing_tensorboard_file_does_not_stop_the_run(tmp_path, alone, monkeypatch):
  def fail(self, event):
    raise OSError(28, "No space left on device")

  begun = []
  monkeypatch.setattr(EventsWriter, "_write_serialized_event",
                      lambda self, event: fail(self, event) if begun else None)
  assert (run(tmp_path, at=1, event=lambda: begun.append(1), steps=6).weights
          == alone.weights).all()
  monkeypatch.undo()
  assert_resumes_to_the_end(tmp_path, alone)
