"""Graceful shutdown and the watchdog.

Long work calls `heartbeat()` where it is safe to stop: every step, every chunk of decoding, every
graded formula. SIGINT and SIGTERM request a stop, and the next heartbeat raises `StopRequested`. A
second signal ends the process at once. `watchdog` ends a process that has hung, with the exit code
EX_TEMPFAIL: the same command may go on.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
import types

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TWICE = 0.5  # seconds in which a terminal and a supervisor may send the same signal
_KEEP = 60.0  # seconds for what is done before the watchdog ends the process

# State of the process, like its signal handlers.
_stop = threading.Event()  # a stop was requested
_listening = threading.Event()  # inside `stop_signals`
_paused = threading.Event()  # inside `without_watchdog`
# last_heartbeat is time.monotonic(); for the others see `stop_together` and `stop_agreed`.
_process = types.SimpleNamespace(last_heartbeat=0.0, any_process=None, stop_agreed=False,
                                 stops="at the next safe point")


class StopRequested(KeyboardInterrupt):
  """A stop was requested; raised where it is safe to stop."""


def stop_together(any_process):
  """Makes the processes of a run stop together, by `hosts.any_process`; None ends this."""
  _process.any_process, _process.stop_agreed = any_process, False


def stop_agreed():
  """Whether all processes of the run know that it stops."""
  return _process.stop_agreed


def heartbeat(*, collective=False):
  """Tells the watchdog that the run makes progress; raises StopRequested after a stop request.

  A run of several processes stops only at a `collective` heartbeat, which all of them make.
  """
  _process.last_heartbeat = time.monotonic()
  if (collective or _process.any_process is None) and stop_requested():
    raise StopRequested


def stop_requested():
  """Whether any process of the run was requested to stop; a collective call."""
  if _process.any_process is not None and _process.any_process(_stop.is_set()):
    _stop.set()
    _process.stop_agreed = True
  return _stop.is_set()


def local_stop_requested():
  """Whether this process was requested to stop; not a collective call."""
  return _stop.is_set()


@contextlib.contextmanager
def stops_when(event):
  """Names what a stop that is requested inside waits for, e.g. "decode is compiled"."""
  before, _process.stops = _process.stops, f"when {event}"
  try:
    yield
  finally:
    _process.stops = before


@contextlib.contextmanager
def stop_signals():
  """Takes SIGINT and SIGTERM as stop requests; nested in itself it does nothing."""
  if _listening.is_set():
    yield
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  # Python calls signal handlers in the main thread, which may wait minutes for a device. The wakeup
  # pipe receives a signal's number at once, and a thread reads it.
  listener = threading.Thread(target=_listen, args=(read,), daemon=True, name="signals")
  before = {number: signal.signal(number, lambda *_: _stop.set()) for number in SIGNALS}
  old_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  _listening.set()
  listener.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(old_pipe)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(write)  # ends the listener
    listener.join()
    os.close(read)
    _listening.clear()
    _stop.clear()


def _listen(read):
  told = 0.0  # when; not _stop, which the handler in the main thread sets for the same signal
  while number := os.read(read, 1):
    if number[0] not in SIGNALS or time.monotonic() - told < _TWICE:
      continue
    if told:
      _print("ended at once; the run goes on from its last checkpoint")
      os._exit(130)
    told = time.monotonic()
    _stop.set()
    _print(f"stopping {_process.stops}; once more ends at once")


@contextlib.contextmanager
def watchdog(path, minutes, keep=lambda: None):
  """Ends the process after `minutes` without a heartbeat; stacks go to `path`.

  `keep` is called then, for at most a minute: it brings `path` to where it outlives the machine.
  """
  _process.last_heartbeat = time.monotonic()
  try:
    with meanwhile(_watch, path, 60 * minutes, keep, name="watchdog"):
      yield
  finally:
    _disarm()


@contextlib.contextmanager
def meanwhile(call, *arguments, name):
  """Runs `call(over, *arguments)` in a thread, and at the end sets the Event `over` and waits."""
  over = threading.Event()
  thread = threading.Thread(target=call, args=(over, *arguments), daemon=True, name=name)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


@contextlib.contextmanager
def without_watchdog():
  """Pauses the watchdog around a call that may take long without a heartbeat."""
  _paused.set()
  _disarm()
  try:
    yield
  finally:
    _process.last_heartbeat = time.monotonic()
    _paused.clear()


def _watch(over, path, seconds, keep=lambda: None):
  """The watchdog's thread.

  Timers of the system cover the case in which this thread does not run: C code that hangs while it
  holds Python's global lock. They print no message; faulthandler's stacks go to stderr.
  """
  pause = min(10.0, seconds / 4)
  while not over.wait(pause):
    # Read in this order: `without_watchdog` sets the heartbeat before it clears the pause.
    paused, quiet = _paused.is_set(), time.monotonic() - _process.last_heartbeat
    if paused:
      _disarm()
      continue
    if quiet < seconds:
      # The system's timer takes no endless time: a year stands for it.
      later = min(seconds - quiet + 2 * pause, 3e7)
      faulthandler.dump_traceback_later(later, file=2)
      signal.setitimer(signal.ITIMER_REAL, later + 1)  # SIGALRM ends the process
      if _paused.is_set():  # since it was read above
        _disarm()
      continue
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 2 * _KEEP)
    _print(f"nothing has happened for {quiet:.0f} s (stall_minutes): ended; stacks in {path}")
    # The process ends even if the run's folder is gone.
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
      print(f"{time.strftime('%F %T')}: no heartbeat for {quiet:.0f} s", file=file, flush=True)
      faulthandler.dump_traceback(file, all_threads=True)
    keeping = threading.Thread(target=keep, daemon=True)
    keeping.start()
    keeping.join(_KEEP)
    os._exit(os.EX_TEMPFAIL)


def _disarm():
  faulthandler.cancel_dump_traceback_later()
  signal.setitimer(signal.ITIMER_REAL, 0)


def _print(text):
  # Not through sys.stderr, whose lock the main thread may hold; its reader may be gone.
  with contextlib.suppress(OSError):
    os.write(2, f"\n{text}\n".encode())
