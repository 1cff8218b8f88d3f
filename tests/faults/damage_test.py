"""A damaged checkpoint never loads: files deleted, truncated, flipped, over 300 seeded cases."""

import collections
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.run.checkpoint import manager, manifest, reader

CASES = 320
RESUMED = 8  # every 8th case also through the class that a run resumes with
KINDS = ("delete", "truncate", "flip a bit", "flip a bit", "zero a part")

# A restore that fails leaves Orbax's own threads and files to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning")]


def state(step):
  rng = np.random.default_rng(step)
  return {"all": {
    "params": {"w": jnp.float32(rng.normal(size=(64, 32))), "b": jnp.ones(3, jnp.bfloat16)},
    "moments": {"w": jnp.float32(rng.normal(size=(64, 32)))}, "step": jnp.int32(step)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the checkpoints 1 and 2."""
  path = tmp_path_factory.mktemp("intact")
  with manager.Checkpoints(str(path), keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step), {"at": step})
  return path


def files(folder):
  return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def damage(path, kind, rng):
  """Damages one file; False where it is too short for that."""
  with open(path, "rb") as file:
    data = bytearray(file.read())
  if kind == "delete":
    os.remove(path)
    return True
  if not data:
    return False
  if kind == "truncate":
    data = data[:rng.randrange(len(data))]
  elif kind == "flip a bit":
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  else:
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.randrange(1, 64))
    if not any(data[start:start + length]):
      return False
    data[start:start + length] = bytes(length)
  with open(path, "wb") as file:
    file.write(data)
  return True


def assert_is(found, step):
  assert jax.tree.structure(found) == jax.tree.structure(state(step))
  jax.tree.map(np.testing.assert_array_equal, found, state(step))


def test_a_damaged_folder_loads_only_states_that_were_saved(folder, tmp_path):
  target, rng = manager.abstract_like(state(0)), random.Random(0)
  outcomes, copy = collections.Counter(), tmp_path / "copy"
  for case in range(CASES):
    path, kind = rng.choice(files(folder / "2")), rng.choice(KINDS)
    with open(path, "rb") as file:
      content = file.read()
    while not damage(path, kind, rng):
      kind = rng.choice(KINDS)
    step, found = reader.read_part(str(folder), "all", target["all"])
    assert_is({"all": found}, step)
    outcomes[step] += 1
    if case % RESUMED == 0:
      shutil.copytree(folder, copy)
    with open(path, "wb") as file:
      file.write(content)
    if case % RESUMED == 0:
      check_resuming(copy, target, step)
      shutil.rmtree(copy)
  # In the other cases a file of Orbax's own was hit, and the state was read as it was saved.
  assert outcomes[1] >= CASES // 5 and outcomes[1] + outcomes[2] == CASES


def check_resuming(folder, target, intact):
  """A run that resumes in `folder` gets step `intact`; with `strict` it refuses the older one."""
  with manager.Checkpoints(str(folder), keep=2) as checkpoints:
    if intact == 1 and checkpoints.latest() == 2:
      with pytest.raises(manifest.DamagedError, match="checkpoint 2"):
        checkpoints.restore(target, strict=True)
    step, found, extra = checkpoints.restore(target)
    assert step == intact and extra == {"at": step}
    assert_is(found, step)
    assert checkpoints.steps() == list(range(1, step + 1))


def test_a_run_resumes_from_the_older_checkpoint_and_saves_the_damaged_step_anew(folder, tmp_path):
  target, copy = manager.abstract_like(state(0)), tmp_path / "copy"
  shutil.copytree(folder, copy)
  damage_state(copy / "2")
  with manager.Checkpoints(str(copy), keep=2) as checkpoints:
    assert checkpoints.restore(target)[0] == 1
    checkpoints.save(2, state(2), {"at": 2})
  assert sorted(os.listdir(copy)) == ["1", "2", "damaged-2"]
  with manager.Checkpoints(str(copy), keep=2) as checkpoints:
    step, found, _ = checkpoints.restore(target)
  assert step == 2
  assert_is(found, 2)


def test_a_folder_without_an_intact_checkpoint_is_refused_and_unchanged(folder, tmp_path):
  target, copy = manager.abstract_like(state(0)), tmp_path / "copy"
  shutil.copytree(folder, copy)
  for step in ("1", "2"):
    damage_state(copy / step)
  with manager.Checkpoints(str(copy), keep=2) as checkpoints:
    with pytest.raises(manifest.DamagedError, match="no checkpoint in .* is intact: "):
      checkpoints.restore(target)
  assert sorted(os.listdir(copy)) == ["1", "2"]


def damage_state(folder):
  """Empties the largest file of a checkpoint."""
  largest = max(files(folder), key=os.path.getsize)
  with open(largest, "rb+") as file:
    file.truncate(0)
