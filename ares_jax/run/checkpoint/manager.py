"""Saves, restores and deletes the checkpoints of a stage.

A checkpoint holds the complete state as a flat dict of arrays, so it does not depend on the classes
of the state's records, and JSON with the dtype, the shape and the on-device digest of every leaf
(manifest.py). reader.py reads checkpoints without this class.
"""

import concurrent.futures
import contextlib
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ares_jax.run.checkpoint import manifest, reader
from ares_jax.run.checkpoint.digest import flatten
from ares_jax.system import hosts
from ares_jax.system.gcs import bucket_errors


class Checkpoints:
  """The newest `keep` checkpoints of a directory, and the best; saving does not block training.

  A save is written, read back and verified in the background; only then are older ones deleted.
  Every process of a run makes an instance, with the same arguments; one per directory at a time.
  """

  def __init__(self, directory, keep):
    """Opens or makes `directory`; the remains of a killed save are removed in the background."""
    if keep < 1:
      raise ValueError(f"keep is {keep}; must be >= 1 or no checkpoint survives")
    self.directory = str(reader.folder_of(directory))
    self._keep = keep
    self.kept_step = None  # the best step, which is not deleted
    with bucket_errors(self.directory):
      hosts.on_process_0(lambda: reader.folder_of(directory).mkdir(parents=True, exist_ok=True))
      self._manager = self._open()
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving = None  # Future of the running save
    self._ended = 0  # saves that have succeeded or failed

  def _open(self):
    return ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None,  # _finish_save deletes; Orbax would before the new one is verified
        create=False,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # With named processes Orbax's barriers need no device and work in any thread.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          active_processes=set(range(jax.process_count())))),
      # With named handlers the manager can read the shapes of a checkpoint before the first save.
      item_handlers={"state": ocp.StandardCheckpointHandler(),
                     "extra": ocp.JsonCheckpointHandler()})

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # After an error on this process alone, closing would wait for the others forever.
    if kind is None or jax.process_count() == 1:
      self.close()

  def latest(self):
    """The newest step, being saved or finished, or None."""
    return self._manager.latest_step()

  def steps(self):
    """All steps in the directory, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step, state, extra, *, is_best=False):
    """Starts a save; returns when the arrays are copied and may be donated.

    Where it `is_best`, it is kept until a better one is on disk. Raises ValueError if `step` is not
    larger than every saved step, `state` is no pytree of jax or numpy arrays, or `extra` is not
    JSON; OSError if the save before this one failed.
    """
    self.wait()
    newest = self.latest()
    if newest is not None and step <= newest:
      raise ValueError(f"step {step} is not after the newest checkpoint {newest} in "
                       f"{self.directory}; resume from it or use another workdir")
    try:
      json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
      raise ValueError(f"extra of checkpoint {step} is not JSON: {error}") from error
    arrays = flatten(state)
    for name, leaf in arrays.items():
      if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise ValueError(f"state leaf {name} is {type(leaf).__name__}; save arrays only")
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"state leaf {name} is a typed PRNG key; save its jax.random.key_data")
    record = manifest.make_manifest(arrays, extra)
    try:
      self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),
        extra=ocp.args.JsonSave(manifest.with_checksum(record))))
    except Exception as error:  # a bucket's errors have no common class
      failure = self._failure(step, manifest.describe(error))
      if jax.process_count() > 1:
        # No second try: the others are still waiting inside the save that this process left.
        raise ValueError(str(failure)) from error
      self._manager = self._open()
      raise failure from error
    self._saving = self._worker.submit(self._finish_save, step, record["leaves"], is_best)

  def _finish_save(self, step, leaves, is_best):
    """Waits for a save, reads it back and deletes the checkpoints that are older than `keep`."""
    error, text = None, ""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      reader.verify_on_disk(self.directory, step, {
        name: leaves[name] for name in hosts.local_shard(list(leaves))})
    except Exception as raised:
      error, text = raised, manifest.describe(raised)
    self._ended += 1
    errors = hosts.gather_errors(f"{self.directory}/{self._ended}", text)
    if any(errors):
      # Orbax keeps a failed save's error and its temporary folder; a new manager drops both.
      with contextlib.suppress(Exception):
        if jax.process_index() == 0:
          (reader.folder_of(self.directory) / str(step)).rmtree(missing_ok=True)
      # No process may list the folder while process 0 removes it.
      hosts.gather_errors(f"{self.directory}/{self._ended}/removed", "")
      self._manager = self._open()
      raise self._failure(step, next(filter(None, errors))) from error
    if is_best:
      self.kept_step = step
    for old in set(self.steps()[:-self._keep]) - {self.kept_step}:
      try:
        self._manager.delete(old)
      except Exception as error:
        # The new checkpoint is valid; the next save retries this deletion.
        logging.warning("%s: checkpoint %d is not removed: %s", self.directory, old, error)

  def _failure(self, step, text):
    steps = reader.all_steps(self.directory)
    older = f"step {steps[-1]} is intact" if steps else "there is none before it"
    return OSError(f"saving checkpoint {step} in {self.directory} failed, {older}: {text}")

  def restore(self, abstract, step=None, *, strict=False):
    """Reads a checkpoint onto the shardings of `abstract`.

    If an older one is intact, damaged newer ones are renamed to `damaged-STEP`, with a warning.

    Args:
      abstract: pytree like the saved state, of arrays or `abstract_like`'s ShapeDtypeStructs.
      step: the step to restore; None is the newest intact one.
      strict: whether to refuse when the newest one is damaged.

    Returns:
      (step, state, extra), or None when the directory holds no checkpoint and `step` is None.

    Raises:
      DamagedError: no checkpoint is intact, or `step` is not, or the newest is not and `strict`.
      ValueError: no such step, or the checkpoint does not fit `abstract`; up to 8 leaves are named.
    """
    self.wait()
    steps = hosts.on_process_0(self.steps)
    if step is not None and step not in steps:
      raise ValueError(f"no checkpoint {step} in {self.directory}; there are {steps}")
    if not steps:
      return None
    targets = {name: reader.target(name, leaf) for name, leaf in flatten(abstract).items()}

    step, (arrays, extra), damaged = reader.newest_intact(
      self.directory, steps if step is None else [step], targets, strict=strict)
    hosts.on_process_0(lambda: self._rename_damaged(damaged))
    if damaged:
      self._manager.reload()
    leaves = [arrays[name] for name in targets]
    return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), extra

  def _rename_damaged(self, steps):
    folder = reader.folder_of(self.directory)
    with bucket_errors(self.directory):
      for step in steps:
        renamed = folder / f"damaged-{step}"
        renamed.rmtree(missing_ok=True)
        (folder / str(step)).rename(renamed)

  def check(self):
    """Raises the OSError of a failed save; does not wait for a save that is still running."""
    if self._saving is not None and not hosts.any_process(not self._saving.done()):
      self.wait()

  def wait(self):
    """Blocks until the running save is on disk and verified; raises its OSError."""
    if self._saving is not None:
      saving, self._saving = self._saving, None
      saving.result()

  def close(self):
    """Finishes the running save and stops the threads."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._manager.close()


def abstract_like(state):
  """The leaves of `state` as ShapeDtypeStructs with their shardings, for `Checkpoints.restore`."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
