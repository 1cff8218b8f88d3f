"""Trains a model through both stages of ARES.

    python -m ares_jax.train --config=configs/ares_tiny.py
    python -m ares_jax.train --config=configs/aepo_7b.py --config.model.path=DIR --workdir=DIR

Any number in a config can be set on the command line: --config.aepo.steps=20. The same command in
the same workdir resumes where the last one stopped. configs/ares_tiny.py needs no data.

The probe of stage 1 can answer its problems in shards on several machines: --curate=3/8 runs the
fourth of eight and leaves its lines in WORKDIR/curation/, which the run itself then uses.
--curate=all stops after the curation's report.

With --restarts=5 a supervisor starts the run again when its process, or that of another host, is
lost or hangs, at most 5 times.
"""

if __name__ == "__main__":
  from ares_jax.system import command, supervisor

  supervisor.supervise_if_asked()
  command.begin("train", needs_config=True)

import contextlib
import functools
import json
import os

import jax
from absl import flags
from clu import parameter_overview
from etils import epath
from ml_collections import config_flags

from ares_jax import adacs, aepo
from ares_jax.data.curation import pass_rates
from ares_jax.diagnose.replay import replay, replay_text
from ares_jax.evaluation.held_out import StageResults
from ares_jax.evaluation.validate import Validation
from ares_jax.models import lora
from ares_jax.plan import check
from ares_jax.run import bucket, identity, starts, wandb
from ares_jax.run.config import read_config
from ares_jax.run.files import RENAMED_SETTINGS, write_text
from ares_jax.run.identity import STAGES
from ares_jax.run.lock import one_run
from ares_jax.run.setup import StageContext, open_run
from ares_jax.system import heartbeat, hosts, mesh, profiler
from ares_jax.system.cluster import join_cluster
from ares_jax.system.command import require_config, run
from ares_jax.system.gcs import bucket_errors

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, see configs/.")
_STRICT = flags.DEFINE_bool("strict", False, "Refuse a damaged checkpoint; use no older one.")
_ALLOW_CHANGE = flags.DEFINE_list(
  "allow_change", [],
  "Keys of config.json, fingerprint.json or base.json that may differ from the workdir's.")
_CHECK = flags.DEFINE_bool(
  "check", False, "Compile the largest programs and print their memory; no training.")
_REPLAY = flags.DEFINE_string(
  "replay", "", "File in WORKDIR/nonfinite: shows which of its terms is not finite; no training.")
_PROFILE = flags.DEFINE_string(
  "profile", None, "START:STOP, steps of the last stage, from 0, to trace into WORKDIR/profile.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, on a disk or gs://BUCKET/RUN; default runs/CONFIG_NAME.")
_CURATE = flags.DEFINE_string("curate", "", "all: stop after curation; 3/8: only this shard of it.")
# system/supervisor.py reads this flag, before jax is imported.
flags.DEFINE_integer(
  "restarts", 0, "How often the run is started again when its process, or that of another host, is "
  "lost or hangs.", lower_bound=0)


