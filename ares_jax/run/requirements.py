"""What a run needs before it starts. Each function checks one thing and raises ValueError, whose
message names the key, its value, the limit and what to change."""

import functools

import jax

from ares_jax.models import weights
from ares_jax.run.identity import STAGES
from ares_jax.sampling.scheduler import plan_cache
from ares_jax.system import hosts, mesh


def check_run(run):
  """Checks a setup.Run against its data and the current mesh."""
  for require in (some_stage_runs, data_have_enough_rows, truths_can_be_met, frozen_parts_exist,
                  sizes_divide_over_devices, batches_divide_over_processes,
                  cache_holds_the_largest_prompts):
    require(run)


def some_stage_runs(run):
  if not _stages(run):
    raise ValueError("warmup.steps, adacs.steps and aepo.steps are all 0: nothing is trained; "
                     "set one above 0")


def data_have_enough_rows(run):
  for key, (name, need) in _rows_needed(run).items():
    have = len(run.source(name))
    if have < need:
      raise ValueError(f"config.{key} needs {need} rows of the {name!r} data, which has {have}; "
                       f"lower it or give more data")


def truths_can_be_met(run):
  """Reads all rows of graded data once."""
  for name in sorted({name for name, _ in _rows_needed(run).values()} - {"warmup"}):
    hosts.on_process_0(functools.partial(run.data.check_truths, name))


def frozen_parts_exist(run):
  parts = weights.weight_table(run.model)
  for stage in _stages(run):
    unknown = sorted(set(getattr(run.config, stage).frozen) - set(parts))
    if unknown:
      raise ValueError(f"config.{stage}.frozen names {', '.join(unknown)}, no part of the model; "
                       f"its parts are {', '.join(parts)}")


def sizes_divide_over_devices(run):
  config, devices = run.config, mesh.size(*mesh.ROWS)
  counts = {f"{stage}.microbatch": getattr(config, stage).microbatch for stage in _stages(run)}
  if config.aepo.steps:
    counts["aepo.prompts"] = config.aepo.prompts
    if not config.model.lora.rank and "vision" not in config.aepo.frozen:
      # A trained vision tower runs over a minibatch's images, each prompt's on one device.
      counts["aepo.minibatch / aepo.group"] = config.aepo.minibatch // config.aepo.group
  for key, count in counts.items():
    if count % devices:
      raise ValueError(f"config.{key} = {count} does not divide over {devices} devices of the "
                       "\"slice\" and \"data\" axes; change it or config.mesh")


def batches_divide_over_processes(run):
  config, processes = run.config, jax.process_count()
  counts = {f"{stage}.batch": getattr(config, stage).batch for stage in _stages(run)
            if stage != "aepo"}
  if config.aepo.steps:
    counts["aepo.prompts"] = config.aepo.prompts
  for key, count in counts.items():
    if count % processes:
      raise ValueError(f"config.{key} = {count} does not divide over {processes} processes, each "
                       "of which reads its shard; change it")


def cache_holds_the_largest_prompts(run):
  """The largest prompts of every stage that samples fit into the cache beside their answers."""
  config, devices = run.config, mesh.size(*mesh.ROWS)
  batches = {"evaluate.batch": (config.evaluate.batch, config.evaluate.samples)}
  if config.adacs.steps and config.curate.pass_rates == "probe":
    batches["curate.batch"] = (config.curate.batch, config.curate.samples)
  if config.aepo.steps:
    batches["aepo.prompts"] = (config.aepo.prompts, config.aepo.group)
  for key, (prompts, group) in batches.items():
    try:
      plan_cache(run.model, config.engine, prompts=-(-prompts // devices) * devices, group=group,
                 prompt_tokens=config.prompt.max_tokens[-1], tokens=config.aepo.sampling.max_tokens)
    except ValueError as error:
      raise ValueError(f"config.{key} = {prompts}: {error}") from error


def _stages(run):
  return [stage for stage in STAGES if getattr(run.config, stage).steps]


def _rows_needed(run):
  """{key that sets the number: (name of the data, rows)} of the evaluation and all stages."""
  config = run.config
  needed = {"evaluate.problems": ("eval", config.evaluate.problems)}
  if config.warmup.steps:
    needed["warmup.batch"] = ("warmup", 1)
  if config.adacs.steps:
    needed["curate.problems"] = ("sft", config.curate.problems)
  if config.aepo.steps:
    needed["aepo.prompts"] = ("rl", 1)
  return needed
