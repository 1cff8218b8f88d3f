"""The weights that a run has saved: a checkpoint's, or its adapters and the base under them.

Checkpoints of a run that trains adapters hold adapters alone. The base is read again from where the
run had it, and told by the digests in WORKDIR/base.json.
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp

from ares_jax import digest
from ares_jax.checkpoint_files import read_part
from ares_jax.models import lora, weights
from ares_jax.run_folder import flat
from ares_jax.setup import first_weights


def read(workdir, stage, config, model):
  """(step, what was trained, lora.Base or None) of the newest checkpoint, on the current mesh.

  Args:
    workdir: folder of the run.
    stage: one of run_folder.STAGES.
    config: TrainConfig of the run.
    model: ModelConfig.

  Raises:
    ValueError: there is none, it is of another model, or the base or config.model.lora is another
      one.
  """
  folder, section, devices = os.path.join(workdir, stage), config.model.lora, (
    jax.sharding.get_mesh())
  _check_lora(workdir, section)
  if not section.rank:
    return *read_part(folder, "params", weights.abstract(model, devices, jnp.float32)), None
  step, adapters = read_part(folder, "params", lora.abstract(model, section, devices))
  base = first_weights(config, model)
  path = os.path.join(workdir, "base.json")
  if not os.path.isfile(path):
    raise ValueError(f"{path}, which says what the adapters in {folder} belong to, does not exist; "
                     "copy the whole folder of the run")
  with open(path, encoding="utf-8") as file:
    written = json.load(file)["base"]
  different = sorted(name for name, found in digest.of_tree(base).items()
                     if written.get(name) != found)
  if different:
    raise ValueError(f"{workdir} trained adapters of another base: {', '.join(different)} are not "
                     "those of base.json; restore the files under config.model.path")
  return step, adapters, lora.Base(base, section.alpha / section.rank)


def _check_lora(workdir, section):
  """Refuses other adapters than the run's: what they are multiplied with is in no checkpoint."""
  path = os.path.join(workdir, "config.json")
  if not os.path.isfile(path):
    if section.rank:
      raise ValueError(f"{path}, which says how the adapters in {workdir} were trained, does not "
                       "exist; copy the whole folder of the run")
    return
  with open(path, encoding="utf-8") as file:
    written = flat(json.load(file))
  if not section.rank and not written.get("model.lora.rank"):
    return
  for key, value in json.loads(json.dumps(dataclasses.asdict(section))).items():
    before = written.get(f"model.lora.{key}")
    if before != value:
      raise ValueError(f"{workdir} was trained with model.lora.{key} = {before!r}, not {value!r}; "
                       "set config.model.lora as it was then")
