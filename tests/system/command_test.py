import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ares_jax.system.command import UsageError, exit_code

COMMAND = '''
"""Trains a little.

Example: python -m little --config=c.py
"""
import time
from absl import flags
from ml_collections import config_flags
from ares_jax.system import command
CONFIG = config_flags.DEFINE_config_file("config", None, "the config file")
KIND = flags.DEFINE_string("kind", "none", "what happens")

def main():
  config = command.require_config(CONFIG.value)
  if KIND.value == "value":
    raise ValueError("rows 3\\n  do not divide")
  if KIND.value == "file":
    open("/nonexistent/x")
  if KIND.value == "bug":
    raise KeyError("bug")
  if KIND.value == "wait":
    print("waiting", flush=True)
    time.sleep(60)
  print(config.to_dict())

if __name__ == "__main__":
  command.run(main)
'''

CONFIG = """
import ml_collections
def get_config():
  return ml_collections.ConfigDict(
      dict(steps=3, rate=0.1, on=True, sizes=(1, 2), names=["a"], aepo=dict(group=8)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("command")
  (path / "little.py").write_text(textwrap.dedent(COMMAND).lstrip())
  (path / "c.py").write_text(CONFIG)
  return path


def start(folder, *words, traceback=False):
  environment = os.environ | {"PYTHONPATH": os.getcwd()}
  environment.pop("ARES_TRACEBACK", None)
  environment |= {"ARES_TRACEBACK": "1"} if traceback else {}
  return subprocess.Popen(
    [sys.executable, "little.py", *words], cwd=folder, env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    # A shell's background job, and what it starts, ignores Ctrl-C.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
  )  # fmt: skip


def call(folder, *words, traceback=False):
  process = start(folder, *words, traceback=traceback)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_flags_override_the_config(folder):
  code, out, err = call(
    folder, "--config=c.py", "--config.steps=5", "--config.aepo.group=4", "--config.sizes=(3,4)",
    "--noconfig.on", "--config.rate", "1", "--config.names[0]=b",
  )  # fmt: skip
  assert (code, err) == (0, "")
  assert out == ("{'aepo': {'group': 4}, 'names': ['b'], 'on': False, 'rate': 1.0, "
                 "'sizes': (3, 4), 'steps': 5}\n")


@pytest.mark.parametrize(
  "words, code, message",
  [
    (["--config=c.py", "--config.stepz=1"], 1, "config.stepz is not in c.py; did you mean 'steps'"),
    (["--config=c.py", "--config.aepo.grup=1"], 1, "config.aepo.grup is not in c.py; did you mean"),
    (["--config=c.py", "--config.steps.a=1"], 1, "config.steps.a is not in c.py"),
    (["--config=c.py", "--config.steps=True"], 1, "wrong type: flag --config.steps=True"),
    (["--config=c.py", "--config.steps=1.5"], 1, "wrong type: flag --config.steps=1.5"),
    (["--config=c.py", "--config.aepo=3"], 1, "wrong type: flag --config.aepo=3"),
    (["--config=c.py", "--config.sizes[0]=3"], 1,
     "config.sizes[0] cannot be set alone: config.sizes is (1, 2); set all of it, --config.sizes="),
    (["--config=c.py", "--config.names[1]=b"], 1, "config.names[1] cannot be set alone"),
    (["--config=c.py", "--config.steps[0]=3"], 1, "config.steps[0] cannot be set alone"),
    (["--config=."], 1, "config file '.' is a folder; give a Python file (.py) in it"),
    (["--config=d.py"], 1, "config file 'd.py' does not exist; did you mean 'c.py'?"),
    (["--config="], 1, "no config given; pass --config=FILE"),
    (["--config=c.py", "--kind=value"], 1, "rows 3 do not divide"),
    (["--config=c.py", "--kind=file"], 1, "No such file or directory: '/nonexistent/x'"),
    ([], 2, "no config given; pass --config=FILE"),
    (["--config.steps=1", "--config=c.py"], 2, "put --config first"),
    (["--config=c.py", "--kin=3"], 2, "Unknown command line flag 'kin'. Did you mean: kind"),
    (["--config=c.py", "stray"], 2, "expected no words besides flags, got stray"),
  ],
)
def test_a_mistake_is_one_line_on_stderr(folder, words, code, message):
  got, out, err = call(folder, *words)
  assert (got, out) == (code, "")
  assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_the_line_says_how_to_get_a_traceback_unless_the_config_is_wrong(folder):
  assert "ARES_TRACEBACK" not in call(folder, "--config=c.py", "--config.stepz=1")[2]
  _, _, err = call(folder, "--config=c.py", "--kind=value")
  assert err == "error: rows 3 do not divide (ARES_TRACEBACK=1 shows where)\n"
  err = call(folder, "--config=c.py", "--kind=value", traceback=True)[2]
  assert err.startswith("Traceback") and err.endswith("\nerror: rows 3 do not divide\n")


def test_a_bug_keeps_its_traceback(folder):
  code, _, err = call(folder, "--config=c.py", "--kind=bug")
  assert code == 1 and "Traceback" in err and "KeyError: 'bug'" in err


@pytest.mark.parametrize("error, code", [
  (ValueError("rows 3 do not divide"), 1), (OSError(28, "No space left on device"), 1),
  (KeyError("bug"), 1), (UsageError("a stray word"), 2), (KeyboardInterrupt(), 130),
  (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), 75),
  (RuntimeError("INTERNAL: Core halted unexpectedly; aepo is saved at step 3 of 9"), 75),
  (ValueError("saving checkpoint 2 failed: UNAVAILABLE: HTTP response code: 503"), 75),
  (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 1),
  (RuntimeError("INVALID_ARGUMENT: Mosaic failed to compile"), 1)])
def test_the_exit_code_says_whether_another_try_may_go_on(error, code):
  assert exit_code(error) == code


def test_help_shows_the_example_and_the_flags(folder):
  code, out, err = call(folder, "--help")
  assert (code, err) == (0, "")
  assert "Example: python -m little --config=c.py" in out and "--kind" in out


def test_ctrl_c_gives_one_line_and_exit_code_130(folder):
  process = start(folder, "--config=c.py", "--kind=wait")
  assert process.stdout.readline() == "waiting\n"
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 130
  assert err == "stopped: run the same command again to continue\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_it_loads_gives_one_line_and_exit_code_130(number):
  # An import that catches the interrupt of a signal, as jaxlib's do.
  code = ("from ares_jax.system import command; command.begin('train')\nimport time\n"
          "try:\n  time.sleep(60)\nexcept BaseException: print('went on')")
  process = subprocess.Popen(
    [sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
  assert process.stderr.readline() == "ares_jax.train: loading ...\n"
  time.sleep(0.1)
  process.send_signal(number)
  assert process.communicate(timeout=20) == (
    "", "stopped: run the same command again to continue\n")
  assert process.returncode == 130


def without_jax(name, *words):
  """The stderr of `python -m ares_jax.NAME` where neither jax nor numpy can be imported."""
  code = (f"import sys; sys.modules['jax'] = sys.modules['numpy'] = None; import runpy; "
          f"runpy.run_module('ares_jax.{name}', run_name='__main__', alter_sys=True)")
  done = subprocess.run([sys.executable, "-c", code, *words], text=True, capture_output=True)
  assert done.returncode
  return done.stderr


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "export", "plan", "report",
                                  "inspect_data", "diagnose", "data.write_tfds"])
def test_the_first_line_comes_before_slow_imports(name):
  first, *others = without_jax(name, "--config=configs/ares_tiny.py").splitlines()
  assert first == f"ares_jax.{name}: loading ..."
  assert "ModuleNotFoundError" in others[-1]


@pytest.mark.parametrize("words, message", [
  ((), "error: no config given; pass --config=FILE, for example configs/ares_tiny.py (--help"),
  (("--config=configs/ares_tony.py",), "error: config file 'configs/ares_tony.py' does not exist;"),
  (("--config.seed=1", "--config=configs/ares_tiny.py"), "error: --config.seed=1 stands before")])
def test_a_missing_config_is_noticed_before_slow_imports(words, message):
  for name in ("train", "plan", "inspect_data"):
    error = without_jax(name, *words)
    assert error.startswith(message) and error.count("\n") == 1
