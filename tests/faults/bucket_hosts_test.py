"""Processes without a common disk form one run in a bucket."""

import os
import time

import jax
import pytest
from faults import hosts

from ares_jax.run import lock
from ares_jax.system import mesh

pytestmark = pytest.mark.slow

LONG = pytest.mark.skipif("ARES_LONG" not in os.environ, reason="minutes more; set ARES_LONG=1")


@pytest.fixture
def killed(tmp_path):
  """Starts a script on 2 x 2 in a bucket and kills it when there is a `file` in `folder`."""
  started = []

  def run_and_kill(words, folder, file):
    folder.mkdir(parents=True, exist_ok=True)
    started[:] = hosts.start([hosts.HERE, *words], tmp_path / "killed", 2, 2)
    while not (folder / file).exists():
      assert all(process.poll() is None for process in started), hosts.log(tmp_path / "killed", 0)
      time.sleep(0.05)
    end()

  def end():
    for process in started:
      process.kill()
      process.wait()

  yield run_and_kill
  end()


def run_toy(address, steps, name):
  """The toy run on 2 x 2, to its end."""
  started = hosts.start([hosts.HERE, "--toy", address, steps], name, 2, 2)
  assert [process.wait(timeout=300) for process in started] == [0, 0], hosts.log(name, 0)


def test_a_killed_run_of_two_processes_goes_on_and_any_layout_resumes_it(
    tmp_path, gcs, gcs_server, killed):
  folder = gcs_server.folder / gcs.removeprefix("gs://")
  run_toy(gcs, "2", tmp_path / "begun")
  killed(["--toy", gcs, "500"], folder, "toy/4/commit_success.txt")
  run_toy(gcs, "12", tmp_path / "again")
  first = hosts.log(tmp_path / "again", 0).partition("step ")[2].split()[0]
  assert int(first) >= 4  # it did not begin anew
  assert (folder / "toy/12/commit_success.txt").exists()
  assert (folder / "lock").read_text() == ""
  assert len((folder / "metrics.jsonl").read_text().splitlines()) == 12
  with jax.set_mesh(mesh.make_mesh(-1, 1)):  # 4 devices of this process
    with lock.one_run(gcs) as here:
      gone_on = hosts.toy_stage(here, 15)
    assert hosts.toy_stage(str(tmp_path / "alone"), 15) == gone_on


@LONG
def test_two_processes_train_in_a_bucket_as_on_a_disk_though_they_are_killed(
    tmp_path, gcs, gcs_server, killed):
  wanted = hosts.run(tmp_path / "disk", 2, 2, 3)
  folder = gcs_server.folder / gcs.removeprefix("gs://")
  killed(["--child", gcs, "3"], folder, "aepo/1/commit_success.txt")
  assert (hosts.run(folder, 2, 2, 3, address=gcs) == wanted).all()
  for step in (1, 2, 3):
    assert hosts.samples(folder, step) == hosts.samples(tmp_path / "disk", step)
