"""WORKDIR/nonfinite: dumps of the batches whose update was skipped."""

import glob
import os

import jax
import numpy as np
from absl import logging

from ares_jax.run.files import atomic_write
from ares_jax.system import mesh

_BATCHES = 3  # dumped batches kept


def dump_batch(workdir, stage, step, batch):
  """Writes the batch of a step to WORKDIR/nonfinite/STAGE-STEP.npz, arrays under their tree paths.

  Only the newest three files are kept. A batch that cannot be written is dropped with a warning.
  """
  arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(mesh.fetch(batch))}
  if jax.process_index():
    return
  folder = os.path.join(workdir, "nonfinite")
  try:
    os.makedirs(folder, exist_ok=True)
    with atomic_write(f"{folder}/{stage}-{step}.npz") as path, open(path, "wb") as file:
      np.savez_compressed(file, **arrays)
  except OSError as error:
    # A full disk shall not end the run.
    logging.warning("the batch of %s step %d was not written: %s", stage, step, error)
  for old in sorted(glob.glob(os.path.join(folder, "*.npz")), key=os.path.getmtime)[:-_BATCHES]:
    os.remove(old)
