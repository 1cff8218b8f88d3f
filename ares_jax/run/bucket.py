"""A run's folder in a bucket, gs://BUCKET/RUN: its files are used in a copy on the local disk.

Objects of a bucket cannot be appended to, and most of a run's files are. So a command fetches them
when it begins, and uploads what it has changed: a run before each of its checkpoints, every minute,
and at its end. Checkpoints are written to the bucket and read from it (checkpoint/). A run that is
killed loses lines of steps after its newest checkpoint, and writes them again.
"""

import concurrent.futures
import contextlib
import os
import re
import shutil
import tempfile
import threading
import time

from absl import logging

from ares_jax.run.identity import STAGES
from ares_jax.system import heartbeat
from ares_jax.system.gcs import bucket_errors, file_system, in_bucket

_NOT_COPIED = {*STAGES, "lock", "tensorboard", "profile", "wandb"}  # a run does not read these
_EVERY = 60.0  # seconds between two uploads in the background
_PATIENCE = 10  # an upload waits at least this many times as long as the last one took
_AT_ONCE = 32  # files fetched or uploaded at the same time


def absolute(workdir):
  """The absolute path of a folder, or its address in a bucket; ValueError for other stores."""
  if not in_bucket(workdir):
    return os.path.abspath(workdir)
  if not re.match("gs://[^/]+/[^/]", workdir):
    raise ValueError(f"{workdir} is neither a folder on a disk nor gs://BUCKET/RUN")
  return workdir.rstrip("/")


@contextlib.contextmanager
def open_folder(workdir, confirm=lambda: None):
  """Yields a folder on a disk as it is, of one in a bucket a BucketFolder.

  At the end what has changed in the copy is uploaded, also after an error; the message of a
  ValueError has the address for the copy. `confirm` is called before each upload; it raises
  ValueError where another run has taken over the folder.

  Raises:
    OSError: the bucket cannot be read; or it cannot be written, then the message names the copy.
  """
  if not in_bucket(workdir):
    yield workdir
    return
  address, copy = absolute(workdir), tempfile.mkdtemp(prefix="ares_jax-")
  folder, failed = BucketFolder(address, copy, confirm), True
  try:
    folder.fetch()
  except BaseException:
    shutil.rmtree(copy, ignore_errors=True)
    raise
  try:
    with heartbeat.meanwhile(_upload_often, folder, name="bucket"):
      yield folder
      failed = False
  except ValueError as error:
    if copy not in str(error):
      raise
    raise type(error)(str(error).replace(copy, address)) from error
  finally:
    try:
      folder.upload()
      shutil.rmtree(copy, ignore_errors=True)
    except (OSError, ValueError) as error:
      text = f"{error}; what was not uploaded is in {copy}"
      if not failed:
        raise OSError(text) from error
      logging.warning("%s", text)


class BucketFolder(os.PathLike):
  """A folder in a bucket: as a path it is the copy on the local disk, as a text its address."""

  def __init__(self, address, copy, confirm):
    self._address, self._copy, self._confirm = address, copy, confirm
    self._known = {}  # {name: stamp of the copy's file when it was fetched or uploaded}
    self._uploading = threading.Lock()

  def __fspath__(self):
    return self._copy

  def __str__(self):
    return self._address

  def fetch(self, part=""):
    """Fetches the files of the folder, or of the folder `part` in it, as they are now."""
    with bucket_errors(self._address):
      written = self._in_bucket(file_system(), part)
      for name in written:
        os.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
      file_system().get([f"{self._address}/{name}" for name in written],
                        [self._path(name) for name in written], batch_size=_AT_ONCE)
    for name, when in written.items():
      os.utime(self._path(name), (when, when))
      self._known[name] = self._stamp(name)

  def upload(self):
    """Uploads the files that have changed here; returns when they are in the bucket.

    Files that others refer to come first: images before lines of JSON, these before other JSON.
    """
    with self._uploading:
      self._confirm()
      changed = [name for name in self._in_copy() if self._stamp(name) != self._known.get(name)]
      with bucket_errors(self._address):
        for kind in ("", ".jsonl", ".json"):
          with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._send, [name for name in changed if _kind(name) == kind]))
        for name in list(self._known):  # nothing else is ever removed
          if name.startswith("nonfinite/") and not os.path.exists(self._path(name)):
            file_system().rm(f"{self._address}/{name}")
            del self._known[name]

  def _send(self, name):
    stamp = self._stamp(name)  # before the content: a line appended meanwhile is sent next time
    with open(self._path(name), "rb") as file:
      file_system().pipe_file(f"{self._address}/{name}", file.read())
    self._known[name] = stamp

  def _in_bucket(self, files, part):
    """{name: time of writing} of the files in the bucket that a run may read."""
    root = self._address.removeprefix("gs://")
    try:
      entries = files.ls(f"{root}/{part}".rstrip("/"), detail=True)
    except FileNotFoundError:  # nothing is there yet; or no such bucket, which an upload notices
      return {}
    found = []
    for entry in entries:
      if entry["name"].removeprefix(f"{root}/").split("/")[0] not in _NOT_COPIED:
        found += (files.find(entry["name"], detail=True).values() if entry["type"] == "directory"
                  else [entry])
    return {entry["name"].removeprefix(f"{root}/"): entry["mtime"].timestamp() for entry in found
            if not entry["name"].endswith(("/", "/lock"))}

  def _in_copy(self):
    for folder, _, names in os.walk(self._copy):
      for name in sorted(names):
        if not name.endswith(".tmp"):
          yield os.path.relpath(os.path.join(folder, name), self._copy)

  def _path(self, name):
    return os.path.join(self._copy, name)

  def _stamp(self, name):
    stat = os.stat(self._path(name))
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def upload(workdir):
  """`BucketFolder.upload`; nothing for a folder on a disk."""
  if isinstance(workdir, BucketFolder):
    workdir.upload()


def fetch(workdir, part):
  """`BucketFolder.fetch`; nothing for a folder on a disk."""
  if isinstance(workdir, BucketFolder):
    workdir.fetch(part)


def _upload_often(over, folder):
  """Uploads in the background, until `over` is set."""
  pause, told = _EVERY, False
  while not over.wait(pause):
    began = time.monotonic()
    try:
      folder.upload()
      told = False
    except ValueError:
      return  # another run has taken over: the lease stops this one
    except OSError as error:  # an upload before a checkpoint raises it
      if not told:
        logging.warning("%s; trying again every minute", error)
      told = True
    pause = max(_EVERY, _PATIENCE * (time.monotonic() - began))


def _kind(name):
  end = os.path.splitext(name)[1]
  return end if end in (".jsonl", ".json") else ""
