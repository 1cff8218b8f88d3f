"""Reads checkpoints from disk and checks them; changes nothing there, so a run may be saving.

A state is stored as one array per leaf under the leaf's path ("params/decoder/q"). Arrays must have
the digests of the checkpoint's record (manifest.py), since Orbax restores flipped bits silently.
"""

import math
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ares_jax.run.checkpoint import digest, manifest
from ares_jax.run.checkpoint.digest import flatten
from ares_jax.run.checkpoint.manifest import DamagedError
from ares_jax.run.checkpoint.quiet import silence_orbax
from ares_jax.system import heartbeat, hosts
from ares_jax.system.gcs import bucket_errors

silence_orbax()

_READ_AT_ONCE = 1 << 30  # bytes read at a time, unless a leaf is larger
_ATTEMPTS = 5  # at reading from a run that replaces its checkpoints meanwhile


def newest_step(directory):
  """The step of the newest checkpoint in a directory, or None."""
  return max(all_steps(directory), default=None)


def all_steps(directory):
  """The steps of all finished checkpoints in a directory, oldest first."""
  folder = folder_of(directory)
  with bucket_errors(directory):
    found = ocp.path.step.standard_name_format().find_all(folder) if folder.is_dir() else []
    return sorted(metadata.step for metadata in found)


def folder_of(directory):
  """The path of a directory: local, or a bucket's such as gs://..."""
  return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def read_part(directory, part, abstract, step=None):
  """Reads one part of the state from the newest checkpoint in which it is intact, or from `step`.

  `part` is a field of the state, e.g. "params", and `abstract` its pytree, as for
  `Checkpoints.restore`. Returns (step, the part). Raises DamagedError if the part is intact in no
  checkpoint, ValueError if there is none, or it does not fit `abstract`.
  """
  targets = {f"{part}/{name}": target(name, leaf) for name, leaf in flatten(abstract).items()}
  for attempt in range(_ATTEMPTS):
    steps = hosts.on_process_0(lambda: all_steps(directory))
    if not steps:
      raise ValueError(f"there is no checkpoint in {directory}")
    try:
      found, (arrays, _), _ = newest_intact(directory, steps if step is None else [step], targets,
                                            prefix=f"{part}/")
      break
    except DamagedError:
      # Not damage if a run has replaced the checkpoint meanwhile.
      if hosts.on_process_0(lambda: all_steps(directory)) == steps or attempt == _ATTEMPTS - 1:
        raise
  leaves = [arrays[name] for name in targets]
  return found, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def newest_intact(directory, steps, targets, *, prefix="", strict=False):
  """Tries `read_checked` on `steps` from the newest on until one is intact.

  `targets` are {name: ShapeDtypeStruct with a sharding}. Returns (step, its result, damaged newer
  steps). Raises DamagedError if no checkpoint is intact, or if the newest is not and `strict`.
  """
  damaged = {}
  for step in sorted(steps, reverse=True):
    try:
      found = read_checked(directory, step, targets, prefix)
    except DamagedError as error:
      if strict:
        raise DamagedError(f"{directory}: {error}; move it away, or leave out --strict to go on "
                           "from an older one") from error
      damaged[step] = str(error)
    else:
      for reason in damaged.values():
        logging.warning("%s: %s; going on from step %d", directory, reason, step)
      return step, found, list(damaged)
  raise DamagedError(f"no checkpoint in {directory} is intact: {'; '.join(damaged.values())}; "
                     "remove the folder to begin its stage anew")


def read_checked(directory, step, targets, prefix):
  """Reads the leaves of a checkpoint that start with `prefix`, and checks them against its record.

  Returns ({name: array}, the JSON value saved beside the state). Raises DamagedError on all
  processes if a file is broken or a digest differs, ValueError if `targets` do not fit the record.
  """
  record = _read_on_all(lambda: read_record(directory, step))
  leaves = {name: leaf for name, leaf in record["leaves"].items() if name.startswith(prefix)}
  manifest.check_match(targets, leaves, f"checkpoint {step} in {directory}")
  arrays = _read_on_all(lambda: read_leaves(directory, step, targets))
  manifest.check_digests(step, digest.digest_tree(arrays), leaves)
  return arrays, record["extra"]


def _read_on_all(read):
  """Calls `read` on all processes; if it raises DamagedError on one, it raises it on all."""
  found, damage = None, ""
  try:
    found = read()
  except DamagedError as error:
    if jax.process_count() == 1:
      raise
    damage = str(error)
  for text in filter(None, hosts.allgather_bytes(damage.encode())):
    raise DamagedError(text.decode())
  return found


def read_record(directory, step):
  """The record of a checkpoint's leaves, see manifest.py."""
  path = folder_of(directory) / str(step) / "extra"
  with manifest.damage_of_step(step, path), _reader(ocp.JsonCheckpointHandler()) as reader:
    stored = reader.restore(path, args=ocp.args.JsonRestore())
  return manifest.verify(stored, step)


def read_leaves(directory, step, targets):
  """{name: array} of some leaves, on the devices of `targets`; a heartbeat per _READ_AT_ONCE."""
  found = {}
  for some in _portions(targets):
    heartbeat.heartbeat()
    found |= _read_portion(directory, step, some)
  return found


def verify_on_disk(directory, step, leaves):
  """Reads `leaves` of a checkpoint's record, some at a time; DamagedError if a digest differs."""
  saved = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in leaves.items()}
  for some in _portions(saved):
    targets = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in some.items()}
    digests = digest.digest_tree(_read_portion(directory, step, targets))
    manifest.check_digests(step, digests, {name: leaves[name] for name in some})


def _portions(leaves):
  """Splits {name: leaf} into dicts of about _READ_AT_ONCE bytes."""
  some, size = {}, 0
  for name, leaf in leaves.items():
    some[name] = leaf
    size += math.prod(leaf.shape) * leaf.dtype.itemsize
    if size >= _READ_AT_ONCE:
      yield some
      some, size = {}, 0
  if some:
    yield some


def _read_portion(directory, step, targets):
  """{name: array} of some leaves: on devices or in numpy, as `targets` are."""
  path = folder_of(directory) / str(step) / "state"
  with manifest.damage_of_step(step, path), _reader(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(path, args=ocp.args.PyTreeRestore(
      item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=True))


def _reader(handler):
  """A Checkpointer that waits for no other process."""
  process = jax.process_index()
  return ocp.Checkpointer(handler, multiprocessing_options=ocp.options.MultiprocessingOptions(
    primary_host=process, active_processes={process}))


def target(name, leaf):
  """The ShapeDtypeStruct with a sharding that a leaf is read into."""
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
    raise ValueError(
      f"leaf {name} of the restore target has no sharding; pass ShapeDtypeStructs with shardings")
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
