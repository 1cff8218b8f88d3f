"""The folder of a run: one run at a time, its stages, what makes it another run, whole files."""

import contextlib
import fcntl
import glob
import json
import os
import socket
import threading
import time

import jax
import numpy as np
from absl import logging

from ares_jax.checkpoint import newest

STAGES = ("warmup", "adacs", "aepo")  # in the order of a run; each saves in a folder of its name

# Settings that may change when a run goes on: how it reads, where it runs, how often it saves. None
# of them changes what comes out.
FREE = ("threads", "mesh.", "engine.", "grade.workers", "grade.timeout",
        "stall_minutes", "wandb.", *(f"{stage}.loop." for stage in STAGES))

_BATCHES = 3  # dumped batches kept
_RENEW = 20.0  # seconds between two signs of life of a lock
_GONE = 6 * _RENEW  # a lock of another host without one for so long is stale


def latest_stage(workdir):
  """Name of the last stage of a run that has a checkpoint.

  Raises:
    ValueError: none has.
  """
  for stage in reversed(STAGES):
    if newest(os.path.join(workdir, stage)) is not None:
      return stage
  raise ValueError(f"{workdir} has no checkpoint of {', '.join(STAGES)} yet; train there first")


def flat(values, prefix=""):
  """{"aepo.loss.clip_low": 0.2, ...} of nested dicts."""
  found = {}
  for key, value in values.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return found


def write_text(path, text):
  """Writes a file that is there whole or not at all."""
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    file.write(text)
  os.replace(path + ".tmp", path)


def write_json(path, value):
  """`write_text` of a JSON object."""
  write_text(path, json.dumps(value, indent=1) + "\n")


def dump_batch(workdir, stage, step, batch):
  """Writes WORKDIR/nonfinite/STAGE-STEP.npz, a step's batch under the paths of its arrays.

  Only the newest three files are kept.
  """
  folder = os.path.join(workdir, "nonfinite")
  os.makedirs(folder, exist_ok=True)
  arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
  np.savez_compressed(os.path.join(folder, f"{stage}-{step}.npz"), **arrays)
  for old in sorted(glob.glob(os.path.join(folder, "*.npz")), key=os.path.getmtime)[:-_BATCHES]:
    os.remove(old)


@contextlib.contextmanager
def lock(workdir):
  """Holds WORKDIR/lock: host, process id and time of the one run in the folder.

  The system lets go of a lock with its process, however that ends. Where a file system does not
  tell other hosts of locks, the file's time does, which is renewed all along.

  Raises:
    ValueError: another run works there; names it.
    OSError: the folder cannot be written.
  """
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, "lock")
  with open(path, "a+", encoding="utf-8") as file:
    quiet = time.time() - os.fstat(file.fileno()).st_mtime
    file.seek(0)
    holder = _holder(file.read())
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"{workdir} is in use by {holder['text']}; stop that run or use another "
                       "--workdir") from None
    if holder["host"] not in ("", socket.gethostname()) and quiet < _GONE:
      raise ValueError(f"{workdir} is in use by {holder['text']}, seen {quiet:.0f} s ago; stop "
                       f"that run, or wait {_GONE:.0f} s if it is gone, or use another --workdir")
    if holder["host"]:
      logging.warning("%s: the lock of %s is stale: that run was killed", workdir, holder["text"])
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(),
               "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}, file)
    file.flush()
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(over, path), daemon=True, name="lock")
    renewing.start()
    try:
      yield
    finally:
      over.set()
      renewing.join()
      file.truncate(0)


def _holder(text):
  """Host and description of who wrote a lock; host "" when nobody holds it."""
  try:
    record = json.loads(text)
    return {"host": record["host"], "text":
            f"process {record['pid']} on {record['host']} since {record['time']}"}
  except (ValueError, KeyError, TypeError):
    return {"host": "", "text": "another process"}


def _renew(over, path):
  while not over.wait(_RENEW):
    with contextlib.suppress(OSError):  # a file server that is away for a while
      os.utime(path)
