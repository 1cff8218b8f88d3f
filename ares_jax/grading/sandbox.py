"""Worker processes for graders, with limits of time and memory and an empty environment."""

import contextlib
import ctypes
import importlib
import importlib.util
import multiprocessing.forkserver
import os
import pathlib
import resource
import signal
import sys
import threading

import numpy as np
import pebble

_MEMORY = 2 << 30  # bytes of address space of a worker
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
SEARCHED = 20_000  # last characters of a response searched for the box


def make_pool(workers, *modules):
  """A pebble.ProcessPool whose workers import neither jax nor the program that made it.

  They are forked from a server that has imported the `modules` of these names, so a worker that was
  ended is replaced in milliseconds: importing math-verify takes 6 to 9 s on a busy machine. A
  module may be a file, "FOLDER/NAME.py", which every worker imports itself.
  """
  context = _Context()
  # Where the server runs already, workers import the modules themselves.
  context.set_forkserver_preload(
    ["ares_jax.grading.pool", *(name for name in modules if not name.endswith(".py"))])
  return pebble.ProcessPool(max_workers=workers, initializer=_prepare, initargs=modules,
                            context=context)


class Workers(contextlib.AbstractContextManager):
  """Holds a pool of `make_pool` that a subclass starts when it is needed; a context manager."""

  _pool = None

  def __exit__(self, *exc):
    self.close()

  def close(self):
    """Ends the workers."""
    if self._pool is not None:
      self._pool.stop()
      self._pool.join()
      self._pool = None


def load_function(name, kind):
  """The user's function "package.module:function" or "FILE.py:function"; ValueError without one.

  `kind`, "grader", "judge" or "reward function", is for errors.
  """
  module, _, attribute = name.rpartition(":")
  if not module or not attribute:
    built_in = "neither 'layered' nor 'release' nor" if kind == "grader" else "not"
    raise ValueError(f"{kind} {name!r} is {built_in} of the form 'package.module:function' or "
                     "'FILE.py:function'")
  try:
    found = getattr(import_module(module), attribute)
  except BaseException as error:  # sys.exit() and KeyboardInterrupt too: it is the user's module
    raise ValueError(f"{kind} {name!r} does not load: {describe(error)}") from error
  if not callable(found):
    raise ValueError(f"{kind} {name!r} is {type(found).__name__}, not a function")
  return found


def import_module(name):
  """The module "package.module", or that of a file "FOLDER/NAME.py", which is read once."""
  if not name.endswith(".py"):
    return importlib.import_module(name)
  path = os.path.abspath(name)
  if path not in sys.modules:
    # Under its path, so that files of one name in two folders are two modules.
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    try:
      spec.loader.exec_module(module)
    except BaseException:
      del sys.modules[path]
      raise
  return sys.modules[path]


def call_grader(name, response, truth):
  """The verdict of the user's grader on a response, 0 or 1, or a text that says how it failed."""
  try:
    value = load_function(name, "grader")(response, truth)
    verdict = zero_or_one(value)
    return f"returns {value!r}"[:300] + ", neither 0 nor 1" if verdict is None else verdict
  except MemoryError:
    raise
  except BaseException as error:  # sys.exit() too; a signal ends a worker without an exception
    return f"raises {describe(error)}"


def describe(error):
  """ "KeyError: 'x'": the type and the message of an exception, in at most 300 characters."""
  try:
    return f"{type(error).__name__}: {error}"[:300]
  except BaseException:  # a class of the user's, with an own __str__
    return type(error).__name__


def zero_or_one(value):
  """0.0 or 1.0 where a user's function returned False, True, 0 or 1, numpy's too; else None."""
  right = isinstance(value, bool | int | float | np.bool_ | np.number) and value in (0, 1)
  return float(value) if right else None


def release_grader(response, truths):
  """The verdict of the release's grader (mathruler) on a response."""
  from mathruler.grader import extract_boxed_content, grade_answer

  answer = extract_boxed_content(response[-SEARCHED:])
  try:
    return any(bool(grade_answer(answer, accepted)) for accepted in truths)
  except (MemoryError, RecursionError):
    raise MemoryError from None
  except Exception:
    return False


def has_release_grader():
  """Whether the release's grader is installed, with what it imports."""
  try:
    importlib.import_module("mathruler.grader")
  except ImportError:
    return False
  return True


def _prepare(*modules):
  # A worker in an endless formula must not outlive a killed trainer: the server ends with the last
  # process that holds this end of a pipe, and a worker with the server.
  os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  for module in modules:
    import_module(module)
  os.environ.clear()
  _wipe_environment()
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wipe_environment():
  """Zeroes /proc/self/environ, which shows the environment that the process started with."""
  stat = pathlib.Path("/proc/self/stat")
  if not stat.exists():
    return
  fields = stat.read_text().rpartition(")")[2].split()  # from field 3 on; see proc(5)
  start, end = int(fields[47]), int(fields[48])
  if 0 < start < end:
    ctypes.memset(start, 0, end - start)


class _Process(multiprocessing.context.ForkServerProcess):
  """A process that does not import the parent's `__main__` (train.py, and with it jax)."""

  _lock = threading.Lock()

  def start(self):
    main = sys.modules["__main__"]
    with self._lock, contextlib.ExitStack() as stack:
      hidden = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
      # multiprocessing finds the main module by these two; without them it imports none.
      stack.callback(vars(main).update, hidden)
      main.__spec__ = None
      vars(main).pop("__file__", None)
      super().start()


class _Context(multiprocessing.context.ForkServerContext):
  Process = _Process
