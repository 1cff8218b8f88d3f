"""A run's pulse: it beats where nothing is half done; there a run stops when it is asked to.

Whatever lasts long calls `beat` now and then: every step, every chunk of decoding, every graded
formula. SIGINT and SIGTERM ask for a stop, the next beat raises `Stopped`; a second signal ends the
process at once, also while the device keeps the main thread waiting. A process whose pulse stays
away too long writes its stacks and ends.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Of the process, as its signal handlers are.
_asked = threading.Event()
_listening = threading.Event()
_unwatched = threading.Event()
_beats = {"last": 0.0}  # time.monotonic
# Of a run of several processes: whether any of them says yes; whether all know of a stop.
_agreement = {"any": None, "reached": False}


class StopRequested(KeyboardInterrupt):
  """A stop was asked for; nothing is half done."""


def agree_with(any_of):
  """Several processes stop together: `any_of` says whether a flag is true on any of them.

  All call it at the same point. None: this process is alone.
  """
  _agreement.update(any=any_of, reached=False)


def all_stop():
  """Whether all processes of the run know that it stops."""
  return _agreement["reached"]


def heartbeat(*, common=False):
  """Says that the run is alive; raises Stopped when it was asked to stop.

  Args:
    common: whether all processes of the run come to this point. Several stop at no other.
  """
  _beats["last"] = time.monotonic()
  if (common or _agreement["any"] is None) and stop_requested():
    raise StopRequested


def stop_requested():
  """Whether a stop was asked for, of any process of the run; all come to this point."""
  if _agreement["any"] is not None and _agreement["any"](_asked.is_set()):
    _asked.set()
    _agreement["reached"] = True
  return _asked.is_set()


def stop_requested_here():
  """Whether a stop was asked for of this process; the others need not come to this point."""
  return _asked.is_set()


@contextlib.contextmanager
def stop_signals():
  """Takes SIGINT and SIGTERM as requests to stop; inside another `requests` it does nothing."""
  if _listening.is_set():
    yield
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  # Python runs handlers between two steps of the main thread, which may wait minutes for a device:
  # a thread reads the signals' numbers, which arrive in the pipe at once.
  listener = threading.Thread(target=_listen, args=(read,), daemon=True, name="signals")
  before = {number: signal.signal(number, lambda *_: _asked.set()) for number in SIGNALS}
  pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  _listening.set()
  listener.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(pipe)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(write)  # the listener reads its end
    listener.join()
    os.close(read)
    _listening.clear()
    _asked.clear()


def _listen(read):
  told = False  # _asked is no count: the handler in the main thread sets it too
  while number := os.read(read, 1):
    if number[0] not in SIGNALS:
      continue
    if told:
      _tell("ended at once; the run goes on from its last checkpoint")
      os._exit(130)
    told = True
    _asked.set()
    _tell("stopping at the next safe point; once more ends at once")


@contextlib.contextmanager
def watchdog(path, minutes):
  """Ends the process with exit code 1 when no beat comes for `minutes`; its stacks go to `path`."""
  over = threading.Event()
  _beats["last"] = time.monotonic()
  watcher = threading.Thread(target=_watch, args=(over, path, 60 * minutes), daemon=True,
                             name="watch")
  watcher.start()
  try:
    yield
  finally:
    over.set()
    watcher.join()


@contextlib.contextmanager
def without_watchdog():
  """What lasts as long as it likes and cannot beat, as a user's function: no `watch` ends it."""
  _unwatched.set()
  try:
    yield
  finally:
    _beats["last"] = time.monotonic()
    _unwatched.clear()


def _watch(over, path, seconds):
  while not over.wait(min(10.0, seconds / 4)):
    # Read in this order: leaving `unwatched` beats first.
    unwatched, quiet = _unwatched.is_set(), time.monotonic() - _beats["last"]
    if unwatched or quiet < seconds:
      continue
    _tell(f"nothing has happened for {quiet:.0f} s (stall_minutes): ended; stacks in {path}")
    # Where the folder is gone there is no file, but an end there must be.
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
      file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: no pulse for {quiet:.0f} s\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
    os._exit(1)


def _tell(text):
  # Past sys.stderr, whose lock the main thread may hold; whoever read it may be gone.
  with contextlib.suppress(OSError):
    os.write(2, f"\n{text}\n".encode())
