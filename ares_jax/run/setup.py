"""Turns a config into the parts of a run: model, tokenizer, data, grader. Every command uses it."""

import contextlib
import dataclasses

import jax
import numpy as np

from ares_jax.data.trigger_words import trigger_table
from ares_jax.grading.pool import GradingPool
from ares_jax.models import lora
from ares_jax.models.config import ModelConfig
from ares_jax.run.config import TrainConfig
from ares_jax.run.data import RunData
from ares_jax.run.model import first_weights, open_model
from ares_jax.run.requirements import check_run
from ares_jax.sampling.rollout import Generator
from ares_jax.system.cluster import check_cluster


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run."""

  config: TrainConfig
  model: ModelConfig
  tokenizer: object
  generator: Generator
  words: np.ndarray  # bool [V], tokens of V_sem
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
  opened, grade = open_model(config.model), config.grade
  with GradingPool(grade.workers, grade.timeout, grader=grade.grader,
                   timeout_share=grade.timeout_share) as grader:
    generator = opened.generator(config.prompt, config.engine, grader)
    run = Run(config, opened.config, opened.tokenizer, generator,
              trigger_table(opened.tokenizer, opened.config.vocab),
              RunData(config, generator.encoder, grader, workdir))
    if check:
      check_run(run)
    yield run
