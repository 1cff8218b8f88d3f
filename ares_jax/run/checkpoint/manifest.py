"""What a checkpoint says of its leaves, and when it is believed.

The record lies in the checkpoint as JSON: {"record": {"schema", "extra", "leaves": {name: [dtype,
shape, digest]}}, "sha256": of the record}. A file that does not read, a record that was changed or
a leaf with another digest is a DamagedError; a whole checkpoint of another model is a ValueError.
"""

import contextlib
import errno
import hashlib
import json

from ares_jax.run.checkpoint import digest

SCHEMA = 1
_PASSING = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_NAMED = 8  # leaves that a message names


class DamagedError(ValueError):
  """What is read is not what was saved."""


def make_manifest(arrays, extra):
  """The record of {name: array} and `extra`, which is JSON."""
  digests = digest.digest_arrays(arrays)
  return {"schema": SCHEMA, "extra": extra, "leaves": {
    name: [str(array.dtype), list(array.shape), digests[name]] for name, array in arrays.items()}}


def with_checksum(record):
  """What is stored of a record."""
  return {"record": record, "sha256": _sha256(record)}


def verify(stored, step):
  """The record in what was stored by checkpoint `step`.

  Raises:
    DamagedError: it is not as it was written.
    ValueError: it is of another schema.
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
  """Compares {name: digest} of what was read with a record's leaves; DamagedError names 8."""
  changed = [name for name, (_, _, wanted) in leaves.items() if digests[name] != wanted]
  if changed:
    raise DamagedError(f"checkpoint {step} is damaged: {_some(changed, ', ')} changed since they "
                       "were saved")


def check_match(targets, leaves, where):
  """Compares the leaves a run needs (dtype, shape) with a record's.

  Raises:
    ValueError: names up to 8 leaves that are missing, extra, or of another shape or dtype.
  """
  problems = [f"{name} is not in it" for name in sorted(targets.keys() - leaves.keys())]
  problems += [f"{name} is only in it" for name in sorted(leaves.keys() - targets.keys())]
  for name in sorted(targets.keys() & leaves.keys()):
    want, (dtype, shape, _) = targets[name], leaves[name]
    if list(want.shape) != shape or str(want.dtype) != dtype:
      problems.append(
        f"{name} is {dtype}{shape} in it, the run needs {want.dtype}{list(want.shape)}")
  if problems:
    raise ValueError(f"{where} does not fit this run: {_some(problems, '; ')}; use the config it "
                     "was made with or another workdir")


@contextlib.contextmanager
def damage_of_step(step):
  """Turns what a reader raises over a broken file of checkpoint `step` into a DamagedError."""
  try:
    yield
  except (DamagedError, MemoryError, PermissionError):
    raise
  except Exception as error:
    # A full device, a store or a mount that does not answer: no damage.
    if any(word in str(error) for word in _PASSING) or (
        isinstance(error, OSError) and error.errno in (errno.ESTALE, errno.EIO, errno.EMFILE)):
      raise
    text = " ".join(str(error).split())[:200]
    raise DamagedError(
      f"checkpoint {step} is damaged: {type(error).__name__}: {text}") from error


def _sha256(record):
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _some(words, between):
  more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
  return between.join(words[:_NAMED]) + more
