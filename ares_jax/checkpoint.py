"""Checkpoints of a run: its whole state as a pytree of arrays, and a small JSON beside it.

The state is stored flat, one array per leaf under its path ("params/decoder/q"), so a checkpoint
does not depend on the classes of the records it came from, and a mismatch has a name. The JSON
holds a record of every leaf (manifest.py): dtype, shape and the digest it had on the devices. What
is read has these digests or is not used: Orbax itself restores flipped bits silently.
"""

import concurrent.futures
import contextlib
import json
import math
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ares_jax import digest, hosts, manifest, pulse
from ares_jax.manifest import DamagedError

_READ_AT_ONCE = 1 << 30  # bytes read at a time, where a leaf is not larger
_REPLACED = 5  # times that a reader looks again, where a run replaces what it is reading

# jax has no public way from an abstract key's dtype to its implementation but comparing.
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


class Checkpoints:
  """The checkpoints of one directory, newest `keep` of them; saving does not block training.

  A save is written, read back and compared in the background; only then are older ones deleted.
  Every process of a run makes one, with the same arguments. One per directory at a time.
  """

  def __init__(self, directory, keep):
    """Opens or makes `directory`; what a killed save left is removed in the background.

    Raises:
      ValueError: `keep` < 1.
    """
    if keep < 1:
      raise ValueError(f"keep is {keep}; must be >= 1 or no checkpoint survives")
    self.directory = str(_folder(directory))
    self._keep = keep
    hosts.leader(lambda: _folder(directory).mkdir(parents=True, exist_ok=True))
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving = None  # Future of the save in flight
    self._settled = 0  # saves that have ended, one way or the other
    self._manager = self._open()

  def _open(self):
    return ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None,  # _settle deletes: Orbax would before it knows that the new one is whole
        create=False,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Named, the processes wait for each other without a device, in any thread.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          active_processes=set(range(jax.process_count()))),
      ),
      # Named handlers let the manager read a checkpoint's shapes before anything was saved.
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # Where a process leaves by an error of its own, the others are not on their way out.
    if kind is None or jax.process_count() == 1:
      self.close()

  def latest(self):
    """The newest step, in flight or finished, or None."""
    return self._manager.latest_step()

  def steps(self):
    """All kept steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step, state, extra):
    """Starts to save; returns when the arrays are copied out and may be donated.

    Args:
      step: int, larger than every saved one.
      state: pytree whose leaves are jax or numpy arrays; typed PRNG keys are allowed.
      extra: what `json.dumps` takes, e.g. the position in the data; no NaN.

    Raises:
      ValueError: `step` does not come after the newest one, a leaf is not an array, or `extra`
        is not JSON.
      OSError: the save before this one failed.
    """
    self.wait()
    newest = self.latest()
    if newest is not None and step <= newest:
      raise ValueError(
        f"step {step} is not after the newest checkpoint {newest} in {self.directory}; "
        "resume from it or use another workdir"
      )
    try:
      json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
      raise ValueError(f"extra of checkpoint {step} is not JSON: {error}") from error
    arrays = {}
    for name, leaf in _flatten(state).items():
      if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(f"state leaf {name} is {type(leaf).__name__}; save arrays only")
      arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    written = manifest.of(arrays, extra)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(arrays), extra=ocp.args.JsonSave(manifest.seal(written))
        ),
      )
    except OSError as error:
      failed = self._failed(step, _text(error))
      if jax.process_count() > 1:
        # The others wait inside the save that this process left: no second try.
        raise ValueError(str(failed)) from error
      self._manager = self._open()
      raise failed from error
    self._saving = self._worker.submit(self._settle, step, written["leaves"])

  def _settle(self, step, leaves):
    """Waits for a save, reads it back, and deletes what it makes superfluous."""
    error = None
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      _compare(self.directory, step, {name: leaves[name] for name in hosts.share(list(leaves))})
    except Exception as raised:
      error = raised
    self._settled += 1
    said = hosts.vote(f"{self.directory}/{self._settled}", _text(error))
    if any(said):
      # Orbax keeps a failed save's error and its temporary folder: a new manager forgets both.
      if jax.process_index() == 0:
        with contextlib.suppress(OSError):
          (_folder(self.directory) / str(step)).rmtree(missing_ok=True)
      # None may list the folder that another one is removing.
      hosts.vote(f"{self.directory}/{self._settled}/removed", "")
      self._manager = self._open()
      raise self._failed(step, next(filter(None, said))) from error
    for old in self.steps()[:-self._keep]:
      try:
        self._manager.delete(old)
      except (OSError, jax.errors.JaxRuntimeError) as error:
        # The new one is whole: a save it is. The next save removes it.
        logging.warning("%s: checkpoint %d is not removed: %s", self.directory, old, error)

  def _failed(self, step, text):
    steps = _steps(self.directory)
    older = f"step {steps[-1]} is whole" if steps else "there is none before it"
    return OSError(f"saving checkpoint {step} in {self.directory} failed, {older}: {text}")

  def restore(self, abstract, step=None, *, strict=False):
    """Reads a checkpoint onto the shardings of `abstract`.

    Damaged checkpoints are passed over with a warning and renamed to `damaged-STEP`, where an older
    one is whole.

    Args:
      abstract: pytree like the saved state; leaves are `jax.ShapeDtypeStruct` with a sharding
        (see `abstract_like`), or arrays of the wanted shape, dtype and sharding.
      step: which one; None is the newest that is whole.
      strict: whether a damaged newest one is refused.

    Returns:
      (step, state, extra), or None when the directory holds no checkpoint and `step` is None.

    Raises:
      DamagedError: none is whole, the one asked for is not, or the newest is not and `strict`.
      ValueError: no such step; a leaf is missing, extra, or of another shape or dtype (orbax
        would cast it silently); a leaf of `abstract` has no sharding. Up to 8 leaves are named.
    """
    self.wait()
    steps = hosts.leader(self.steps)
    if step is not None and step not in steps:
      raise ValueError(f"no checkpoint {step} in {self.directory}; there are {steps}")
    if not steps:
      return None
    targets = {name: _target(name, leaf) for name, leaf in _flatten(abstract).items()}

    def read(step):
      written = _agreed(lambda: _read_record(self.directory, step))
      manifest.check_match(targets, written["leaves"], f"checkpoint {step} in {self.directory}")
      arrays = _agreed(lambda: _read_leaves(self.directory, step, targets))
      manifest.check_digests(step, digest.of(arrays), written["leaves"])
      return arrays, written["extra"]

    step, (arrays, extra), damaged = _newest_whole(
      self.directory, steps if step is None else [step], read, strict)
    hosts.leader(lambda: self._set_aside(damaged))
    if damaged:
      self._manager.reload()
    leaves = [
      jax.random.wrap_key_data(arrays[name], impl=_key_implementation(leaf)) if _is_key(leaf)
      else arrays[name] for name, leaf in _flatten(abstract).items()]
    return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), extra

  def _set_aside(self, damaged):
    for bad in damaged:
      aside = _folder(self.directory) / f"damaged-{bad}"
      aside.rmtree(missing_ok=True)
      (_folder(self.directory) / str(bad)).rename(aside)

  def check(self):
    """Raises, without waiting, what went wrong in a save that has ended: OSError."""
    if self._saving is not None and not hosts.agree(not self._saving.done()):
      self.wait()

  def wait(self):
    """Blocks until the save in flight is on disk and compared; raises what went wrong in it."""
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def close(self):
    """Finishes the save in flight and stops the threads."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._manager.close()


