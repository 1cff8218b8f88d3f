"""Checkpoints of a run: its whole state as a pytree of arrays, and a small JSON beside it.

The state is stored flat, one array per leaf under its path ("params/decoder/q"), so a checkpoint
does not depend on the classes of the records it came from, and a mismatch has a name.
"""

import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp

# jax has no public way from an abstract key's dtype to its implementation but comparing.
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


class Checkpoints:
  """The checkpoints of one directory, newest `keep` of them; saving does not block training.

  Every process of a run makes one, with the same arguments. One per directory at a time.
  """

  def __init__(self, directory, keep):
    """Opens or makes `directory`; what a killed save left is removed in the background.

    Raises:
      ValueError: `keep` < 1.
    """
    if keep < 1:
      raise ValueError(f"keep is {keep}; must be >= 1 or no checkpoint survives")
    self.directory = os.path.abspath(directory) if "://" not in directory else directory
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
      # Named handlers let the manager read a checkpoint's shapes before anything was saved.
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()

  def latest(self):
    """The newest finished step, or None."""
    return self._manager.latest_step()

  def steps(self):
    """All kept steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step, state, extra):
    """Starts to save; returns when the arrays are copied out and may be donated.

    An error of the save before this one (a full disk) is raised here or by `wait`.

    Args:
      step: int, larger than every saved one.
      state: pytree whose leaves are jax or numpy arrays; typed PRNG keys are allowed.
      extra: what `json.dumps` takes, e.g. the position in the data; no NaN.

    Raises:
      ValueError: `step` does not come after the newest one, a leaf is not an array, or `extra`
        is not JSON.
    """
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
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(arrays), extra=ocp.args.JsonSave({"extra": extra})
      ),
    )

  def restore(self, abstract, step=None):
    """Reads a checkpoint onto the shardings of `abstract`.

    Args:
      abstract: pytree like the saved state; leaves are `jax.ShapeDtypeStruct` with a sharding
        (see `abstract_like`), or arrays of the wanted shape, dtype and sharding.
      step: which one; None is the newest.

    Returns:
      (step, state, extra), or None when the directory holds no checkpoint and `step` is None.

    Raises:
      ValueError: no such step; a leaf is missing, extra, or of another shape or dtype (orbax
        would cast it silently); a leaf of `abstract` has no sharding. Up to 8 leaves are named.
    """
    self.wait()
    if step is None:
      step = self.latest()
      if step is None:
        return None
    elif step not in self.steps():
      raise ValueError(f"no checkpoint {step} in {self.directory}; there are {self.steps()}")
    wanted = _flatten(abstract)
    targets = {name: _target(name, leaf) for name, leaf in wanted.items()}
    stored = self._manager.item_metadata(step)["state"]
    _check_match(targets, stored, f"checkpoint {step} in {self.directory}")
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(targets), extra=ocp.args.JsonRestore()
      ),
    )
    leaves = []
    for name, leaf in wanted.items():
      array = restored["state"][name]
      if _is_key(leaf):
        array = jax.random.wrap_key_data(array, impl=_key_implementation(leaf))
      leaves.append(array)
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return step, state, restored["extra"]["extra"]

  def wait(self):
    """Blocks until the save in flight is on disk; raises what went wrong in it."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self):
    """Finishes the save in flight and stops the threads."""
    self._manager.close()


def newest(directory):
  """Step of the newest checkpoint of a directory, or None; changes nothing there."""
  if not os.path.isdir(directory):
    return None
  with _reader(directory) as manager:
    return manager.latest_step()


def read_part(directory, part, abstract):
  """Reads one part of the newest checkpoint of a directory, and changes nothing there.

  Args:
    directory: what a `Checkpoints` was made with.
    part: the state's field, e.g. "params": what else was saved is not read.
    abstract: pytree of that part, as for `Checkpoints.restore`; no PRNG keys.

  Returns:
    (step, the part).

  Raises:
    ValueError: there is no checkpoint, or a leaf of `part` is missing, extra, or of another shape
      or dtype.
  """
  step = newest(directory)
  if step is None:
    raise ValueError(f"there is no checkpoint in {directory}")
  targets = {f"{part}/{name}": _target(name, leaf) for name, leaf in _flatten(abstract).items()}
  with _reader(directory) as manager:
    stored = manager.item_metadata(step)["state"]
    _check_match(targets, {name: leaf for name, leaf in stored.items()
                           if name.startswith(f"{part}/")}, f"checkpoint {step} in {directory}")
    arguments = ocp.args.PyTreeRestore(
      item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=True)
    restored = manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
  leaves = [restored[name] for name in targets]
  return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _reader(directory):
  """A manager that neither saves nor cleans up: a run may be saving there."""
  return ocp.CheckpointManager(
    os.path.abspath(directory),
    options=ocp.CheckpointManagerOptions(read_only=True, create=False),
    item_handlers={"state": ocp.PyTreeCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()})


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


def _check_match(targets, stored, where):
  problems = [f"{name} is not in it" for name in sorted(targets.keys() - stored.keys())]
  problems += [f"{name} is only in it" for name in sorted(stored.keys() - targets.keys())]
  for name in sorted(targets.keys() & stored.keys()):
    want, have = targets[name], stored[name]
    if tuple(want.shape) != tuple(have.shape) or want.dtype != have.dtype:
      problems.append(
        f"{name} is {have.dtype}{list(have.shape)} in it, the run needs "
        f"{want.dtype}{list(want.shape)}"
      )
  if problems:
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise ValueError(
      f"{where} does not fit this run: {'; '.join(problems[:8])}{more}; use the config it was "
      "made with or another workdir"
    )
