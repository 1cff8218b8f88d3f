"""Restores the trained parameters of a run: weights, or adapters and the base under them.

Checkpoints of a run that trains adapters lack the base. It is read again from the model's folder
and checked against the digests in WORKDIR/base.json.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp

from ares_jax.models import lora, weights
from ares_jax.run.checkpoint import digest
from ares_jax.run.checkpoint.reader import read_part
from ares_jax.run.files import read_json
from ares_jax.run.identity import flatten, stage_folder
from ares_jax.run.model import first_weights


def restore_params(workdir, stage, config, model, *, step=None):
  """Reads the newest checkpoint of a stage of a run, or that of `step`, onto the current mesh.

  Returns:
    (step, params, base): number of the checkpoint; weights and None, or adapters and their
    lora.Base.

  Raises:
    ValueError: there is no checkpoint, it is of another model, or the base or config.model.lora
      differs from the run's.
  """
  folder, section = stage_folder(workdir, stage), config.model.lora
  devices = jax.sharding.get_mesh()
  _check_lora(workdir, section)
  if not section.rank:
    shapes = weights.abstract(weights.weight_table(model), devices, jnp.float32)
    return *read_part(folder, "params", shapes, step), None
  step, adapters = read_part(folder, "params", lora.abstract(model, section, devices), step)
  base = first_weights(config, model)
  record = read_json(workdir, "base.json")
  if not record:
    raise ValueError(f"{workdir}/base.json, which describes the base of the "
                     f"adapters in {folder}, does not exist; copy the whole folder of the run")
  different = sorted(name for name, found in digest.digest_tree(base).items()
                     if record["base"].get(name) != found)
  if different:
    raise ValueError(f"{workdir} trained adapters of another base: {', '.join(different)} are not "
                     "those of base.json; restore the files under config.model.path")
  return step, adapters, lora.Base(base, section.alpha / section.rank)


def _check_lora(workdir, section):
  """Refuses other settings of adapters than the run's: their scale is in no checkpoint."""
  written = flatten(read_json(workdir, "config.json"))
  if not written and section.rank:
    raise ValueError(f"{workdir}/config.json, which says how the adapters in "
                     f"{workdir} were trained, does not exist; copy the whole folder of the run")
  if not section.rank and not written.get("model.lora.rank"):
    return
  for key, value in json.loads(json.dumps(dataclasses.asdict(section))).items():
    before = written.get(f"model.lora.{key}")
    if before != value:
      raise ValueError(f"{workdir} was trained with model.lora.{key} = {before!r}, not {value!r}; "
                       "set config.model.lora as it was then")