def main():
  values = require_config(_CONFIG.value)
  if _STRICT.value:
    for stage in STAGES:
      values[stage].loop.strict = True
  with bucket_errors(_address()):
    has_begun = (epath.Path(_address()) / "config.json").exists()
  config = read_config(values, new=not has_begun)
  shard = adacs.parse_shard(_CURATE.value, config)
  address = _address(shard)
  if not any(getattr(config, stage).epochs for stage in STAGES):
    _traced_steps(config)  # a wrong --profile is an error before anything is opened
  with join_cluster(config.hosts), heartbeat.stop_signals(), one_run(address) as workdir, \
      heartbeat.watchdog(os.path.join(workdir, hosts.local_name("stacks.txt")),
                         config.stall_minutes, functools.partial(bucket.upload, workdir)):
    identity.check_equal(values, str(workdir), {flag.name: flag.value for flag in (
      _ALLOW_CHANGE, _CHECK, _REPLAY, _PROFILE, _CURATE)})
    settings = json.loads(values.to_json_best_effort())
    if not _CHECK.value:  # --check may try other numbers in the folder of a run
      # Early, for open_run may read all rows; written when the data are found to be usable.
      hosts.on_process_0(lambda: identity.check_records(
        workdir, {"config.json": settings}, _ALLOW_CHANGE.value))
    devices = mesh.make_mesh(config.mesh.data, config.mesh.model, slices=config.mesh.slice)
    with jax.set_mesh(devices), open_run(config, workdir=workdir, check=not shard) as parts:
      config = parts.config  # with the steps that its epochs make
      traced = _traced_steps(config)
      if _CHECK.value:
        checked = check.check_programs(config, parts.model, parts.generator.end)
        _print(check.memory_table(checked))
        check.require_fit(checked, config, parts.model)
      elif _REPLAY.value:
        _print(replay_text(_REPLAY.value, *replay(parts, workdir, _REPLAY.value)))
      else:
        records = {"config.json": settings, "fingerprint.json": identity.fingerprint(parts)}
        hosts.check_same(records["fingerprint.json"], "reads other files")
        hosts.on_process_0(lambda: identity.keep_records(workdir, records, _ALLOW_CHANGE.value))
        if jax.process_index() == 0:
          starts.note_start(workdir)
        if shard:
          adacs.curate_shard(parts, workdir, shard)
          return
        profile = profiler.profile_steps(os.path.join(workdir, "profile"), *traced) if traced \
          else contextlib.nullcontext()
        with check.suggest_on_oom(config, parts.model, workdir), profile, \
            wandb.wandb(config.wandb, workdir, values.to_dict()):
          check.compile_longest_first(config, parts.model, parts.generator.end, workdir)
          train(parts, workdir, until="curation" if _CURATE.value else "end",
                allow=_ALLOW_CHANGE.value)


def train(parts, workdir, until="end", allow=()):
  """Runs the stages that have steps; prints and writes WORKDIR/results.json.

  Args:
    parts: setup.Run.
    workdir: folder of the run; what is finished there is not done again.
    until: "curation" ends before stage 1 learns from the responses that were chosen.
    allow: keys of base.json that may differ.

  Returns:
    the trained weights or adapters.
  """
  config = parts.config
  results = StageResults(parts, workdir)
  params, base = parts.start()
  if base is not None:
    identity.keep_base(workdir, base, allow)
  if jax.process_index() == 0:
    table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
    with contextlib.suppress(OSError):  # for people alone; a disk that refuses it stops no run
      write_text(os.path.join(workdir, "parameters.txt"), table + "\n")
  context = StageContext(parts.generator, workdir, config.seed, config.threads, base)
  if config.warmup.steps:
    params = adacs.fine_tune(params, parts.source("warmup"), config.warmup, context, stage="warmup")
    results.add("warmup", lora.join(base, params))
  if config.adacs.steps:
    probe = adacs.Probe(lora.join(base, params), config.aepo.sampling.max_tokens)
    selected = adacs.curate(probe, parts.source("sft"), config.curate, context)
    if until == "curation":
      return params
    params = adacs.fine_tune(params, selected, config.adacs, context, stage="adacs")
    results.add("adacs", lora.join(base, params))
  if config.aepo.steps:
    params = aepo.train_aepo(params, parts.source("rl"), config.aepo, context,
                             trigger_V=parts.trigger_V,
                             validation=Validation(parts) if config.aepo.validate[0] else None)
    results.add("aepo", lora.join(base, params))
  results.show()
  return params


def _address(shard=None):
  """Folder of the run, or of one shard of its curation, on a disk or in a bucket."""
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  name = os.path.splitext(os.path.basename(path))[0]
  workdir = bucket.absolute(_WORKDIR.value or os.path.join("runs", name))
  return pass_rates.shard_folder(workdir, shard) if shard else workdir


def _traced_steps(config):
  """(stage, START, STOP) of --profile; None without the flag."""
  if _PROFILE.value is None:
    return None
  stage = next((name for name in reversed(STAGES) if getattr(config, name).steps), STAGES[-1])
  return stage, *profiler.parse_steps(_PROFILE.value, stage, getattr(config, stage).steps)


def _print(text):
  """Prints on process 0."""
  if jax.process_index() == 0:
    print(text, flush=True)


if __name__ == "__main__":
  run(main, renamed=RENAMED_SETTINGS)
