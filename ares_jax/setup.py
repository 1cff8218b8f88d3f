"""From a config to the parts of a run: model, tokenizer, data, grader. Used by every command."""

import contextlib
import dataclasses
import functools
import json
import os
from typing import Literal

import jax
import numpy as np

from ares_jax import hosts, mesh
from ares_jax.adacs import CurateConfig
from ares_jax.aepo import AepoConfig
from ares_jax.config import ConfigError, build
from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.grade import GradingPool
from ares_jax.data.prompts import Encoder, PromptConfig
from ares_jax.data.trigger_words import semantic_table
from ares_jax.fine_tuning import SftConfig
from ares_jax.joining import HostsConfig, check_joined
from ares_jax.measure import EvaluateConfig
from ares_jax.metrics import PhaseTimer
from ares_jax.models import lora, weights
from ares_jax.models.config import ModelConfig, VisionConfig
from ares_jax.rollout import Generator
from ares_jax.run_data import DataConfig, RunData
from ares_jax.sampler import EngineConfig, plan
from ares_jax.tracking import WandbConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  slice: int  # TPU slices that a data-centre network joins; whole weights in each
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
  path: str  # Hugging Face folder; "" = a fresh model of `sizes`
  sizes: SizesConfig | None
  compute_dtype: Literal["float32", "bfloat16"]
  remat: Literal["none", "block", "dots"]
  unroll: int  # layers per iteration of the layer loop
  lora: lora.LoraConfig  # rank 0 = all weights are trained


