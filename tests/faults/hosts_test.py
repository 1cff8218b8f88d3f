"""Several processes on this machine: the same run as one, and an end for all when one is lost."""

import importlib.util
import json
import pathlib
import re
import signal
import time

import pytest

PATH = pathlib.Path(__file__).parent / "hosts.py"
spec = importlib.util.spec_from_file_location("hosts_script", PATH)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def waiting(tmp_path):
  """Starts processes that wait for ever; they do not outlive the test."""
  started = []

  def start(count, *, numbers=None, joined=True, each=None):
    started[:] = script.start([PATH, "--waiting", "4"], tmp_path / "run", count, 1, each=each,
                              numbers=numbers)
    while joined and not all("joined" in script.log(tmp_path / "run", number)
                             for number in range(count)):
      assert all(process.poll() is None for process in started)
      time.sleep(0.1)
    return started

  yield start
  for process in started:
    process.kill()
    process.wait()


def test_two_processes_train_as_one_with_two_devices_and_go_on_as_it(tmp_path):
  one = script.run(tmp_path / "one", 1, 2, 2)
  two = script.run(tmp_path / "two", 2, 1, 2)
  assert (one == two).all()
  script.take_up(tmp_path / "two", tmp_path / "taken", 1)
  assert (script.run(tmp_path / "taken", 1, 2, 2) == one).all()
  for step in (1, 2):
    sampled = [script.samples(tmp_path / name, step) for name in ("one", "two", "taken")]
    assert sampled[0] == sampled[1] == sampled[2] and len(sampled[0]) == 8
  lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2]
  assert all(0 < line["reward/accuracy"] < 1 and line["update/grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("victim, number, said", [
  (1, signal.SIGKILL, "process 1 on .* has given no sign for 4 s"),
  (0, signal.SIGKILL, "process 0 at 127.0.0.1:.* is gone"),
  (0, signal.SIGSTOP, "process 0 at 127.0.0.1:.* has not answered for 4 s"),
])
def test_a_lost_process_ends_the_other_with_a_line(tmp_path, waiting, victim, number, said):
  started = waiting(2)
  started[victim].send_signal(number)
  assert started[1 - victim].wait(timeout=300) != 0
  assert [line for line in script.log(tmp_path / "run", 1 - victim).splitlines()
          if re.match(f"error: {said}", line)]


def test_processes_with_different_seeds_refuse_each_other(tmp_path, waiting):
  for number, process in enumerate(waiting(2, joined=False, each={1: ["1"]})):
    assert process.wait(timeout=300) == 1
    assert "process 1 was started with another config: seed is 1, process 0 has 0" in script.log(
      tmp_path / "run", number)


@pytest.mark.parametrize("number, said", [(0, "of 1 at least one has not"),
                                          (1, "finds nobody there, process 0 is missing")])
def test_a_process_that_waits_in_vain_says_so(tmp_path, waiting, number, said):
  process, = waiting(2, joined=False, numbers=[number])
  assert process.wait(timeout=300) == 1
  assert "error: after 5 s (hosts.join) not all processes have come to 127.0.0.1" in (
    text := script.log(tmp_path / "run", number)) and said in text
