"""The record of a checkpoint's leaves, and the checks against it.

A checkpoint stores it as JSON: {"record": {"schema", "extra", "leaves": {name: [dtype, shape,
digest]}}, "sha256": of the record}. An unreadable file, a changed record and a leaf with another
digest raise DamagedError; an intact checkpoint of another model raises ValueError.
"""

import contextlib
import errno
import hashlib
import json
import re

from ares_jax.run.checkpoint import digest
from ares_jax.system.config import one_line
from ares_jax.system.gcs import is_refusal

SCHEMA = 1
# Errors that pass: the device is full, or a store or mount does not answer.
_PASSING_STATUS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED",
                   "PERMISSION_DENIED", "ABORTED", "CURL ERROR")
_PASSING_ERRNO = (errno.ESTALE, errno.EIO, errno.EMFILE)
_NAMED = 8  # leaves that a message names


class DamagedError(ValueError):
  """A checkpoint does not hold what was saved."""


def make_manifest(arrays, extra):
  """The record of {name: array} and of `extra`, a JSON value."""
  digests = digest.digest_tree(arrays)
  return {"schema": SCHEMA, "extra": extra, "leaves": {
    name: [str(array.dtype), list(array.shape), digests[name]] for name, array in arrays.items()}}


def with_checksum(record):
  """The JSON value that is stored: the record and its SHA-256."""
  return {"record": record, "sha256": _sha256(record)}


def verify(stored, step):
  """The record in the stored JSON value of checkpoint `step`.

  Raises DamagedError if it is missing or was changed, ValueError if it has another schema.
  """
  if not isinstance(stored, dict) or not stored.keys() >= {"record", "sha256"}:
    raise DamagedError(f"checkpoint {step} has no record of its leaves")
  record = stored["record"]
  if stored["sha256"] != _sha256(record):
    raise DamagedError(f"checkpoint {step} is damaged: its record was changed")
  if record["schema"] != SCHEMA:
    raise ValueError(f"checkpoint {step} has a record of schema {record['schema']}, this version "
                     f"reads {SCHEMA}; use the version that wrote it")
  return record


def check_digests(step, digests, leaves):
  """Compares {name: digest} of arrays with a record's leaves; DamagedError names up to 8."""
  changed = [name for name, (_, _, wanted) in leaves.items() if digests[name] != wanted]
  if changed:
    raise DamagedError(
      f"checkpoint {step} is damaged: {_first(changed, ', ')} changed since they were saved")


def check_match(targets, leaves, where):
  """Compares the leaves that a run needs, {name: ShapeDtypeStruct}, with those of a record.

  The ValueError names up to 8 leaves that are missing, extra, or of another shape or dtype.
  """
  problems = [f"{name} is not in it" for name in sorted(targets.keys() - leaves.keys())]
  problems += [f"{name} is only in it" for name in sorted(leaves.keys() - targets.keys())]
  for name in sorted(targets.keys() & leaves.keys()):
    want, (dtype, shape, _) = targets[name], leaves[name]
    if list(want.shape) != shape or str(want.dtype) != dtype:
      problems.append(
        f"{name} is {dtype}{shape} in it, the run needs {want.dtype}{list(want.shape)}")
  if problems:
    raise ValueError(f"{where} does not fit this run: {_first(problems, '; ')}; use the config it "
                     "was made with or another workdir")


@contextlib.contextmanager
def damage_of_step(step, path=""):
  """Turns errors of reading a broken file of checkpoint `step`, below `path`, into DamagedError."""
  try:
    yield
  except (DamagedError, MemoryError, PermissionError):
    raise
  except Exception as error:
    passing_status = any(status in str(error) for status in _PASSING_STATUS)
    if passing_status or getattr(error, "errno", None) in _PASSING_ERRNO:
      raise
    if is_refusal(error):
      raise OSError(f"reading checkpoint {step} failed: {describe(error)}") from error
    where = f" in {path}" if str(path) not in describe(error) else ""
    raise DamagedError(f"checkpoint {step} is damaged{where}: {describe(error)}") from error


def describe(error):
  """What went wrong, on one line of at most 400 letters; a file that cannot be used is named."""
  while "TensorStore details" in str(error) and error.__cause__ is not None:
    error = error.__cause__  # the reason, which Orbax's own message leaves out
  text = one_line(error)
  file = re.findall(r'local file "([^"]+)"', text)
  if "No space left on device" in text:
    return f"no space left on the disk{f' of {file[-1]}' if file else ''} (No space left on device)"
  if file and (status := re.match("NOT_FOUND|OUT_OF_RANGE|DATA_LOSS", text)):
    return f"{file[-1]} is missing or damaged ({status[0]})"
  return f"{type(error).__name__}: {text[:300]}"


def _sha256(record):
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _first(words, between):
  more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
  return between.join(words[:_NAMED]) + more