@dataclasses.dataclass(frozen=True)
class GradeConfig:
  """How answers are graded (data/grade.py)."""

  workers: int  # processes; they start at the first answer that needs one
  timeout: float  # seconds an answer
  timeout_share: float  # a batch of which a larger share times out stops the run
  grader: str  # "layered", "release" (mathruler) or "package.module:function"

  def __post_init__(self):
    if not 0 <= self.timeout_share <= 1:
      raise ValueError(f"timeout_share = {self.timeout_share} is outside 0..1")
    if self.workers < 1 or self.timeout <= 0:
      raise ValueError(f"workers = {self.workers} must be >= 1, timeout = {self.timeout} s > 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Everything a run needs; configs/*.py hold the numbers."""

  seed: int
  threads: int  # data reading threads
  stall_minutes: float  # without a finished step, chunk or grade until the run is ended as hung
  hosts: HostsConfig
  mesh: MeshConfig
  model: ModelSection
  data: DataConfig
  prompt: PromptConfig
  grade: GradeConfig
  engine: EngineConfig
  warmup: SftConfig
  curate: CurateConfig
  adacs: SftConfig
  aepo: AepoConfig
  evaluate: EvaluateConfig
  wandb: WandbConfig

  def __post_init__(self):
    if self.threads < 1:
      raise ValueError(f"threads = {self.threads} must be >= 1")
    if self.stall_minutes <= 0:
      raise ValueError(f"stall_minutes = {self.stall_minutes} must be > 0")
    if self.data.digits is None and self.model.path == "":
      raise ValueError("model.path is missing: a fresh model reads the digits problem alone, other "
                       "data need a pretrained one")
    longest = self.prompt.max_tokens[-1] + self.aepo.sampling.max_tokens
    if self.aepo.steps and min(self.aepo.row_tokens) < longest:
      raise ValueError(f"aepo.row_tokens = {self.aepo.row_tokens}: a row must hold the longest "
                       f"prompt and response, prompt.max_tokens + aepo.sampling.max_tokens = "
                       f"{longest} tokens; raise it or lower those")


def read_config(values):
  """TrainConfig of an ml_collections config; one-line ConfigError for every mistake."""
  config = build(TrainConfig, values, "config")
  if config.model.path and not os.path.isdir(config.model.path):
    raise ConfigError(f"config.model.path {config.model.path!r} is no folder; give the folder of a "
                      "Hugging Face Qwen2.5-VL model")
  return config


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
    """Rows of "lessons", "curated", "prompts" or "test"."""
    return self.data.source(name)

  def init_params(self):
    """First weights, on the current mesh: from the Hugging Face folder, or fresh."""
    return first_weights(self.config, self.model)

  def start(self):
    """(what is trained, as a run begins; lora.Base under it, or None), on the current mesh."""
    section, params = self.config.model.lora, self.init_params()
    if not section.rank:
      return params, None
    # A key of its own: init_params draws from the seed's.
    key = jax.random.fold_in(jax.random.key(self.config.seed), section.rank)
    return lora.init(self.model, section, key), lora.Base(params, section.alpha / section.rank)

  def check(self):
    """Refuses, before anything runs, data that are missing or too few, truths that no answer can
    meet, and sizes that do not divide.

    Raises:
      ValueError: names the key, its value, the limit and the remedy.
    """
    config, devices = self.config, mesh.size(*mesh.ROWS)
    if not (config.warmup.steps or config.adacs.steps or config.aepo.steps):
      raise ValueError("warmup.steps, adacs.steps and aepo.steps are all 0: nothing is trained; "
                       "set one above 0")
    sizes = {"evaluate.problems": ("test", config.evaluate.problems)}
    if config.warmup.steps:
      sizes["warmup.batch"] = ("lessons", 1)
    if config.adacs.steps:
      sizes["curate.problems"] = ("curated", config.curate.problems)
    if config.aepo.steps:
      sizes["aepo.prompts"] = ("prompts", 1)
    for key, (name, need) in sizes.items():
      have = len(self.source(name))
      if have < need:
        raise ValueError(f"config.{key} needs {need} rows of the {name!r} data, which has {have}; "
                         f"lower it or give more data")
    for name in sorted({name for name, _ in sizes.values()} - {"lessons"}):
      hosts.leader(functools.partial(self.data.check_truths, name))
    parts = weights.table(self.model)
    for stage in ("warmup", "adacs", "aepo"):
      unknown = sorted(set(getattr(config, stage).frozen) - set(parts))
      if unknown and getattr(config, stage).steps:
        raise ValueError(f"config.{stage}.frozen names {', '.join(unknown)}, no part of the model; "
                         f"its parts are {', '.join(parts)}")
    rows = {"warmup.microbatch": config.warmup.microbatch if config.warmup.steps else 0,
            "adacs.microbatch": config.adacs.microbatch if config.adacs.steps else 0,
            "aepo.prompts": config.aepo.prompts if config.aepo.steps else 0,
            "aepo.microbatch": config.aepo.microbatch if config.aepo.steps else 0}
    if config.aepo.steps and not config.model.lora.rank and "vision" not in config.aepo.frozen:
      # A trained vision tower works on a minibatch's images, a prompt on one device.
      rows["aepo.minibatch / aepo.group"] = config.aepo.minibatch // config.aepo.group
    for key, count in rows.items():
      if count % devices:
        raise ValueError(f"config.{key} = {count} does not divide over {devices} devices of the "
                         "\"slice\" and \"data\" axes; change it or config.mesh")
    shared = {"warmup.batch": config.warmup.batch if config.warmup.steps else 0,
              "adacs.batch": config.adacs.batch if config.adacs.steps else 0,
              "aepo.prompts": config.aepo.prompts if config.aepo.steps else 0}
    for key, count in shared.items():
      if count % jax.process_count():
        raise ValueError(f"config.{key} = {count} does not divide over {jax.process_count()} "
                         "processes, each of which reads its share; change it")
    self._check_cache()

  def _check_cache(self):
    """The largest prompts of every stage that samples must fit beside its answers."""
    config, devices = self.config, mesh.size(*mesh.ROWS)
    batches = {"evaluate.batch": (config.evaluate.batch, config.evaluate.samples)}
    if config.adacs.steps and config.curate.pass_rates == "probe":
      batches["curate.batch"] = config.curate.batch, config.curate.samples
    if config.aepo.steps:
      batches["aepo.prompts"] = config.aepo.prompts, config.aepo.group
    for key, (prompts, group) in batches.items():
      try:
        plan(self.model, config.engine, prompts=-(-prompts // devices) * devices, group=group,
             prompt_tokens=config.prompt.max_tokens[-1], tokens=config.aepo.sampling.max_tokens)
      except ValueError as error:
        raise ValueError(f"config.{key} = {prompts}: {error}") from error


def first_weights(config, model):
  """Weights that a run of `config`, a TrainConfig, starts from, on the current mesh.

  float32; under adapters, which leave them as they are, in the compute dtype.
  """
  devices = jax.sharding.get_mesh()
  dtype = jax.numpy.dtype(config.model.compute_dtype if config.model.lora.rank else "float32")
  if config.model.path:
    from ares_jax.models import hf

    return hf.from_hf(config.model.path, model, devices, dtype)
  return jax.jit(functools.partial(weights.init, model, dtype=dtype),
                 out_shardings=weights.shardings(model, devices))(jax.random.key(config.seed))


def model_and_tokenizer(section):
  """(ModelConfig, tokenizer) of a ModelSection: its Hugging Face folder's, or the digits'."""
  if section.path:
    import transformers

    from ares_jax.models import hf

    return (hf.model_config(section.path, compute_dtype=section.compute_dtype,
                            remat=section.remat, unroll=section.unroll),
            transformers.AutoTokenizer.from_pretrained(section.path))
  tokenizer = digits.tokenizer()
  # Rounded up, so that 8 devices divide the embedding.
  return ModelConfig(
    **{field.name: getattr(section.sizes, field.name)
       for field in dataclasses.fields(section.sizes)},
    vocab=-(-len(tokenizer) // 8) * 8,
    image_token=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    compute_dtype=section.compute_dtype, remat=section.remat, unroll=section.unroll), tokenizer


def end_tokens(folder, tokenizer):
  """Ids that end an answer: those of the folder's generation_config.json, as in transformers.

  Args:
    folder: of the model; "" for a fresh one.
    tokenizer: its own end is taken where the folder names none.
  """
  path, ids = os.path.join(folder, "generation_config.json"), None
  if folder and os.path.isfile(path):
    with open(path, encoding="utf-8") as file:
      ids = json.load(file).get("eos_token_id")
  if ids is None:
    ids = tokenizer.eos_token_id
  return tuple(ids) if isinstance(ids, list) else (ids,)


def allowed_tokens(tokenizer, vocab, end):
  """bool [V]: tokens an answer may hold. Image and vision marks have no place in one, ids beyond
  the tokenizer no text."""
  allowed = np.zeros(vocab, bool)
  allowed[: len(tokenizer)] = True
  allowed[[index for index in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder)
           if index not in end and tokenizer.added_tokens_decoder[index].special]] = False
  return allowed


@contextlib.contextmanager
def open_run(config, *, workdir=None, check=True):
  """Run of a TrainConfig, with a grading pool that ends with it.

  Args:
    config: TrainConfig.
    workdir: the run's folder, where rows that are skipped are listed.
    check: whether the run trains, so that its data and sizes have to fit the mesh.
  """
  check_joined()
  model, tokenizer = model_and_tokenizer(config.model)
  chat = Chat(tokenizer, config.prompt.suffix, model.image_token)
  vision = model.vision
  encoder = Encoder(chat, config.prompt, vision.window, vision.patch, vision.merge)
  end = end_tokens(config.model.path, tokenizer)
  allowed = allowed_tokens(tokenizer, model.vocab, end)
  grade = config.grade
  with GradingPool(grade.workers, grade.timeout, grader=grade.grader,
                   timeout_share=grade.timeout_share) as grader:
    generator = Generator(model, encoder, allowed, end, config.engine, grader, PhaseTimer())
    run = Run(config, model, tokenizer, generator, semantic_table(tokenizer, model.vocab),
              RunData(config, encoder, grader, workdir))
    if check:
      run.check()
    yield run
