"""What a run needs before it starts. Each function checks one thing and raises ValueError, whose
message names the key, its value, the limit and what to change."""

import functools

import jax

from ares_jax.models import weights
from ares_jax.run.data import STAGE_OF
from ares_jax.run.identity import STAGES
from ares_jax.sampling.scheduler import plan_cache
from ares_jax.system import hosts, mesh


def check_run(run):
  """Checks a setup.Run against its data and the current mesh."""
  stages = {stage: getattr(run.config, stage) for stage in STAGES
            if getattr(run.config, stage).steps}
  if not stages:
    raise ValueError("warmup.steps, adacs.steps and aepo.steps are all 0: nothing is trained; "
                     "set one above 0")
  data_can_be_used(run, stages)
  frozen_parts_exist(run, stages)
  sizes_divide_over_devices_and_processes(run, stages)
  cache_holds_the_largest_prompts(run, stages)


def data_can_be_used(run, stages):
  """There are enough rows, and no truth of graded data counts as wrong."""
  config = run.config
  needed = {"eval": ("evaluate.problems", config.evaluate.problems), "warmup": ("warmup.batch", 1),
            "sft": ("curate.problems", config.curate.problems), "rl": ("aepo.prompts", 1)}
  kinds = ["eval"] + [kind for kind, stage in STAGE_OF.items() if stage in stages]
  for kind in kinds:
    (key, need), have = needed[kind], len(run.source(kind))
    if have < need:
      raise ValueError(f"config.{key} needs {need} rows of the {kind!r} data, which has {have}; "
                       f"lower it or give more data")
  for kind in sorted({*kinds} - {"warmup"}):
    hosts.on_process_0(functools.partial(run.data.check_truths, kind))


def frozen_parts_exist(run, stages):
  parts = weights.weight_table(run.model)
  for stage, section in stages.items():
    unknown = sorted(set(section.frozen) - set(parts))
    if unknown:
      raise ValueError(f"config.{stage}.frozen names {', '.join(unknown)}, no part of the model; "
                       f"its parts are {', '.join(parts)}")


def sizes_divide_over_devices_and_processes(run, stages):
  rows = {f"{stage}.microbatch": section.microbatch for stage, section in stages.items()}
  batches = {f"{stage}.batch": stages[stage].batch for stage in stages if stage != "aepo"}
  if "aepo" in stages:
    aepo = stages["aepo"]
    rows["aepo.prompts"] = batches["aepo.prompts"] = aepo.prompts
    if not run.config.model.lora.rank and "vision" not in aepo.frozen:
      # A trained vision tower runs over a minibatch's images, each prompt's on one device.
      rows["aepo.minibatch / aepo.group"] = aepo.minibatch // aepo.group
  _check_divide(rows, mesh.size(*mesh.ROWS),
                "devices of the \"slice\" and \"data\" axes; change it or config.mesh")
  _check_divide(batches, jax.process_count(),
                "processes, each of which reads its shard; change it")


def cache_holds_the_largest_prompts(run, stages):
  """The largest prompts of every stage that samples fit into the cache beside their answers."""
  config, devices = run.config, mesh.size(*mesh.ROWS)
  batches = {"evaluate.batch": (config.evaluate.batch, config.evaluate.samples)}
  if "adacs" in stages and config.curate.pass_rates == "probe":
    batches["curate.batch"] = (config.curate.batch, config.curate.samples)
  if "aepo" in stages:
    batches["aepo.prompts"] = (config.aepo.prompts, config.aepo.group)
  for key, (prompts, group) in batches.items():
    try:
      plan_cache(run.model, config.engine, prompts=-(-prompts // devices) * devices, group=group,
                 prompt_tokens=config.prompt.max_tokens[-1], tokens=config.aepo.sampling.max_tokens)
    except ValueError as error:
      raise ValueError(f"config.{key} = {prompts}: {error}") from error


def _check_divide(counts, number, words):
  for key, count in counts.items():
    if count % number:
      raise ValueError(f"config.{key} = {count} does not divide over {number} {words}")
