"""Runs a command: parses flags, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 a mistake in a config, an input or a file, or a bug, 2 wrong usage, 75 a
host or device was lost or the run hung (EX_TEMPFAIL: the same command may go on), 130 stopped.
"""

import os
import re
import signal
import sys
import traceback

from absl import flags, logging

from ares_jax.system import config as config_lib

# Faults of chips, connections and servers, as jax and tensorstore word them, in errors of several
# classes: a lost peer can be a plain "ValueError: UNKNOWN: Gloo AllGather failed".
_LOST = re.compile(
  r"\b(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")

# What a signal does in Python, unless someone asked for something else.
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class UsageError(config_lib.ConfigError):
  """The command line itself is wrong: an unknown flag, a missing --config, a stray word."""


def begin(name, *, needs_config=False):
  """Prints the first line of the command `python -m ares_jax.NAME`.

  A command calls it before its other imports, which take seconds. With `needs_config` a --config
  that is missing, or names no config file, ends the command here. Until `run`, Ctrl-C and SIGTERM
  end it at once.
  """
  if _asks_for_help(sys.argv):
    return
  # transformers says at its import that PyTorch was not found; nothing here uses PyTorch.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  if needs_config:
    _call_or_exit(lambda: config_lib.load(require_config(_config_words(sys.argv)[0])))
  print(f"ares_jax.{name}: loading ...", file=sys.stderr, flush=True)
  for number, usual in _USUAL.items():
    if signal.getsignal(number) is usual:
      signal.signal(number, _stop_loading)


def run(main, *, positional=(), argv=None, renamed=None):
  """Parses the flags, calls `main(*positional values)` and exits.

  `ValueError` and `OSError` become one line on stderr; with ARES_TRACEBACK=1 in the environment a
  traceback is printed first. Any other exception is a bug: it keeps its traceback.

  `positional` names the arguments that the command needs besides its flags. `argv` is the command
  line, starting with the name of the program; None is `sys.argv`. `renamed` are {old name: new
  name} of settings, for the message about --config.OLD.
  """
  for number, usual in _USUAL.items():
    if signal.getsignal(number) is _stop_loading:
      signal.signal(number, usual)
  argv = list(sys.argv if argv is None else argv)
  if _asks_for_help(argv):
    doc = sys.modules["__main__"].__doc__
    print(f"{doc.strip() if doc else ''}\n\nflags:\n{flags.FLAGS.main_module_help()}")
    sys.exit(0)

  def call():
    words = _parse(argv, positional, renamed or {})
    logging.use_absl_handler()
    main(*words)

  _call_or_exit(call)
  sys.exit(0)


def exit_code(error):
  """The exit code of a command that an exception ended."""
  if isinstance(error, KeyboardInterrupt):
    return 130
  if isinstance(error, UsageError):
    return 2
  return os.EX_TEMPFAIL if _LOST.search(str(error)) else 1


def _stop_loading(number, frame):
  # Not a KeyboardInterrupt: an import may catch it and go on, or turn it into an ImportError.
  os.write(2, b"stopped: run the same command again to continue\n")
  os._exit(130)


def _call_or_exit(call):
  """Calls `call`; an error that is no bug becomes one line on stderr and an exit code."""
  try:
    call()
  except KeyboardInterrupt as stop:
    _exit(f"stopped: {str(stop) or 'run the same command again to continue'}", 130)
  except UsageError as error:
    _exit(f"error: {config_lib.one_line(error)} (--help shows how)", 2)
  except (ValueError, OSError) as error:
    hint = "" if isinstance(error, config_lib.ConfigError) else " (ARES_TRACEBACK=1 shows where)"
    if "ARES_TRACEBACK" in os.environ:
      traceback.print_exc()
      hint = ""
    _exit(f"error: {config_lib.one_line(error)}{hint}", exit_code(error))
  except Exception as error:
    if exit_code(error) == 1:
      raise
    traceback.print_exc()
    sys.exit(exit_code(error))


def require_config(config):
  """Returns `config`, the value of a `config_flags` flag; UsageError when none was given."""
  if config is None:
    raise UsageError("no config given; pass --config=FILE, for example configs/ares_tiny.py")
  return config


def _parse(argv, positional, renamed):
  _check_config(argv, renamed)
  try:
    words = flags.FLAGS(argv)[1:]
  except flags.Error as error:
    message = config_lib.one_line(error)
    # absl words a bad value as `flag --config.steps=x: reason`: the config's fault, not usage.
    if message.startswith("flag --config."):
      raise config_lib.ConfigError(f"wrong type: {message}") from error
    raise UsageError(message) from error
  if len(words) != len(positional):
    expected = " ".join(positional).upper() or "no words"
    raise UsageError(f"expected {expected} besides flags, got {' '.join(words) or 'none'}")
  return words


def _check_config(argv, renamed):
  """Reports missing files and unknown keys of --config in one line; config_flags would not."""
  if "config" not in flags.FLAGS:
    return
  path, keys = _config_words(argv)
  if path is None:
    return
  config = config_lib.load(path)
  for key in keys:
    node, where = config, "config"
    for part in key:
      part, _, index = part.partition("[")
      fields = list(node.keys()) if hasattr(node, "keys") else []
      new = renamed.get(f"{where}.{part}".removeprefix("config."))
      if part not in fields and new:
        raise config_lib.ConfigError(f"{where}.{part} is called config.{new} now; rename it")
      if part not in fields:
        near = config_lib.suggest(part, fields) if fields else ""
        raise config_lib.ConfigError(f"{where}.{part} is not in {path}{near}")
      known = node[part]
      # A tuple has no places that can be set, and config_flags would end in an IndexError.
      places = range(len(known)) if isinstance(known, list) else ()
      if index and index not in {f"{place}]" for place in places}:
        raise config_lib.ConfigError(f"{where}.{part}[{index} cannot be set alone: {where}.{part} "
                                     f"is {known!r}; set all of it, --{where}.{part}=VALUE")
      node, where = known, f"{where}.{part}"


def _config_words(argv):
  """(value of --config or None, [["aepo", "steps"], ...] of the settings that are set)."""
  path, keys = None, []
  words = iter(argv[1:])
  for word in words:
    if word == "--":
      break
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("-"):
      continue
    if name == "config":
      path = value if equals else next(words, "")
    elif name.startswith(("config.", "noconfig.")):
      if path is None:
        raise UsageError(f"{word} stands before --config=FILE; put --config first")
      keys.append(name.split(".")[1:])
  return path, keys


def _asks_for_help(argv):
  return any(word in ("--help", "-h", "-help") for word in argv[1:])


def _exit(message, code):
  print(message, file=sys.stderr, flush=True)
  sys.exit(code)
