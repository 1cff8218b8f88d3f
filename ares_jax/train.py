"""Trains a model through both stages of ARES.

    python -m ares_jax.train --config=configs/ares_tiny.py
    python -m ares_jax.train --config=configs/aepo_7b.py --config.model.path=DIR --workdir=DIR

Any number of a config can be set on the command line: --config.aepo.steps=20. The same command in
the same workdir goes on where the last one stopped. Needs no data for configs/ares_tiny.py.
"""

import contextlib
import functools
import json
import os

import jax
from absl import flags, logging
from ml_collections import config_flags

from ares_jax import adacs, aepo, mesh, profiler, pulse, tracking
from ares_jax.command import require_config, run
from ares_jax.fingerprint import fingerprint
from ares_jax.measure import evaluate, level_table, table
from ares_jax.responses import write_held_out
from ares_jax.run_folder import FREE, STAGES, flat, lock, write_json
from ares_jax.setup import open_run, read_config

# Of a stage's evaluation, what is written for people to read.
HELD_OUT = {"problems": 32, "kept": 2}

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
_STRICT = flags.DEFINE_bool("strict", False, "Refuse a damaged checkpoint, take no older one.")
_ALLOW_CHANGE = flags.DEFINE_list(
  "allow_change", [], "Keys of config.json or fingerprint.json that may differ from the workdir's.")
_PROFILE = flags.DEFINE_string(
  "profile", None, "START:STOP, steps of the last stage to trace into WORKDIR/profile, from 0.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/CONFIG_NAME.")


def main():
  values = require_config(_CONFIG.value)
  if _STRICT.value:
    for stage in STAGES:
      values[stage].loop.strict = True
  config = read_config(values)
  name = os.path.splitext(os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"])))
  workdir = os.path.abspath(_WORKDIR.value or os.path.join("runs", name[0]))
  allow = tuple(_ALLOW_CHANGE.value)
  traced = _traced(config, workdir)
  with pulse.requests(), lock(workdir), pulse.watch(
      os.path.join(workdir, "stacks.txt"), config.stall_minutes):
    with jax.set_mesh(mesh.make_mesh(config.mesh.data, config.mesh.model)), \
        open_run(config, workdir=workdir) as parts:
      keep_config(workdir, values, allow)
      keep_fingerprint(workdir, fingerprint(parts), allow)
      with tracking.wandb(config.wandb, workdir, values.to_dict()), traced:
        train(parts, workdir)


def _traced(config, workdir):
  """The context of --profile; of nothing without it."""
  if _PROFILE.value is None:
    return contextlib.nullcontext()
  stage = next((name for name in reversed(STAGES) if getattr(config, name).steps), STAGES[-1])
  steps = profiler.steps(_PROFILE.value, stage, getattr(config, stage).steps)
  return profiler.requested(os.path.join(workdir, "profile"), stage, *steps)


def keep_config(workdir, values, allow=()):
  """Writes WORKDIR/config.json; refuses a workdir that was made with other numbers.

  Only how often a run saves, how it reads and where it runs may change.

  Args:
    workdir: folder of the run.
    values: ConfigDict.
    allow: keys that may differ all the same.

  Raises:
    ValueError: names the keys that differ.
  """
  _keep(workdir, "config.json", json.loads(values.to_json_best_effort()), allow,
        "was made with another config")


def keep_fingerprint(workdir, marks, allow=()):
  """`keep_config` of what the run reads besides: WORKDIR/fingerprint.json, {name: digest}."""
  _keep(workdir, "fingerprint.json", marks, allow, "was made with other files")


def _keep(workdir, name, new, allow, was):
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, name)
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      before, after = flat(json.load(file)), flat(new)
    different = sorted(key for key in before.keys() | after.keys() if not key.startswith(FREE)
                       and (key not in before or key not in after or before[key] != after[key]))
    refused = [key for key in different if key not in allow]
    if refused:
      raise ValueError(f"{workdir} {was}: {', '.join(refused)} differ; use another --workdir, or "
                       f"go on all the same with --allow_change={','.join(refused)}")
    if different:
      logging.warning("%s %s: %s changed, as allowed", workdir, was, ", ".join(different))
  write_json(path, new)


def train(parts, workdir):
  """Runs the stages that have steps; prints and writes WORKDIR/results.json.

  Args:
    parts: setup.Run.
    workdir: folder of the run; what is finished there is not done again.
  """
  config, generator = parts.config, parts.generator
  shared = {"generator": generator, "workdir": workdir, "seed": config.seed,
            "threads": config.threads}
  results = _Results(parts, workdir)
  params = parts.init_params()
  if config.warmup.steps:
    params = adacs.fine_tune(params, parts.source("lessons"), config.warmup, stage="warmup",
                             **shared)
    results.add("warmup", params)
  if config.adacs.steps:
    source = parts.source("curated")
    selected = adacs.curate(params, source, config.curate, generator=generator, workdir=workdir,
                            max_tokens=config.aepo.sampling.max_tokens, seed=config.seed)
    params = adacs.fine_tune(params, selected, config.adacs, stage="adacs", **shared)
    results.add("adacs", params)
  if config.aepo.steps:
    params = aepo.run(params, parts.source("prompts"), config.aepo, words=parts.words,
                      **shared)
    results.add("aepo", params)
  results.show()
  return params


class _Results:
  """Evaluations of finished stages, in WORKDIR/results.json."""

  def __init__(self, parts, workdir):
    self._parts, self._workdir = parts, workdir
    self._path = os.path.join(workdir, "results.json")
    self._results = {}
    if os.path.exists(self._path):
      with open(self._path, encoding="utf-8") as file:
        self._results = json.load(file)

  def add(self, stage, params):
    """Evaluates `params` unless that was done before the run was stopped."""
    config, generator = self._parts.config, self._parts.generator
    steps = getattr(config, stage).steps
    if self._results.get(stage, {}).get("steps") == steps:
      return
    result = evaluate(generator, params, self._parts.source("test"), config.evaluate,
                      max_tokens=config.aepo.sampling.max_tokens, easy=config.aepo.reward.easy,
                      medium=config.aepo.reward.medium, seed=0, show=functools.partial(
                        write_held_out, self._workdir, stage, steps,
                        group=config.evaluate.samples, chat=generator.encoder.chat,
                        **HELD_OUT))
    self._results[stage] = result | {"steps": steps, "seconds": self._seconds(stage)}
    write_json(self._path, self._results)

  def _seconds(self, stage):
    """Seconds of the stage's steps by phase, over all processes that worked on it."""
    spent = {}
    with open(os.path.join(self._workdir, "metrics.jsonl"), encoding="utf-8") as file:
      for line in map(json.loads, file):
        for name, value in line.items() if line["stage"] == stage else ():
          if name.startswith("seconds/"):
            spent[name[8:]] = spent.setdefault(name[8:], 0.0) + value
    return spent

  def show(self):
    """Prints the tables of all stages."""
    print(table(self._results))
    print(level_table(self._results))
    for stage, result in self._results.items():
      spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items())
      print(f"{stage} seconds in its steps: {spent}")


if __name__ == "__main__":
  run(main)
