"""The records of a config, with `TrainConfig` at the top; configs/*.py hold the numbers."""

import contextlib
import dataclasses
import operator
import os
from typing import Literal

from ares_jax.data.prompts import PromptConfig
from ares_jax.grading.scoring import ScoreConfig
from ares_jax.models import lora
from ares_jax.models.config import VisionConfig
from ares_jax.run.data import DataConfig
from ares_jax.run.files import RENAMED_SETTINGS
from ares_jax.run.wandb import WandbConfig
from ares_jax.sampling.groups import FilterConfig
from ares_jax.sampling.sampler import EngineConfig, SamplingConfig
from ares_jax.system.cluster import HostsConfig
from ares_jax.system.config import ConfigError, build, optional, setting
from ares_jax.training.optimizer import OptimizerConfig
from ares_jax.training.policy_gradient import KlConfig, LossConfig
from ares_jax.training.shaping import EntropyConfig, RewardConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are arranged: slices x data x model."""

  slice: int  # TPU slices, joined by a data-centre network; each holds a copy of the weights
  data: int  # devices of a slice on the "data" axis; -1 = all that `model` leaves
  model: int  # devices on the "model" axis

  def __post_init__(self):
    if min(self.slice, self.model) < 1 or self.data < 1 and self.data != -1:
      raise ValueError(f"slice = {self.slice} and model = {self.model} must be >= 1, data = "
                       f"{self.data} >= 1 or -1 (all that is left)")


@dataclasses.dataclass(frozen=True)
class SizesConfig:
  """Sizes of a fresh model; vocabulary and ids come from the tokenizer."""

  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  rope_theta: float
  mrope_sections: tuple[int, int, int]
  norm_eps: float
  tied: bool
  vision: VisionConfig


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """The model: a folder or fresh sizes, its dtype and memory settings."""

  path: str  # Hugging Face folder; "" = a fresh model of `sizes`
  sizes: SizesConfig | None
  compute_dtype: Literal["float32", "bfloat16"]
  remat: Literal["none", "block", "dots"]
  unroll: int  # layers per iteration of the layer loop
  lora: lora.LoraConfig  # rank 0 = all weights are trained


@dataclasses.dataclass(frozen=True)
class GradeConfig:
  """How answers are graded (grading/pool.py)."""

  # Processes; they start at the first answer that needs one.
  workers: int = setting(free=True, per_host=True)
  timeout: float = setting(free=True, per_host=True)  # seconds per answer
  # Share of a batch's answers that may time out; a larger one stops the run.
  timeout_share: float = setting(free=True)
  # "layered", "release" (mathruler), "package.module:function" or "FILE.py:function".
  grader: str = setting(curation=True)

  def __post_init__(self):
    if not 0 <= self.timeout_share <= 1:
      raise ValueError(f"timeout_share = {self.timeout_share} is outside 0..1")
    if self.workers < 1:
      raise ValueError(f"workers = {self.workers} must be >= 1")
    if not 0 < self.timeout < float("inf"):
      raise ValueError(f"timeout = {self.timeout} s must be > 0 and finite")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """When a stage saves and when it stops."""

  save_every: int  # steps between checkpoints; the last step is always saved
  keep: int  # newest checkpoints kept; with 1 none is left when that one is damaged
  strict: bool  # refuse a damaged checkpoint, do not resume from an older one
  max_skipped: int  # skipped updates in a row; one more stops the run
  # Metric whose best step is saved and kept beside the newest checkpoints, such as
  # "validate/accuracy"; "-METRIC" where less is better; "" = none.
  keep_best: str = optional("")
  patience: int = optional(0)  # values of keep_best without a new best that end the stage; 0 = none

  def __post_init__(self):
    if self.save_every < 1 or self.keep < 1 or self.max_skipped < 0:
      raise ValueError(f"save_every = {self.save_every} and keep = {self.keep} must be >= 1, "
                       f"max_skipped = {self.max_skipped} >= 0")
    if self.patience < 0 or self.patience and not self.keep_best:
      raise ValueError(f"patience = {self.patience} must be >= 0, and needs keep_best, the metric "
                       "that ends the stage")


def check_epochs(section):
  """Raises ValueError where a stage's epochs are out of range, or the stage is left out."""
  if not 0 <= section.epochs < float("inf"):
    raise ValueError(f"epochs = {section.epochs} must be >= 0 (0 = `steps` counts) and finite")
  if section.epochs and not section.steps:
    raise ValueError(f"epochs = {section.epochs} but steps = 0, which leaves the stage out; set "
                     "steps to 1, the epochs count")


