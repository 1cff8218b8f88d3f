"""The supervisor, with commands that fail in their own ways."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ares_jax.system import supervisor

ROOT = pathlib.Path(supervisor.__file__).parents[2]
# Ends the first time as `sys.argv[2]` says, later with the code of `sys.argv[3]`.
CHILD = """
import os, sys
with open(sys.argv[1], "a+") as starts:
  starts.write("x")
  starts.seek(0)
  first = starts.read() == "x"
how = int(sys.argv[2 if first else 3])
os.kill(os.getpid(), -how) if how < 0 else os._exit(how)
"""
LAST = 7  # a final exit code of the second start
CRASHES = {
  -signal.SIGKILL: "the process was ended by SIGKILL",
  -signal.SIGABRT: "the process was ended by SIGABRT",
  -signal.SIGSEGV: "the process was ended by SIGSEGV",
  -signal.SIGALRM: "the process was ended by SIGALRM",
  -40: "the process was ended by signal 40",  # a real-time signal
  os.EX_TEMPFAIL: "a host or a device was lost, or the run hung"}


# Not in the process of the tests, which has jax's threads and cannot safely fork.
SUPERVISOR = """
import sys
from ares_jax.system import supervisor
restarts, pause, *words = sys.argv[1:]
sys.exit(supervisor.supervise([sys.executable, "-c", *words], int(restarts), float(pause)))
"""


def supervise(tmp_path, first, later, restarts=1):
  """(exit code, starts) of a command, and what the supervisor said."""
  words = [str(restarts), "0", CHILD, tmp_path / "starts", str(first), str(later)]
  done = subprocess.run([sys.executable, "-c", SUPERVISOR, *words], cwd=ROOT, text=True,
                        capture_output=True)
  return (done.returncode, len((tmp_path / "starts").read_text())), done.stderr


@pytest.mark.parametrize("first", CRASHES)
def test_a_lost_process_is_started_again(tmp_path, first):
  ended, said = supervise(tmp_path, first, LAST)
  assert ended == (LAST, 2)
  assert said.endswith(f" restart 1 of 1 in 0 s: {CRASHES[first]}\n")


@pytest.mark.parametrize("first", [0, 1, 2, 130, -signal.SIGTERM, -signal.SIGINT])
def test_what_is_finished_refused_or_stopped_is_not_started_again(tmp_path, first):
  ended, said = supervise(tmp_path, first, LAST)
  assert ended == (first if first >= 0 else 128 - first, 1) and "restart" not in said


def test_restarts_end_at_their_number(tmp_path):
  ended, said = supervise(tmp_path, -signal.SIGKILL, -signal.SIGKILL, restarts=2)
  said = said.splitlines()
  assert ended == (137, 3) and len(said) == 3 and said[-1].endswith(
    " the process was ended by SIGKILL; --restarts=2 are used up: the same command continues the "
    "run")


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def begin():
  """Starts a supervisor of a Python program, in a process."""
  started = []

  def start(*words):
    started.append(subprocess.Popen(
      [sys.executable, "-c", SUPERVISOR, "3", "60", *words], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.communicate()


def test_a_stop_is_passed_on_and_ends_without_a_restart(begin):
  process = begin(WAITS)
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 130 and process.stderr.read() == ""


def test_a_stop_between_two_starts_ends_too(begin, tmp_path):
  process = begin(CHILD, str(tmp_path / "starts"), "-9", "0")
  assert "restart 1 of 3 in 60 s: the process was ended by SIGKILL" in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=20) == 130
  assert process.stderr.read().endswith(" stopped: run the same command again to continue\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_command_does_not_outlive_its_supervisor(begin):
  process = begin(WAITS)
  assert process.stdout.readline() == "ready\n"
  process.kill()
  assert process.stdout.read() == ""  # at the end of the command, which holds the pipe


def test_the_flag_starts_the_command_again_without_itself(tmp_path):
  # A config that kills its process once, and is a mistake the second time.
  config = tmp_path / "config.py"
  config.write_text(f"""
import os, signal, sys
if not os.path.exists({str(tmp_path / "seen")!r}):
  open({str(tmp_path / "seen")!r}, "w").write(" ".join(sys.orig_argv[1:]))
  os.kill(os.getpid(), signal.SIGKILL)
raise ValueError("no such model")
""")
  words = ["-m", "ares_jax.train", "--restarts", "2", "--config", config, "--config.seed=3"]
  done = subprocess.run([sys.executable, *words], text=True, capture_output=True, cwd=ROOT)
  assert done.returncode == 1 and done.stderr.count("restart 1 of 2 in 5 s") == 1
  assert done.stderr.count("restart") == 1 and "no such model" in done.stderr.splitlines()[-1]
  assert (tmp_path / "seen").read_text() == f"-m ares_jax.train --config {config} --config.seed=3"


def test_the_supervisor_does_not_take_the_devices():
  code = "from ares_jax.system import supervisor; import sys; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("word", ["--restarts=-1", "--restarts=many"])
def test_a_number_of_restarts_that_is_none_is_left_to_the_command(word):
  assert supervisor.supervise_if_asked(["train", word]) is None
