"""Files that a kill or a power cut leaves complete or absent, and the names in older ones."""

import contextlib
import json
import os


@contextlib.contextmanager
def atomic_write(path):
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


def write_text(path, text):
  """Writes a file that is there whole or not at all; a disk that refuses it keeps no part of it."""
  with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.write(text)


def write_json(path, value):
  """`write_text` of a JSON object."""
  write_text(path, json.dumps(value, indent=1) + "\n")


# Names that runs made before version 0.2 wrote, and the names of today.
RENAMED = {"formatted": "format_ok", "thought": "shows_work", "place": "index",
           "reward/formatted": "reward/format_ok",
           "batch/rows/place": "batch/rows/response_index"}
_RENAMED_START = {"fault/": "nonfinite/"}


def current_names(value):
  """A JSON value with the keys of older runs under the names of today."""
  if isinstance(value, list):
    return [current_names(item) for item in value]
  if not isinstance(value, dict):
    return value
  found = {}
  for key, item in value.items():
    key = RENAMED.get(key, key)
    for old, new in _RENAMED_START.items():
      key = new + key.removeprefix(old) if key.startswith(old) else key
    found[key] = current_names(item)
  return found


def read_json(workdir, name):
  """The object in a file of the folder, by `current_names`; {} where there is none."""
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    return {}
  with open(path, encoding="utf-8") as file:
    return current_names(json.load(file))