@dataclasses.dataclass(frozen=True)
class AepoConfig:
  """Stage 2, reinforcement learning (section 3.2)."""

  steps: int  # iterations; 0 leaves the stage out
  prompts: int  # P
  group: int  # G
  branches: int  # sequences of a group that may fork off others at high window entropy; 0 = none
  minibatch: int  # sequences per optimizer update, a multiple of group
  microbatch: int  # packed rows per gradient
  row_tokens: tuple[int, ...]  # lengths of a packed row; the one that pads a batch least is used
  frozen: tuple[str, ...]  # parts of the weights that are not trained, e.g. ("vision",); LoRA: all
  log_responses: int  # graded responses per iteration written to rollouts.jsonl
  # The probe of stage 1 answers at the same length.
  sampling: SamplingConfig = setting(
    inside={"max_tokens": dict(first_read_by="adacs", curation=True)})
  filter: FilterConfig
  entropy: EntropyConfig
  reward: RewardConfig
  loss: LossConfig
  kl: KlConfig
  optimizer: OptimizerConfig
  loop: LoopConfig = setting(free=True)
  # Iterations between two measurements of the loss's terms (gradient/...), each of four gradients
  # of the batch; 0 = none.
  terms_every: int = optional(0, free=True)
  # Iterations between two validations, held-out problems, answers to each (1: greedy), also before
  # the first iteration and after the last; 0 iterations = none.
  validate: tuple[int, int, int] = optional((0, 64, 1), free=True)
  # Benchmarks, "NAME:PATH", and files of your own that are validated on too.
  validate_on: tuple[str, ...] = optional((), free=True)
  # Whether answers in one packed row share their prompt, which is computed once (not on GPUs).
  share_prompts: bool = optional(False)
  # Passes over the rows, in place of `steps`, where above 0; a filter that draws more batches an
  # iteration passes more often.
  epochs: float = optional(0.0)

  def __post_init__(self):
    rows = self.prompts * self.group
    check_epochs(self)
    every, problems, samples = self.validate
    if every < 0 or min(problems, samples) < 1:
      raise ValueError(f"validate = {self.validate} must be iterations >= 0 (0 = no validation), "
                       "problems >= 1 and answers >= 1")
    if not every and (self.validate_on or self.loop.keep_best.lstrip("-").startswith("validate/")):
      raise ValueError("validate_on and loop.keep_best need validate = (ITERATIONS, PROBLEMS, "
                       "ANSWERS) with iterations > 0")
    if self.terms_every < 0:
      raise ValueError(f"terms_every = {self.terms_every} must be >= 0 (0 = never)")
    if self.steps < 0 or self.prompts < 1 or self.log_responses < 0:
      raise ValueError(f"steps = {self.steps} and log_responses = {self.log_responses} must be "
                       f">= 0, prompts = {self.prompts} >= 1")
    if self.group < 2:
      raise ValueError(f"group = {self.group}: an advantage needs at least 2 samples per prompt")
    if self.sampling.temperature == 0:
      raise ValueError("sampling.temperature = 0 draws the same answer for all of a group, from "
                       "which nothing is learnt; 1 is usual")
    if not 0 <= self.branches < self.group:
      raise ValueError(f"branches = {self.branches} is outside 0..group - 1 = {self.group - 1}: "
                       "a branch needs a sequence to fork from")
    if self.minibatch < 1 or rows % self.minibatch or self.minibatch % self.group:
      raise ValueError(
        f"{self.prompts} prompts x {self.group} samples = {rows} sequences: minibatch = "
        f"{self.minibatch} must divide them and be a multiple of group = {self.group}")
    if min(self.microbatch, *self.row_tokens, len(self.row_tokens)) < 1:
      raise ValueError(f"microbatch = {self.microbatch} must be >= 1, row_tokens = "
                       f"{self.row_tokens} one size or more, >= 1")


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """Supervised fine-tuning: the warm-up and stage 1."""

  steps: int  # 0 leaves the stage out
  batch: int  # examples per step
  shuffle: bool  # False keeps the rows in their order, as for a curriculum
  row_tokens: tuple[int, ...]  # T, lengths of a packed row; that which pads least is used
  row_windows: int  # capacity of a packed row in vision windows
  microbatch: int  # packed rows per gradient; a step accumulates over its rows
  frozen: tuple[str, ...]  # parts of the weights that are not trained, e.g. ("vision",); LoRA: all
  optimizer: OptimizerConfig
  loop: LoopConfig = setting(free=True)
  epochs: float = optional(0.0)  # passes over the rows, in place of `steps`, where above 0

  def __post_init__(self):
    check_epochs(self)
    if self.steps < 0 or self.batch < 1 or self.microbatch < 1:
      raise ValueError(f"steps = {self.steps} must be >= 0, batch = {self.batch} and "
                       f"microbatch = {self.microbatch} >= 1")
    if self.row_windows < 0 or min((*self.row_tokens, len(self.row_tokens))) < 1:
      raise ValueError(f"row_windows = {self.row_windows} must be >= 0, row_tokens = "
                       f"{self.row_tokens} one size or more, >= 1")


