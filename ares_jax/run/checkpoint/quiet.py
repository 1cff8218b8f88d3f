"""Keeps Orbax's reports of errors off the screen: whoever saves or reads gets the error itself.

Orbax logs a failed save from each of its threads, with a stack: over 1000 lines for a full disk.
With ARES_TRACEBACK=1 in the environment everything is shown.
"""

import logging
import os
import sys

from absl import logging as absl_logging

_NOT_AWAITED = tuple(f"{what} exception was never retrieved" for what in ("Task", "Future"))


def silence_orbax():
  """Drops errors that Orbax logs, and those of its tasks that nobody awaits any more."""
  if "ARES_TRACEBACK" not in os.environ:
    absl_logging.get_absl_logger().addFilter(_is_no_orbax_error)
    logging.getLogger("asyncio").addFilter(_is_awaited)
    sys.unraisablehook = _unraisable


def _is_no_orbax_error(record):
  return record.levelno < logging.ERROR or "/orbax/" not in record.pathname


def _is_awaited(record):
  return not record.getMessage().startswith(_NOT_AWAITED)


def _unraisable(event, *, default=sys.unraisablehook):
  code = getattr(event.object, "cr_code", None)
  if code is None or "/orbax/" not in code.co_filename:
    default(event)