def newest(directory):
  """Step of the newest checkpoint of a directory, or None; changes nothing there."""
  steps = _steps(directory)
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
  targets = {f"{part}/{name}": _target(name, leaf) for name, leaf in _flatten(abstract).items()}

  def read(step):
    written = _agreed(lambda: _read_record(directory, step))
    leaves = {name: leaf for name, leaf in written["leaves"].items()
              if name.startswith(f"{part}/")}
    manifest.check_match(targets, leaves, f"checkpoint {step} in {directory}")
    arrays = _agreed(lambda: _read_leaves(directory, step, targets))
    manifest.check_digests(step, digest.of(arrays), leaves)
    return arrays

  for attempt in range(_REPLACED):
    steps = hosts.leader(lambda: _steps(directory))
    if not steps:
      raise ValueError(f"there is no checkpoint in {directory}")
    try:
      step, restored, _ = _newest_whole(directory, steps, read, strict=False)
      break
    except DamagedError:
      # A run that saves there may have replaced what was being read.
      if hosts.leader(lambda: _steps(directory)) == steps or attempt == _REPLACED - 1:
        raise
  leaves = [restored[name] for name in targets]
  return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _steps(directory):
  """Finished steps, oldest first, read without a manager: a run may be saving there."""
  folder = _folder(directory)
  if not folder.is_dir():
    return []
  found = ocp.path.step.standard_name_format().find_all(folder)
  return sorted(metadata.step for metadata in found)