@dataclasses.dataclass(frozen=True)
class CurateConfig:
  """AdaCS selection (paper table 1)."""

  selection: Literal["adacs", "vanilla"]  # vanilla: the same number, drawn uniformly (table 4)
  # Measured by the run, or the rows' own "pass_rate".
  pass_rates: Literal["probe", "column"] = setting(curation=True)
  problems: int = setting(curation=True)  # problems whose pass rates are measured
  # Answers of the probe per problem; pass-rate brackets go from 0 to this number.
  samples: int = setting(curation=True)
  count: int  # responses selected
  batch: int  # problems per sampling call

  def __post_init__(self):
    if min(self.problems, self.samples, self.count, self.batch) < 1:
      raise ValueError("problems, samples, count and batch must be >= 1")
    if self.count > self.problems:
      raise ValueError(f"count = {self.count} responses from problems = {self.problems}; one "
                       "response per problem is kept, lower count")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Evaluation on held-out problems."""

  problems: int  # held-out problems
  samples: int  # sampled answers per problem, besides the greedy one
  batch: int  # problems per sampling call
  temperature: float
  top_p: float

  def __post_init__(self):
    if min(self.problems, self.samples, self.batch) < 1:
      raise ValueError(f"problems = {self.problems}, samples = {self.samples} and "
                       f"batch = {self.batch} must be >= 1")
    self.sampling(1)  # refuses numbers out of range

  def sampling(self, max_tokens, *, greedy=False):
    """SamplingConfig of the sampled answers, or of the greedy one."""
    temperature, top_p = (0.0, 1.0) if greedy else (self.temperature, self.top_p)
    return SamplingConfig(temperature=temperature, top_p=top_p, top_k=0, min_tokens=0,
                          max_tokens=max_tokens)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """All settings of a run. Each has marks (identity.Use), its own or those of its section."""

  seed: int = setting(first_read_by="warmup", curation=True)
  threads: int = setting(free=True, per_host=True)  # data reading threads
  # Minutes without a finished step, chunk or grade after which the run is ended as hung.
  stall_minutes: float = setting(free=True, per_host=True)
  hosts: HostsConfig = setting(free=True)
  mesh: MeshConfig = setting(free=True)
  model: ModelSection = setting(first_read_by="warmup", curation=True)
  data: DataConfig = setting(first_read_by="warmup")
  prompt: PromptConfig = setting(first_read_by="warmup", curation=True)
  grade: GradeConfig = setting(first_read_by="warmup")
  engine: EngineConfig = setting(free=True)
  # The probe has or has not warmed up.
  warmup: SftConfig = setting(first_read_by="warmup", inside={"steps": dict(curation=True)})
  curate: CurateConfig = setting(first_read_by="adacs")
  adacs: SftConfig = setting(first_read_by="adacs")
  aepo: AepoConfig = setting(first_read_by="aepo")
  evaluate: EvaluateConfig = setting(first_read_by="warmup")
  wandb: WandbConfig = setting(free=True)
  reward: ScoreConfig = optional(ScoreConfig(), first_read_by="warmup")

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:  # jax ignores the bits above
      raise ValueError(f"seed = {self.seed} is outside 0..2**32 - 1 = {2**32 - 1}")
    if self.threads < 1 or self.stall_minutes <= 0:
      raise ValueError(f"threads = {self.threads} must be >= 1, stall_minutes = "
                       f"{self.stall_minutes} > 0")
    if self.data.digits is None and self.model.path == "":
      raise ValueError("model.path is missing: a fresh model can read only the digits problem; "
                       "other data need a pretrained one")
    if self.engine.int8_pages and self.aepo.steps and self.aepo.loss.old_logprob == "sampler":
      raise ValueError("engine.int8_pages = True samples from another policy than the trainer's; "
                       'set aepo.loss.old_logprob = "recompute", which corrects for it')
    longest = self.prompt.max_tokens[-1] + self.aepo.sampling.max_tokens
    if self.aepo.steps and min(self.aepo.row_tokens) < longest:
      raise ValueError(f"aepo.row_tokens = {self.aepo.row_tokens}: a row must hold the longest "
                       f"prompt and response, prompt.max_tokens + aepo.sampling.max_tokens = "
                       f"{longest} tokens; raise it or lower those")


def build_config(values):
  """TrainConfig of a ConfigDict; ConfigError names a mistake. The model's folder need not exist."""
  for old, new in RENAMED_SETTINGS.items():
    with contextlib.suppress(AttributeError):  # a setting on the way is missing or None
      operator.attrgetter(old)(values)
      raise ConfigError(f"config.{old} is called config.{new} since version 0.2; rename it")
  return build(TrainConfig, values, "config")


