"""WORKDIR/lock: one run at a time in a folder; lease.py has the lock of a run in a bucket."""

import contextlib
import fcntl
import json
import os
import socket
import time

from absl import logging
from etils import epath

from ares_jax.run import bucket, lease
from ares_jax.system import heartbeat, hosts
from ares_jax.system.gcs import in_bucket

_RENEW = 20.0  # seconds between two updates of the lock file's time
_GONE = 6 * _RENEW  # seconds without an update after which a lock of another host is stale
_WATCH = 1.5 * _RENEW  # seconds in which a lock dated in the future is watched for an update


@contextlib.contextmanager
def lock(workdir):
  """Holds WORKDIR/lock, which names host, process id and start of the one run in the folder.

  The operating system releases the lock when the process ends, however it ends. Some file systems
  do not show locks to other hosts; those go by the time of the file, which is updated all along. A
  time in the future says nothing, so such a lock is watched for a while for an update.

  Raises:
    ValueError: another run holds the lock, or `workdir` cannot be a folder.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise ValueError(f"--workdir={workdir} is a file, or in a file; name a folder") from error
  path = os.path.join(workdir, "lock")
  # A damaged lock is that of an unknown process: only the system's lock counts then.
  with open(path, "a+", encoding="utf-8", errors="replace") as file:
    file.seek(0)
    host, holder = lease.holder(file.read())
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"{workdir} is in use by {holder}; stop that run or use another "
                       "--workdir") from None
    if host not in ("", socket.gethostname()):
      _refuse_living(file, path, holder)
    if host:
      logging.warning("%s: the lock of %s is stale: that run was killed", workdir, holder)
    file.truncate(0)
    json.dump(lease.record(), file)
    file.flush()
    os.fsync(file.fileno())  # other hosts of the run read it at once
    try:
      with heartbeat.meanwhile(_renew, path, name="lock"):
        yield
    finally:
      file.truncate(0)


@contextlib.contextmanager
def one_run(workdir):
  """Holds the lock of a run's folder on process 0; yields bucket.open_folder's folder.

  ValueError where another run holds it, or a process does not see it in its `workdir`.
  """
  held = []  # on process 0
  hold = lease.lease if in_bucket(workdir) else lock
  with contextlib.ExitStack() as stack:
    hosts.on_process_0(lambda: held.append(stack.enter_context(hold(workdir))))
    path = epath.Path(workdir) / "lock"
    seen = hosts.allgather(lambda: path.read_bytes() if path.exists() else b"")
    for number, there in enumerate(seen):
      if there != seen[0]:
        raise ValueError(f"process {number} finds another {workdir} than process 0; --workdir must "
                         "be a folder on a disk that all hosts share, or gs://BUCKET/RUN")
    confirm = held[0] if held and held[0] else lambda: None
    yield stack.enter_context(bucket.open_folder(workdir, confirm))


def _refuse_living(file, path, holder):
  """Raises ValueError if the open lock of a process on another host was updated lately."""
  seen = os.fstat(file.fileno()).st_mtime
  quiet = time.time() - seen
  if quiet < 0:
    logging.warning("%s of %s is dated %.0f s in the future: a clock was set back, or clocks "
                    "differ; watching for %.0f s whether that run updates it", path, holder, -quiet,
                    _WATCH)
    time.sleep(_WATCH)
    with open(path, "rb") as again:  # opening asks a file server; fstat may be a minute old
      living = os.fstat(again.fileno()).st_mtime != seen
    words = "which has just updated its lock"
  else:
    living, words = quiet < _GONE, f"seen {quiet:.0f} s ago"
  if living:
    raise ValueError(f"{os.path.dirname(path)} is in use by {holder}, {words}; stop that run or "
                     f"use another --workdir; if it has ended, wait {_GONE:.0f} s or remove {path}")


def _renew(over, path):
  while not over.wait(_RENEW):
    with contextlib.suppress(OSError):  # the file server may be unreachable for a while
      os.utime(path)
