"""Several processes on this machine train like one, and end together when one is lost."""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import signal
import time

import jax
import pytest

from ares_jax.system import mesh

pytestmark = pytest.mark.slow

PATH = pathlib.Path(__file__).parent / "hosts.py"


def load(path):
  spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


script = load(PATH)
host_share = load(PATH.parent.parent / "bench" / "host_share.py")


LONG = pytest.mark.skipif("ARES_LONG" not in os.environ, reason="a minute more; set ARES_LONG=1")


@pytest.fixture
def begin(tmp_path):
  """Starts processes and waits until process 0 has printed `said`; kills them after the test."""
  started = []

  def start(*words, said="", numbers=None, each=None):
    started[:] = script.start([PATH, *words], tmp_path / "run", 2, 1, each=each, numbers=numbers)
    while said and said not in script.log(tmp_path / "run", 0):
      assert all(process.poll() is None for process in started)
      time.sleep(0.1)
    return started

  yield start
  for process in started:
    process.kill()
    process.wait()


# Both stages, evaluated. Five problems are not divided by two devices; the filter draws a
# second batch, and there are two minibatches, so prompts move between the processes.
WHOLE = {"adacs__steps": 1, "curate__samples": 2, "aepo__prompts": 8,
         "aepo__filter__batches": 2, "evaluate__batch": 5, "evaluate__samples": 1}


def test_two_processes_hold_a_half_each_and_train_as_one_with_two_devices(tmp_path):
  one, two = (written(tmp_path / name, processes, devices)
              for name, processes, devices in (("one", 1, 2), ("two", 2, 1)))
  assert one == two
  _, metrics, texts, images = one
  assert [line["step"] for line in metrics] == [1, 1, 2] and len(images) > 10
  assert metrics[-1]["rollout/batches"] == 2 and metrics[-1]["update/grad_norm"] > 0
  assert texts.keys() >= {"rollouts.jsonl", "results.json", "aepo.jsonl", "curation.jsonl"}
  assert len(texts["rollouts.jsonl"].splitlines()) == 32


def written(folder, processes, devices):
  """The weights of a run, and what it has written: metrics, texts, names of images."""
  weights = script.run(folder, processes, devices, 2, changes=WHOLE)
  timed = ("seconds/", "device/", "speed/", "memory/")
  metrics = [{name: value for name, value in json.loads(line).items()
              if not name.startswith(timed)}
             for line in (folder / "metrics.jsonl").read_text().splitlines()]
  texts = {path.name: re.sub('"seconds": {[^}]*}', "", path.read_text()) for path in [
    *folder.glob("held_out/*"),
    *(folder / name for name in ("rollouts.jsonl", "results.json", "curation.jsonl"))]}
  return (weights.tobytes(), metrics, texts,
          sorted(path.name for path in folder.glob("images/*")))


def test_one_two_and_four_processes_put_the_same_batch_on_the_devices(tmp_path):
  host_share.write_images(tmp_path, 8)
  options = argparse.Namespace(prompts=8, devices=4)
  found = [host_share.layout(str(tmp_path), options, count) for count in (1, 2, 4)]
  assert len({digest for processes in found for *_, digest in processes}) == 1
  assert [processes[0][0] * len(processes) for processes in found] == [found[0][0][0]] * 3


@pytest.mark.parametrize("processes, devices, model", [(2, 2, 1), (4, 1, 2)])
def test_rows_and_records_come_to_the_processes_that_hold_them(tmp_path, processes, devices, model):
  for process in script.start([PATH, "--shared", model, tmp_path / "dump"], tmp_path / "run",
                              processes, devices):
    assert process.wait(timeout=300) == 0


def test_a_reward_function_that_compares_a_group_sees_all_of_it_on_each_process(tmp_path):
  reward = f"{PATH.parent.parent}/grading/rewards/ours.py:ranks"
  two = script.run(tmp_path / "two", 2, 1, 1, reward=reward)
  assert (script.run(tmp_path / "one", 1, 2, 1, reward=reward) == two).all()
  one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text())
              for name in ("one", "two"))
  assert one["component/ranks"] == two["component/ranks"] > 0