def _folder(directory):
  return epath.Path(directory if "://" in directory else os.path.abspath(directory))


def _newest_whole(directory, steps, read, strict):
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


def _agreed(call):
  """What `call` reads; DamagedError on all processes where one of them finds damage."""
  found, said = None, ""
  try:
    found = call()
  except DamagedError as error:
    if jax.process_count() == 1:
      raise
    said = str(error)
  for damage in filter(None, hosts.gather(said.encode())):
    raise DamagedError(damage.decode())
  return found


def _reader(handler):
  """A Checkpointer that waits for no other process."""
  own = jax.process_index()
  return ocp.Checkpointer(handler, multiprocessing_options=ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}))


def _text(error):
  """What was raised in a line; "" for nothing."""
  text = " ".join(str(error).split())[:300]
  return "" if error is None else f"{type(error).__name__}: {text}"


def _read_record(directory, step):
  path = _folder(directory) / str(step) / "extra"
  with manifest.reading(step), _reader(ocp.JsonCheckpointHandler()) as reader:
    stored = reader.restore(path, args=ocp.args.JsonRestore())
  return manifest.unseal(stored, step)


def _read_leaves(directory, step, targets):
  """{name: array} of some leaves, on the devices of `targets`: _READ_AT_ONCE bytes at a time."""
  found = {}
  for some in _portions(targets):
    pulse.beat()
    found |= _read_some(directory, step, some)
  return found


def _read_some(directory, step, targets):
  """{name: array} of some leaves, as `targets` have them: on devices, or numpy."""
  path = _folder(directory) / str(step) / "state"
  with manifest.reading(step), _reader(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(path, args=ocp.args.PyTreeRestore(
      item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=True))


def _compare(directory, step, leaves):
  """Reads all leaves of a checkpoint into this host's memory, some at a time; DamagedError."""
  saved = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in leaves.items()}
  for some in _portions(saved):
    targets = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in some.items()}
    digests = digest.of(_read_some(directory, step, targets))
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


def abstract_like(state):
  """`state` as `jax.ShapeDtypeStruct`s with its arrays' shardings, for `Checkpoints.restore`."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _flatten(tree):
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    named[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  return named


def _is_key(leaf):
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_implementation(leaf):
  for name in _KEY_IMPLEMENTATIONS:
    if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == leaf.dtype:
      return name
  raise ValueError(f"PRNG keys of {leaf.dtype} are not supported; use {_KEY_IMPLEMENTATIONS}")


def _target(name, leaf):
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
    raise ValueError(
      f"leaf {name} of the restore target has no sharding; pass ShapeDtypeStructs with shardings"
    )
  sharding = leaf.sharding
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