def read_config(values, *, new=True):
  """`build_config`, and refuses a model whose folder does not exist.

  For a `new` run it also refuses settings that make training pointless; a run that has begun, or is
  only evaluated or exported, keeps what it has.
  """
  config = build_config(values)
  if new:
    for problem in _pointless_settings(config):
      raise ConfigError(f"config.{problem}")
  if config.model.path and not os.path.isdir(config.model.path):
    raise ConfigError(f"config.model.path {config.model.path!r} is no folder; give the folder of a "
                      "Hugging Face model")
  return config


def _pointless_settings(config):
  """Yields "KEY = VALUE ...: why; remedy" of settings that are valid, but train nothing useful."""
  aepo, evaluate = config.aepo, config.evaluate
  for stage in ("warmup", "adacs", "aepo"):
    section = getattr(config, stage)
    steps, warmup = section.steps, section.optimizer.warmup_steps
    if 0 < steps < warmup and not section.epochs:  # the steps of epochs follow from the data
      yield (f"{stage}.optimizer.warmup_steps = {warmup} is more than {stage}.steps = {steps}: the "
             "learning rate never reaches its peak; lower it or raise the steps")
  if aepo.steps:
    sampling, group = aepo.sampling, aepo.group
    if sampling.top_k == 1:
      yield (f"aepo.sampling.top_k = 1: all {group} answers to a prompt would be equal and have no "
             "advantage; set it to 0 (all tokens) or above 1")
    if aepo.entropy.window > sampling.max_tokens:
      yield (f"aepo.entropy.window = {aepo.entropy.window} tokens is longer than any answer: "
             f"aepo.sampling.max_tokens = {sampling.max_tokens}; lower it")
    band = aepo.filter
    in_band = any(band.low <= right / group <= band.high for right in range(1, group))
    if band.batches > 1 and band.key == "accuracy" and not in_band:
      yield (f"aepo.filter.low = {band.low}, high = {band.high}: every group of {group} answers "
             f"would be dropped, or has no advantage; let at least 1/{group} lie in between")
  if evaluate.temperature == 0 and evaluate.samples > 1:
    yield (f"evaluate.temperature = 0.0: the evaluate.samples = {evaluate.samples} answers to a "
           "problem would be equal; set it above 0, or the samples to 1")