def test_a_stop_of_one_saves_the_same_step_on_all_and_any_layout_resumes(tmp_path, begin):
  started = begin("--toy", tmp_path / "toy", "500", said="step 3 ")
  started[1].send_signal(signal.SIGTERM)
  assert [process.wait(timeout=300) for process in started] == [1, 1]  # KeyboardInterrupt, no shell
  saved = [re.search(r"toy is saved at step (\d+) of 500", script.log(tmp_path / "run", number))[1]
           for number in range(2)]
  assert saved[0] == saved[1] and int(saved[0]) >= 3
  steps = int(saved[0]) + 3
  with jax.set_mesh(mesh.make_mesh(-1, 1)):  # 4 devices of this process
    gone_on = script.toy_stage(str(tmp_path / "toy"), steps)
    assert script.toy_stage(str(tmp_path / "alone"), steps) == gone_on


def test_answers_are_graded_by_workers_and_not_as_wrong_after_a_stop(tmp_path, begin):
  started = begin("--grading", tmp_path, said="graded [1.0, 1.0, 0.0, 1.0]")
  while not (tmp_path / "worker").exists():
    time.sleep(0.1)
  started[1].send_signal(signal.SIGTERM)
  while "stopping at the next safe point" not in script.log(tmp_path / "run", 1):
    time.sleep(0.1)
  # As a stop of a whole job does.
  os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
  for number, process in enumerate(started):
    assert process.wait(timeout=300) == 1
    assert script.log(tmp_path / "run", number).splitlines()[-1].startswith("stopped: ")


def test_an_error_that_process_0_meets_for_all_saves_the_same_step(tmp_path, begin):
  for number, process in enumerate(begin("--toy", tmp_path / "toy", "500", "0", "process_0")):
    assert process.wait(timeout=300) == 1
    text = script.log(tmp_path / "run", number)
    assert "'no number'; toy is saved at step 3 of 500" in text
    if number == 0:
      assert "saving checkpoint 2" in text and "No space left" in text  # as process 1 has said
  assert os.listdir(tmp_path / "toy" / "toy") == ["3"]


def test_an_error_of_one_process_alone_ends_all_with_its_text(tmp_path, begin):
  started = begin("--toy", tmp_path / "toy", "500", "0", "alone")
  assert [process.wait(timeout=300) for process in started] == [1, 1]
  assert re.search("error: process 1 on .* ended: a bad row that nobody else sees",
                   script.log(tmp_path / "run", 0))


@pytest.mark.parametrize("victim, number, heartbeat, said", [
  (1, signal.SIGKILL, 15, "process 1 on .* has given no sign for 15 s"),
  pytest.param(0, signal.SIGKILL, 30, "process 0 at 127.0.0.1:.* is gone", marks=LONG),
  pytest.param(0, signal.SIGSTOP, 15, "process 0 at 127.0.0.1:.* has not answered for 15 s",
               marks=LONG),
])
def test_a_lost_process_ends_the_other_with_a_message(tmp_path, begin, victim, number, heartbeat,
                                                   said):
  started = begin("--waiting", "300", heartbeat, said="joined")
  started[victim].send_signal(number)
  assert started[1 - victim].wait(timeout=300) in (os.EX_TEMPFAIL, -signal.SIGABRT)
  assert [line for line in script.log(tmp_path / "run", 1 - victim).splitlines()
          if re.match(f"error: {said}", line)]


def test_processes_with_different_seeds_refuse_each_other(tmp_path, begin):
  for number, process in enumerate(begin("--waiting", "300", "120", each={1: ["1"]})):
    assert process.wait(timeout=300) == 1
    assert "process 1 was started with another config: seed is 1, process 0 has 0" in script.log(
      tmp_path / "run", number)


@LONG
@pytest.mark.parametrize("number, said", [(0, "of 1 at least one has not"),
                                          (1, "finds nobody there, process 0 is missing")])
def test_a_process_that_waits_in_vain_says_so(tmp_path, begin, number, said):
  process, = begin("--waiting", "5", "120", numbers=[number])
  assert process.wait(timeout=300) == os.EX_TEMPFAIL
  text = script.log(tmp_path / "run", number)
  assert "error: after 5 s (hosts.join) not all processes have come to 127.0.0.1" in text
  assert said in text
