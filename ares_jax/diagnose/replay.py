"""Replays a batch whose update was skipped, and names the terms that are not finite.

    python -m ares_jax.train --config=configs/ares_tiny.py --workdir=runs/ares_tiny \\
      --replay=runs/ares_tiny/nonfinite/aepo-7.npz

The stage's step runs once more, with the weights of its newest checkpoint. If that checkpoint is
not from the step before the batch, the weights differ from those of the run, and the output says
so. Records, checkpoints and metrics of the run do not change.
"""

import functools
import os
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ares_jax.models.vision import VisionInput
from ares_jax.run.checkpoint.digest import flatten
from ares_jax.run.checkpoint.manager import abstract_like
from ares_jax.run.checkpoint.reader import newest_step, read_part
from ares_jax.run.files import current_names
from ares_jax.run.identity import STAGES, stage_folder
from ares_jax.run.loop import NONFINITE
from ares_jax.system import hosts, mesh
from ares_jax.system.gcs import bucket_errors
from ares_jax.training import aepo_step, sft_step
from ares_jax.training.batch import AnswerScores, PackedRows, RolloutBatch
from ares_jax.training.shaping import Controllers

# Terms that a step counts, in the order in which it computes them.
TERMS = ("sampler_logprob", "sampler_entropy", "reward", "logits", "logprob", "reference",
         "sampler_gap", "loss", "gradient")


def replay(parts, workdir, path):
  """Runs the step of a batch that the run of a setup.Run dumped into WORKDIR/nonfinite/ once more.

  Returns:
    terms: {term: number of its values that are not finite, or 1 if it exceeds its limit}, in the
      order of computation: arrays of the batch, weights, terms computed from both, the gradient.
      Empty if the update would be applied.
    step: of the checkpoint with these weights; 0 for the stage's first weights.
  """
  stage, number = _stage_and_step(path)
  with bucket_errors(path), epath.Path(path).open("rb") as opened, \
      np.load(opened, allow_pickle=False) as file:
    arrays = current_names(dict(file))
  config = getattr(parts.config, stage)
  first, base = _start_of_stage(parts, workdir, stage)
  if stage == "aepo":
    state = aepo_step.init_state(config, jax.tree.map(jnp.copy, first), base)
    state = state.replace(controllers=Controllers(**mesh.put(_under(arrays, "controllers"))))
  else:
    state = sft_step.init_state(config, first, base)
  folder, step = stage_folder(workdir, stage), 0
  if hosts.on_process_0(functools.partial(newest_step, folder)) is not None:
    for part in ("params", "opt_state"):
      step, value = read_part(folder, part, abstract_like(getattr(state, part)))
      state = state.replace(**{part: value})
  state = state.replace(step=mesh.put(jnp.int32(number - 1)))
  batch = _under(arrays, "batch")
  terms = _not_finite("batch", batch) | _not_finite("weights", state.params)
  if stage == "aepo":
    terms |= _not_finite("reference weights", first)
    _, metrics = aepo_step.aepo_step(parts.generator.model, config, state, first, _rollout(batch),
                                     mesh.put(parts.trigger_V), base)
  else:
    rows = types.SimpleNamespace(**batch, vision=_under(batch, "vision"), rows=len(batch["tokens"]))
    _, metrics = sft_step.sft_step(parts.generator.model, config, state, sft_step.to_device(rows),
                                   base)
  metrics = jax.device_get(metrics)
  terms |= {name: int(metrics[NONFINITE + name]) for name in TERMS
            if metrics.get(NONFINITE + name, 0)}
  if metrics.get("skipped", 0) + metrics.get("update/skipped", 0) and not terms:
    terms["gradient"] = 1
  return terms, step


def replay_text(path, terms, step):
  """The result of `replay` in words, for a terminal."""
  before = _stage_and_step(path)[1] - 1
  lines = [f"{path}, with the weights of step {step}:"]
  if step != before:
    lines.append(f"  the batch came from step {before}, but the newest checkpoint is step {step}: "
                 "values that depend on weights may differ")
  lines += [f"  {name}: {count}" for name, count in terms.items()]
  lines.append(f"first term that is not finite or exceeds its limit: {next(iter(terms))}" if terms
               else "all terms are finite: with these weights the update would be applied")
  return "\n".join(lines)


def _stage_and_step(path):
  """(stage, number of the step) from the name of a dumped batch."""
  found = re.fullmatch(rf"({'|'.join(STAGES)})-(\d+)\.npz", os.path.basename(path))
  if not found:
    raise ValueError(f"--replay={path}: the name of a dumped batch is STAGE-STEP.npz, with STAGE "
                     f"one of {', '.join(STAGES)}")
  return found[1], int(found[2])


def _start_of_stage(parts, workdir, stage):
  """(params that the stage started from, lora.Base or None)."""
  first, base = parts.start()
  for earlier in reversed(STAGES[:STAGES.index(stage)]):
    folder = stage_folder(workdir, earlier)
    if hosts.on_process_0(functools.partial(newest_step, folder)) is not None:
      return read_part(folder, "params", abstract_like(first))[1], base
  return first, base


def _under(arrays, name):
  """{path below `name`: array} of a dump, whose paths are joined by slashes."""
  return {path[len(name) + 1:]: array for path, array in arrays.items()
          if path.startswith(f"{name}/")}


def _not_finite(name, tree):
  """{"name/path": number of values that are not finite}, without leaves that have none."""
  counts = {path: int((~jnp.isfinite(x)).sum()) for path, x in flatten(tree).items()
            if jnp.issubdtype(x.dtype, jnp.inexact)}
  return {f"{name}/{path}": count for path, count in counts.items() if count}


def _rollout(batch):
  arrays = {name: array for name, array in batch.items() if "/" not in name}
  scores = _under(batch, "scores")
  batch = RolloutBatch(vision=VisionInput(**_under(batch, "vision")),
                       rows=PackedRows(**_under(batch, "rows")),
                       scores=AnswerScores(**scores) if scores else None, **arrays)
  return batch.to_device(len(batch.vision.image), batch.rows.tokens.shape[2])

