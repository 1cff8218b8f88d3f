"""Checkpoints as they lie on a disk, read without Orbax's manager: a run may be saving there.

The state is stored flat, one array per leaf under its path ("params/decoder/q"); what is read has
the digests that manifest.py holds, or is not used: Orbax itself restores flipped bits silently.
"""

import math
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ares_jax.run.checkpoint import digest, manifest
from ares_jax.run.checkpoint.manifest import DamagedError
from ares_jax.system import heartbeat, hosts

_READ_AT_ONCE = 1 << 30  # bytes read at a time, where a leaf is not larger
_REPLACED = 5  # times that a reader looks again, where a run replaces what it is reading

# jax has no public way from an abstract key's dtype to its implementation but comparing.
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


def newest_step(directory):
  """Step of the newest checkpoint of a directory, or None; changes nothing there."""
  steps = all_steps(directory)
  return steps[-1] if steps else None


def read_part(directory, part, abstract):
  """Reads one part of the newest whole checkpoint of a directory, and changes nothing there.

  Args:
    directory: what a `Checkpoints` was made with.
    part: the state's field, e.g. "params": what else was saved is not read.
    abstract: pytree of that part, as for `Checkpoints.restore`; no PRNG keys.

  Returns:
    (step, the part).

  Raises:
    DamagedError: that part is whole in no checkpoint.
    ValueError: there is no checkpoint, or a leaf of `part` is missing, extra, or of another shape
      or dtype.
  """
  targets = {f"{part}/{name}": target(name, leaf) for name, leaf in flatten(abstract).items()}

  def read(step):
    written = agreed(lambda: read_record(directory, step))
    leaves = {name: leaf for name, leaf in written["leaves"].items()
              if name.startswith(f"{part}/")}
    manifest.check_match(targets, leaves, f"checkpoint {step} in {directory}")
    arrays = agreed(lambda: read_leaves(directory, step, targets))
    manifest.check_digests(step, digest.digest_arrays(arrays), leaves)
    return arrays

  for attempt in range(_REPLACED):
    steps = hosts.on_process_0(lambda: all_steps(directory))
    if not steps:
      raise ValueError(f"there is no checkpoint in {directory}")
    try:
      step, restored, _ = newest_complete(directory, steps, read, strict=False)
      break
    except DamagedError:
      # A run that saves there may have replaced what was being read.
      if hosts.on_process_0(lambda: all_steps(directory)) == steps or attempt == _REPLACED - 1:
        raise
  leaves = [restored[name] for name in targets]
  return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def all_steps(directory):
  """Finished steps, oldest first, read without a manager: a run may be saving there."""
  folder = folder_of(directory)
  if not folder.is_dir():
    return []
  found = ocp.path.step.standard_name_format().find_all(folder)
  return sorted(metadata.step for metadata in found)


def folder_of(directory):
  return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def newest_complete(directory, steps, read, strict):
  """(step, read(step), damaged steps) of the newest of `steps` that `read` finds whole."""
  damaged = {}
  for step in sorted(steps, reverse=True):
    try:
      found = read(step)
    except DamagedError as error:
      if strict:
        raise DamagedError(f"{directory}: {error}; move it away, or leave out --strict to go on "
                           "from an older one") from error
      damaged[step] = str(error)
      continue
    for reason in damaged.values():
      logging.warning("%s: %s; going on from step %d", directory, reason, step)
    return step, found, list(damaged)
  raise DamagedError(f"no checkpoint in {directory} is whole: {'; '.join(damaged.values())}; "
                     "remove the folder to begin its stage anew")


def agreed(call):
  """What `call` reads; DamagedError on all processes where one of them finds damage."""
  found, said = None, ""
  try:
    found = call()
  except DamagedError as error:
    if jax.process_count() == 1:
      raise
    said = str(error)
  for damage in filter(None, hosts.allgather_bytes(said.encode())):
    raise DamagedError(damage.decode())
  return found


def _reader(handler):
  """A Checkpointer that waits for no other process."""
  own = jax.process_index()
  return ocp.Checkpointer(handler, multiprocessing_options=ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}))


def read_record(directory, step):
  path = folder_of(directory) / str(step) / "extra"
  with manifest.damage_of_step(step), _reader(ocp.JsonCheckpointHandler()) as reader:
    stored = reader.restore(path, args=ocp.args.JsonRestore())
  return manifest.verify(stored, step)


def read_leaves(directory, step, targets):
  """{name: array} of some leaves, on the devices of `targets`: _READ_AT_ONCE bytes at a time."""
  found = {}
  for some in _portions(targets):
    heartbeat.heartbeat()
    found |= _read_some(directory, step, some)
  return found


def _read_some(directory, step, targets):
  """{name: array} of some leaves, as `targets` have them: on devices, or numpy."""
  path = folder_of(directory) / str(step) / "state"
  with manifest.damage_of_step(step), _reader(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(path, args=ocp.args.PyTreeRestore(
      item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=True))


def compare(directory, step, leaves):
  """Reads all leaves of a checkpoint into this host's memory, some at a time; DamagedError."""
  saved = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in leaves.items()}
  for some in _portions(saved):
    targets = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in some.items()}
    digests = digest.digest_arrays(_read_some(directory, step, targets))
    manifest.check_digests(step, digests, {name: leaves[name] for name in some})


def _portions(leaves):
  """{name: leaf} in parts of about _READ_AT_ONCE bytes."""
  some, size = {}, 0
  for name, leaf in leaves.items():
    some[name] = leaf
    size += math.prod(leaf.shape) * leaf.dtype.itemsize
    if size >= _READ_AT_ONCE:
      yield some
      some, size = {}, 0
  if some:
    yield some


def flatten(tree):
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    named[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  return named


def is_key(leaf):
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_implementation(leaf):
  for name in _KEY_IMPLEMENTATIONS:
    if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == leaf.dtype:
      return name
  raise ValueError(f"PRNG keys of {leaf.dtype} are not supported; use {_KEY_IMPLEMENTATIONS}")


def target(name, leaf):
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
    raise ValueError(
      f"leaf {name} of the restore target has no sharding; pass ShapeDtypeStructs with shardings"
    )
  sharding = leaf.sharding
  if is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
