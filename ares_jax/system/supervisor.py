"""Starts a command again when its process is lost: `--restarts=N`.

A supervisor is a process that does no work and imports no jax. It starts the command as its child
and waits for it. On a run of several hosts each has a supervisor of its own: if a process is lost,
the others notice and end too (cluster.py), all are started again, and the run resumes.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

from absl import flags

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PAUSE = 5.0  # seconds before the first restart; twice that before the second, and so on
_LONGEST_PAUSE = 60.0
_STOPS = (signal.SIGINT, signal.SIGTERM)


def supervise_if_asked(argv=None):
  """Becomes the supervisor of this very command if it has --restarts=N, N > 0; else returns.

  It ends with the command's exit code; 128 + the signal's number if a signal ended the command.
  """
  argv = list(sys.argv if argv is None else argv)
  own = flags.FlagValues()
  own.set_gnu_getopt(True)
  flags.DEFINE_integer("restarts", 0, "", lower_bound=0, flag_values=own)
  try:
    words = own(argv, known_only=True)[1:]
  except flags.Error:
    return  # the command itself reports it
  if own.restarts:
    # What comes before the command's own words: python -m ares_jax.train.
    start = sys.orig_argv[1:len(sys.orig_argv) - len(argv) + 1]
    sys.exit(supervise([sys.executable, *start, *words], own.restarts))


def supervise(command, restarts, pause=_PAUSE):
  """Runs a command, and again each time its process is lost; returns the last exit code.

  A process is lost if a signal such as SIGKILL or SIGABRT ended it, or if it says so by the exit
  code EX_TEMPFAIL (75). Any other exit code is final, and so is a stop. SIGINT and SIGTERM are
  passed on to the command. If the supervisor is killed, the command gets SIGTERM.

  Args:
    command: list of words.
    restarts: how often the command is started again at most.
    pause: seconds before the first restart; later ones wait longer.
  """
  child, stops = None, []

  def pass_on(number, _):
    stops.append(number)
    if child:
      child.send_signal(number)

  before = {number: signal.signal(number, pass_on) for number in _STOPS}
  try:
    for number in range(1, restarts + 2):
      child = subprocess.Popen(command, preexec_fn=_end_with_parent)
      if stops:
        child.send_signal(stops[0])  # it came before there was a child
      code = child.wait()
      if stops or not _is_lost(code):
        return _exit_code(code)
      # Real-time signals have no names.
      name = {each: each.name for each in signal.Signals}.get(-code, f"signal {-code}")
      reason = (f"the process was ended by {name}" if code < 0 else
                "a host or a device was lost, or the run hung")
      if number > restarts:
        _say(f"{reason}; --restarts={restarts} are used up: the same command continues the run")
        return _exit_code(code)
      seconds = min(number * pause, _LONGEST_PAUSE)
      _say(f"restart {number} of {restarts} in {seconds:g} s: {reason}")
      until = time.monotonic() + seconds
      while time.monotonic() < until:
        time.sleep(0.1)
        if stops:
          _say("stopped: run the same command again to continue")
          return 130
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _is_lost(code):
  return code == os.EX_TEMPFAIL or (code < 0 and -code not in _STOPS)


def _exit_code(code):
  """An exit code as a shell shows it."""
  return code if code >= 0 else 128 - code


def _end_with_parent():
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(text):
  print(f"{time.strftime('%F %T')} {text}", file=sys.stderr, flush=True)
