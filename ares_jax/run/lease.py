"""The lock of a run in a bucket, the object gs://BUCKET/RUN/lock: a lease that is renewed.

The holder writes the object again every 20 s. Another run that finds it watches it: if it does not
change for a minute, its holder was killed. Every write names the version of the object that it
replaces (its "generation"), and the bucket refuses it if there is another one by then. So of two
runs that write at once one is refused, and clocks play no part.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time

from absl import logging

from ares_jax.system import heartbeat
from ares_jax.system.gcs import bucket_errors, file_system

_RENEW = 20.0  # seconds between two writes of the holder
_GONE = 3 * _RENEW  # seconds without a write after which the holder was killed
_LOOK = 1.0  # seconds between two looks at the lease of another run


@contextlib.contextmanager
def lease(workdir):
  """Holds WORKDIR/lock of a folder in a bucket; yields a function that confirms that it does.

  The function raises ValueError if another run has taken the lease over, as it may when this one
  could not write for a minute. Then this process also gets SIGTERM, to stop it.

  Raises:
    ValueError: another run holds the lock.
    OSError: the bucket cannot be read or written.
  """
  held = _Lease(workdir)
  held.take()
  try:
    with heartbeat.meanwhile(held.renew, name="lease"):
      yield held.confirm
  finally:
    held.release()


class _Lease:
  """The object, and the generation of it that this process wrote last."""

  def __init__(self, workdir):
    self._workdir = workdir
    self._bucket, _, folder = workdir.removeprefix("gs://").partition("/")
    self._name = f"{folder}/lock"
    self._text = json.dumps(record() | {"machine": _machine(), "began": _began(os.getpid()),
                                        "id": os.urandom(8).hex()}).encode()
    self._generation = 0
    self._writing = threading.Lock()

  def take(self):
    generation, text = self._read()
    if text and not _has_ended(text):
      generation, text = self._watch(generation, text)
    if text:
      logging.warning("%s: the lock of %s is stale: that run was killed", self._workdir,
                      holder(text)[1])
    self._generation = generation
    self.confirm()

  def _watch(self, generation, text):
    """The lock when its holder has ended; ValueError when the holder writes it."""
    logging.warning("%s is in use by %s; watching for %.0f s whether that run is alive",
                    self._workdir, holder(text)[1], _GONE)
    until = time.monotonic() + _GONE
    while text and time.monotonic() < until:
      heartbeat.heartbeat()
      time.sleep(_LOOK)
      now, text = self._read()
      if text and now != generation:
        raise ValueError(f"{self._workdir} is in use by {holder(text)[1]}; stop that run or use "
                         "another --workdir")
      generation = now
    return generation, text

  def confirm(self):
    """Writes the object once more; ValueError where another process has written it."""
    with self._writing:
      if not self._write(self._text):
        generation, text = self._read()
        if text != self._text:
          raise ValueError(f"{self._workdir} was taken over by {holder(text)[1]}; stop one of the "
                           "two runs")
        self._generation = generation  # the answer to an earlier try was lost

  def renew(self, over):
    """Writes the object until `over` is set or another process has written it."""
    while not over.wait(_RENEW):
      try:
        self.confirm()
      except OSError:
        pass  # the bucket may be unreachable for a while
      except ValueError as error:
        logging.error("%s; this one stops", error)
        os.kill(os.getpid(), signal.SIGTERM)
        return

  def release(self):
    """Leaves an empty object, unless another process has written it."""
    with contextlib.suppress(OSError):
      self._write(b"")

  def _read(self):
    """(generation, content) of the object; (0, b"") where there is none."""
    with bucket_errors(self._workdir):
      try:
        headers, text = file_system().call("GET", "b/{}/o/{}", self._bucket, self._name,
                                                     alt="media")
      except FileNotFoundError:
        return 0, b""
      return int(headers["X-Goog-Generation"]), text

  def _write(self, text):
    """Whether the object could be replaced: it still had the generation known here."""
    files = file_system()
    about = json.dumps({"name": self._name, "cacheControl": "no-store"}).encode()
    kind = b"Content-Type: application/json"
    body = b"\r\n".join((b"--part", kind, b"", about, b"--part", kind, b"", text, b"--part--"))
    with bucket_errors(self._workdir):
      try:
        found = files.call(
          "POST", files.base.replace("/storage/", "/upload/storage/") + "b/{}/o", self._bucket,
          uploadType="multipart", ifGenerationMatch=str(self._generation), data=body,
          headers={"Content-Type": "multipart/related; boundary=part"}, json_out=True)
      except FileExistsError:  # gcsfs's name for "precondition failed"
        return False
    self._generation = int(found["generation"])
    return True


def record():
  """The process that writes a lock, for people."""
  return {"host": socket.gethostname(), "pid": os.getpid(),
          "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def holder(text):
  """(host, description) of the process that wrote a lock; "" for an unknown host."""
  try:
    found = json.loads(text)
    return found["host"], "process {pid} on {host} since {time}".format(**found)
  except (ValueError, KeyError, TypeError):
    return "", "another process"


def _has_ended(text):
  """Whether a lock was written on this machine by a process that is no more."""
  try:
    found = json.loads(text)
    return found["machine"] == _machine() != "" and found["began"] != _began(found["pid"])
  except (ValueError, KeyError, TypeError):
    return False


def _machine():
  """This boot of this machine, and the container whose process ids count; "" if unknown."""
  try:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
      return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _began(pid):
  """When a process of this machine began, in ticks since the boot; None where it has ended."""
  try:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
      fields = file.read().rpartition(")")[2].split()
  except OSError:
    return None
  return None if fields[0] in "ZX" else fields[19]
