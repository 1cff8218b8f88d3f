"""Checkpoints of a run: its whole state as a pytree of arrays, and a small JSON beside it.

The state is stored flat, so a checkpoint does not depend on the classes of the records it came
from, and a mismatch has a name. The JSON holds a record of every leaf (manifest.py): dtype, shape
and the digest it had on the devices. How it is read: checkpoint_files.py.
"""

import concurrent.futures
import contextlib
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ares_jax.run.checkpoint import digest, manifest
from ares_jax.run.checkpoint import reader as files
from ares_jax.system import hosts


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
    self.directory = str(files.folder_of(directory))
    self._keep = keep
    hosts.on_process_0(lambda: files.folder_of(directory).mkdir(parents=True, exist_ok=True))
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
    for name, leaf in files.flatten(state).items():
      if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(f"state leaf {name} is {type(leaf).__name__}; save arrays only")
      arrays[name] = jax.random.key_data(leaf) if files.is_key(leaf) else leaf
    written = manifest.make_manifest(arrays, extra)
    try:
      self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays),
                                                       extra=ocp.args.JsonSave(
                                                         manifest.with_checksum(written))),)
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
      files.compare(self.directory, step, {
        name: leaves[name] for name in hosts.local_shard(list(leaves))})
    except Exception as raised:
      error = raised
    self._settled += 1
    said = hosts.gather_errors(f"{self.directory}/{self._settled}", _text(error))
    if any(said):
      # Orbax keeps a failed save's error and its temporary folder: a new manager forgets both.
      if jax.process_index() == 0:
        with contextlib.suppress(OSError):
          (files.folder_of(self.directory) / str(step)).rmtree(missing_ok=True)
      # None may list the folder that another one is removing.
      hosts.gather_errors(f"{self.directory}/{self._settled}/removed", "")
      self._manager = self._open()
      raise self._failed(step, next(filter(None, said))) from error
    for old in self.steps()[:-self._keep]:
      try:
        self._manager.delete(old)
      except (OSError, jax.errors.JaxRuntimeError) as error:
        # The new one is whole: a save it is. The next save removes it.
        logging.warning("%s: checkpoint %d is not removed: %s", self.directory, old, error)

  def _failed(self, step, text):
    steps = files.all_steps(self.directory)
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
    steps = hosts.on_process_0(self.steps)
    if step is not None and step not in steps:
      raise ValueError(f"no checkpoint {step} in {self.directory}; there are {steps}")
    if not steps:
      return None
    targets = {name: files.target(name, leaf) for name, leaf in files.flatten(abstract).items()}

    def read(step):
      written = files.agreed(lambda: files.read_record(self.directory, step))
      manifest.check_match(targets, written["leaves"], f"checkpoint {step} in {self.directory}")
      arrays = files.agreed(lambda: files.read_leaves(self.directory, step, targets))
      manifest.check_digests(step, digest.digest_arrays(arrays), written["leaves"])
      return arrays, written["extra"]

    step, (arrays, extra), damaged = files.newest_complete(
      self.directory, steps if step is None else [step], read, strict)
    hosts.on_process_0(lambda: self._set_aside(damaged))
    if damaged:
      self._manager.reload()
    leaves = [
      jax.random.wrap_key_data(arrays[name], impl=files.key_implementation(leaf))
      if files.is_key(leaf) else arrays[name] for name, leaf in files.flatten(abstract).items()]
    return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), extra

  def _set_aside(self, damaged):
    for bad in damaged:
      aside = files.folder_of(self.directory) / f"damaged-{bad}"
      aside.rmtree(missing_ok=True)
      (files.folder_of(self.directory) / str(bad)).rename(aside)

  def check(self):
    """Raises, without waiting, what went wrong in a save that has ended: OSError."""
    if self._saving is not None and not hosts.any_process(not self._saving.done()):
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


def _text(error):
  """What was raised in a line; "" for nothing."""
  text = " ".join(str(error).split())[:300]
  return "" if error is None else f"{type(error).__name__}: {text}"


def abstract_like(state):
  """`state` as `jax.ShapeDtypeStruct`s with its arrays' shardings, for `Checkpoints.restore`."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
