"""Turns a config into the parts of a run: model, tokenizer, data, grader. Every command uses it."""

import contextlib
import dataclasses
import functools
import glob
import math
import os

import jax
import numpy as np

from ares_jax.data.trigger_words import trigger_table
from ares_jax.grading.judge import Judge
from ares_jax.grading.pool import GradingPool
from ares_jax.grading.scoring import Scorer
from ares_jax.models import lora, weights
from ares_jax.models.config import ModelConfig
from ares_jax.run.config import TrainConfig
from ares_jax.run.data import STAGE_OF, RunData
from ares_jax.run.identity import STAGES
from ares_jax.run.model import first_weights, open_model
from ares_jax.sampling.rollout import Generator
from ares_jax.sampling.scheduler import plan_cache
from ares_jax.system import hosts, mesh
from ares_jax.system.cluster import check_cluster

_TRIED = 4  # rows of each kind of data that reward functions are tried on


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run."""

  config: TrainConfig
  model: ModelConfig
  tokenizer: object
  generator: Generator
  trigger_V: np.ndarray  # bool [V], tokens of V_sem
  data: RunData

  def source(self, name):
    """Rows of "warmup", "sft", "rl" or "eval"."""
    return self.data.source(name)

  def init_params(self):
    """`model.first_weights` of the run."""
    return first_weights(self.config, self.model)

  def start(self):
    """(first value of what is trained, the lora.Base under it or None), on the current mesh."""
    section, params = self.config.model.lora, self.init_params()
    if not section.rank:
      return params, None
    # Not the seed's own key: init_params draws the weights from that one.
    key = jax.random.fold_in(jax.random.key(self.config.seed), section.rank)
    return lora.init(self.model, section, key), lora.Base(params, section.alpha / section.rank)


@dataclasses.dataclass(frozen=True)
class StageContext:
  """The settings of a run that all its stages share; weights, rows and config differ by stage."""

  generator: Generator
  workdir: str  # folder of the run
  seed: int  # seed of shuffles, samples and ties
  threads: int  # threads that read rows
  base: lora.Base | None = None  # frozen weights under the trained adapters; None without adapters


@contextlib.contextmanager
def open_run(config, *, workdir=None, check=True):
  """Run of a TrainConfig, with a grading pool that ends with it.

  Args:
    config: TrainConfig.
    workdir: the run's folder, where rows that are skipped are listed.
    check: whether data and sizes must fit the mesh, as a run that trains needs.
  """
  check_cluster()
  opened = open_model(config.model)
  with _grader(config, workdir) as grader:
    generator = opened.generator(config.prompt, config.engine, grader)
    run = Run(config, opened.config, opened.tokens.tokenizer, generator,
              trigger_table(opened.tokens.tokenizer, opened.config.vocab),
              RunData(config, generator.encoder, grader, workdir))
    if check:
      run = _with_steps(run)  # of a command that trains nothing the training data may be missing
      check_run(run)
    yield run


def _with_steps(run):
  """The Run with the steps of stages whose length is given in epochs."""
  config, steps = run.config, {}
  for stage, kind, batch in (("warmup", "warmup", config.warmup.batch),
                             ("adacs", "", config.adacs.batch),
                             ("aepo", "rl", config.aepo.prompts)):
    section = getattr(config, stage)
    if section.steps and section.epochs:
      if stage == "warmup" and config.data.digits is not None:
        raise ValueError("config.warmup.epochs: the digits problem makes as many rows as the "
                         "warm-up's steps take; set warmup.steps")
      rows = len(run.source(kind)) if kind else config.curate.count
      steps[stage] = dataclasses.replace(section, steps=math.ceil(section.epochs * rows / batch))
  return dataclasses.replace(run, config=dataclasses.replace(config, **steps)) if steps else run


@contextlib.contextmanager
def _grader(config, workdir):
  """The GradingPool of a TrainConfig, or the Scorer that its section `reward` asks for.

  Judges keep their results in the folder `workdir`, if any.
  """
  grade, reward = config.grade, config.reward
  with GradingPool(grade.workers, grade.timeout, grader=grade.grader,
                   timeout_share=grade.timeout_share) as grader:
    if reward.is_default:
      yield grader
      return
    path, others = None, ()
    if workdir is not None:
      path = os.path.join(workdir, hosts.local_name("judge.jsonl"))
      others = sorted(glob.glob(os.path.join(glob.escape(workdir), "judge.jsonl*")))
    with Judge(reward.judge, path, others) as judge, Scorer(
        reward, grader, workers=grade.workers, timeout=grade.timeout,
        max_tokens=config.aepo.sampling.max_tokens, judge=judge) as scorer:
      yield scorer


def check_run(run):
  """Checks a Run against its data and the current mesh.

  Raises:
    ValueError: names a key, its value, the limit and the change that helps.
  """
  stages = {stage: getattr(run.config, stage) for stage in STAGES
            if getattr(run.config, stage).steps}
  if not stages:
    raise ValueError("warmup.steps, adacs.steps and aepo.steps are all 0: nothing is trained; "
                     "set one above 0")
  _check_data(run, stages)
  _check_frozen_parts(run, stages)
  _check_sizes(run, stages)
  _check_cache(run, stages)


def _check_data(run, stages):
  """Raises ValueError if rows are too few, or if a truth of graded data counts as wrong."""
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
    if isinstance(run.generator.grader, Scorer):
      source = run.source(kind)
      rows = [source[index] for index in range(min(_TRIED, len(source)))]
      hosts.on_process_0(functools.partial(run.generator.grader.try_out, rows,
                                           entropies=kind != "sft"))


def _check_frozen_parts(run, stages):
  parts = weights.weight_table(run.model)
  for stage, section in stages.items():
    unknown = sorted({*section.frozen} - {*parts, "vision"})  # a text model has no tower
    if unknown:
      raise ValueError(f"config.{stage}.frozen names {', '.join(unknown)}, no part of the model; "
                       f"its parts are {', '.join(parts)}")


def _check_sizes(run, stages):
  """Raises ValueError if microbatches do not divide over devices, or batches over processes."""
  rows = {f"{stage}.microbatch": section.microbatch for stage, section in stages.items()}
  batches = {f"{stage}.batch": stages[stage].batch for stage in stages if stage != "aepo"}
  if "aepo" in stages:
    aepo = stages["aepo"]
    rows["aepo.prompts"] = batches["aepo.prompts"] = aepo.prompts
    if run.model.vision and not run.config.model.lora.rank and "vision" not in aepo.frozen:
      # A trained vision tower runs over a minibatch's images, each prompt's on one device.
      rows["aepo.minibatch / aepo.group"] = aepo.minibatch // aepo.group
  _check_divide(rows, mesh.size(*mesh.ROWS),
                "devices of the \"slice\" and \"data\" axes; change it or config.mesh")
  _check_divide(batches, jax.process_count(),
                "processes, each of which reads its shard; change it")


def _check_cache(run, stages):
  """Raises ValueError if the largest prompts and their answers do not fit into the cache."""
  config, devices = run.config, mesh.size(*mesh.ROWS)
  batches = {"evaluate.batch": (config.evaluate.batch, config.evaluate.samples)}
  if "aepo" in stages and config.aepo.validate[0]:
    _, problems, samples = config.aepo.validate
    batches["aepo.validate"] = min(config.evaluate.batch, problems), samples
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
