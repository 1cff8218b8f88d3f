"""Replays a batch whose update was left out, and says which of its terms is not finite.

    python -m ares_jax.train --config=configs/ares_tiny.py --workdir=runs/ares_tiny \\
      --replay=runs/ares_tiny/nonfinite/aepo-7.npz

The stage's own step runs once more, on the weights of its newest checkpoint. Where that is not of
the step before, updates in between are missing, or were made since: the output says so. What the
run keeps of itself, its records, checkpoints and metrics, stays as it is.
"""

import functools
import os
import re
import types

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.models.vision import VisionInput
from ares_jax.run.checkpoint.manager import abstract_like
from ares_jax.run.checkpoint.reader import newest_step, read_part
from ares_jax.run.files import current_names
from ares_jax.run.identity import STAGES
from ares_jax.run.loop import NONFINITE
from ares_jax.system import hosts, mesh
from ares_jax.training import aepo_step, sft_step
from ares_jax.training.batch import PackedRows, RolloutBatch
from ares_jax.training.shaping import Controllers

# What a step names, in the order in which it comes by them.
TERMS = ("sampler_logprob", "sampler_entropy", "reward", "logits", "logprob", "reference",
         "sampler_gap", "loss", "gradient")


def replay(parts, workdir, path):
  """Runs the step of a dumped batch once more.

  Args:
    parts: setup.Run.
    workdir: folder of the run.
    path: a file that run_folder.dump_batch wrote.

  Returns:
    {term: values of it that are not finite, or 1 where it is beyond its limit}, in the order in
    which the step computes them: arrays of the batch, weights, what is made of both, the gradient.
    Empty where the update would be applied.
    step: of the checkpoint whose weights were taken; 0 = the first ones.

  Raises:
    ValueError: the file is no dumped batch of a stage.
  """
  stage, number = _parts(path)
  with np.load(path, allow_pickle=False) as file:
    arrays = current_names(dict(file))
  config = getattr(parts.config, stage)
  first, base = _first(parts, workdir, stage)
  if stage == "aepo":
    state = aepo_step.init_state(config, jax.tree.map(jnp.copy, first), base)
    state = state.replace(controllers=Controllers(**mesh.put(_under(arrays, "controllers"))))
  else:
    state = sft_step.init_state(config, first, base)
  folder, step = os.path.join(workdir, stage), 0
  if hosts.on_process_0(functools.partial(newest_step, folder)) is not None:
    for part in ("params", "opt_state"):
      step, value = read_part(folder, part, abstract_like(getattr(state, part)))
      state = state.replace(**{part: value})
  state = state.replace(step=mesh.put(jnp.int32(number - 1)))
  terms = _not_finite("batch", _under(arrays, "batch")) | _not_finite("weights", state.params)
  if stage == "aepo":
    terms |= _not_finite("reference weights", first)
    _, metrics = aepo_step.aepo_step(parts.generator.model, config, state, first, _rollout(arrays),
                                     mesh.put(parts.words), base)
  else:
    _, metrics = sft_step.sft_step(parts.generator.model, config, state, _traces(arrays), base)
  metrics = jax.device_get(metrics)
  terms |= {name: int(metrics[NONFINITE + name]) for name in TERMS
            if metrics.get(NONFINITE + name, 0)}
  if metrics.get("skipped", 0) + metrics.get("update/skipped", 0) and not terms:
    terms["gradient"] = 1
  return terms, step


def replay_text(path, terms, step):
  """What `replay` found, for a terminal."""
  before = _parts(path)[1] - 1
  lines = [f"{path}, with the weights of step {step}:"]
  if step != before:
    lines.append(f"  it was made with those of step {before}, of which the newest checkpoint is "
                 "not: what is made of weights may come out otherwise")
  lines += [f"  {name}: {count}" for name, count in terms.items()]
  lines.append(f"not finite or beyond its limit first: {next(iter(terms))}" if terms else
               "all terms are finite: with these weights the update would be applied")
  return "\n".join(lines)


def _parts(path):
  """(stage, number of the step) in the name of a dumped batch."""
  found = re.fullmatch(rf"({'|'.join(STAGES)})-(\d+)\.npz", os.path.basename(path))
  if not found:
    raise ValueError(f"--replay={path}: the name of a dumped batch is STAGE-STEP.npz, with STAGE "
                     f"one of {', '.join(STAGES)}")
  return found[1], int(found[2])


def _first(parts, workdir, stage):
  """(what the stage started from: of the last stage before it, or the run's first; lora.Base)."""
  first, base = parts.start()
  for earlier in reversed(STAGES[:STAGES.index(stage)]):
    folder = os.path.join(workdir, earlier)
    if hosts.on_process_0(functools.partial(newest_step, folder)) is not None:
      return read_part(folder, "params", abstract_like(first))[1], base
  return first, base


def _under(arrays, name):
  """{path below `name`: array}."""
  return {path[len(name) + 1:]: array for path, array in arrays.items()
          if path.startswith(f"{name}/")}


def _not_finite(name, tree):
  """{"name/path": values that are not finite} of the leaves that have some."""
  counts = {jax.tree_util.keystr(path, simple=True, separator="/"): int((~jnp.isfinite(x)).sum())
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if jnp.issubdtype(x.dtype, jnp.inexact)}
  return {f"{name}/{path}": count for path, count in counts.items() if count}


def _rollout(arrays):
  batch = _under(arrays, "batch")
  own = {name: array for name, array in batch.items() if "/" not in name}
  return RolloutBatch(vision=VisionInput(**_under(batch, "vision")),
                      rows=PackedRows(**_under(batch, "rows")), **own).to_device()


def _traces(arrays):
  batch = _under(arrays, "batch")
  return sft_step.to_device(types.SimpleNamespace(**batch, vision=_under(batch, "vision")))
