"""A file that is there whole or not at all, also after a kill or a power cut."""

import contextlib
import os


@contextlib.contextmanager
def whole(path):
  """Name of a temporary file that becomes `path` when it was written, and goes when it was not."""
  temporary = path + ".tmp"
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())  # a file system may keep the new name and lose what was in the file
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise
