"""Files in the folder of a run: atomic writes, dumped batches, names that older runs used."""

import collections
import contextlib
import glob
import json
import os
import re
import zipfile

import jax
import numpy as np
from absl import logging
from etils import epath

from ares_jax.run.checkpoint.digest import flatten
from ares_jax.system import shares
from ares_jax.system.gcs import bucket_errors

_BATCHES = 3  # dumped batches kept


@contextlib.contextmanager
def atomic_write(path):
  """Context of a temporary file's name: the file becomes `path` at the end, or is removed.

  After a kill or a power cut `path` is the old file or the new one, and complete.
  """
  temporary = path + ".tmp"
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())  # a file system may keep the new name and lose the content
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise


def write_text(path, text):
  """Writes a text file by `atomic_write`; after an error the old file is still there."""
  with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
    file.write(text)


def write_json(path, value):
  """`write_text` of a JSON object."""
  write_text(path, json.dumps(value, indent=1) + "\n")


# Names that runs made before version 0.2 wrote, and the names of today.
_RENAMED = {"formatted": "format_ok", "thought": "shows_work", "place": "index",
            "reward/formatted": "reward/format_ok",
            "batch/rows/place": "batch/rows/response_index", "batch/formatted": "batch/format_ok"}
_OF_DATA = {"source", "level", "by_source", "by_level", "units", "source_brackets",
            "source_quartiles", "target_tokens"}  # the keys below these are names in the data
RENAMED_DATA = {"lessons": "warmup", "curated": "sft", "prompts": "rl", "test": "eval"}
# Settings and digests by their complete key: aepo.prompts, for example, is still called so.
RENAMED_SETTINGS = {
  f"{section}.{old}": f"{section}.{new}"
  for section in ("data.files", "data.digits", "data") for old, new in RENAMED_DATA.items()
} | {f"data.digits.teacher.{end}_lesson": f"data.digits.teacher.{end}_warmup"
     for end in ("first", "last")}


def current_names(value, section=""):
  """A JSON value with the keys of older runs under the names of today.

  `section` is the dotted key at which `value` stands in a run's file, with a point behind it.
  """
  if isinstance(value, list):
    return [current_names(item, section) for item in value]
  if not isinstance(value, dict):
    return value
  found = {}
  of_data = section.rstrip(".").rpartition(".")[2] in _OF_DATA
  for key, item in value.items():
    name = RENAMED_SETTINGS.get(section + key, section + key).removeprefix(section)
    name = re.sub("^fault/", "nonfinite/", _RENAMED.get(name, name))
    found[key if of_data else name] = current_names(item, f"{section}{key}.")
  return found


def read_json(workdir, name):
  """The JSON object in a file of the folder, under `current_names`; {} for a missing file.

  The folder may also be the address of one in a bucket. ValueError, with the remedy, where the file
  was cut or changed.
  """
  path = epath.Path(workdir) / name
  with bucket_errors(workdir):
    text = path.read_bytes() if path.exists() else b"{}"
  try:
    value = json.loads(text)
    if not isinstance(value, dict):
      raise ValueError("it holds no object")
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); restore it, or remove it: the run's command "
                     "writes it anew") from error
  return current_names(value)


def require_json(workdir, name):
  """`read_json`; ValueError where the file is missing."""
  found = read_json(workdir, name)
  if not found:
    raise ValueError(f"{workdir}/{name} does not exist; give the folder of a run of "
                     "ares_jax.train")
  return found


def dump_batch(workdir, stage, step, batch):
  """Writes the batch of a step to WORKDIR/nonfinite/STAGE-STEP.npz, arrays under their tree paths.

  Only the newest three files are kept. A batch that cannot be written is dropped with a warning.
  """
  # Process 0 holds one array at a time, the others none.
  arrays = ((name, shares.fetch_on_process_0(leaf)) for name, leaf in flatten(batch).items())
  if jax.process_index():
    collections.deque(arrays, maxlen=0)
    return
  folder = os.path.join(workdir, "nonfinite")
  try:
    os.makedirs(folder, exist_ok=True)
    with atomic_write(f"{folder}/{stage}-{step}.npz") as path, \
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
      for name, array in arrays:
        with file.open(f"{name}.npy", "w", force_zip64=True) as member:
          np.lib.format.write_array(member, array, allow_pickle=False)
  except OSError as error:
    collections.deque(arrays, maxlen=0)  # the other processes send the rest
    # A full disk shall not end the run.
    logging.warning("the batch of %s step %d was not written: %s", stage, step, error)
  for old in sorted(glob.glob(os.path.join(folder, "*.npz")), key=os.path.getmtime)[:-_BATCHES]:
    os.remove(old)
