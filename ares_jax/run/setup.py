"""From a config to the parts of a run: model, tokenizer, data, grader. Used by every command."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np

from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder
from ares_jax.data.trigger_words import semantic_table
from ares_jax.grading.pool import GradingPool
from ares_jax.models import lora, weights
from ares_jax.models.config import ModelConfig
from ares_jax.run.config import TrainConfig
from ares_jax.run.data import RunData
from ares_jax.run.model import allowed_tokens, end_tokens, first_weights, model_and_tokenizer
from ares_jax.sampling.rollout import Generator
from ares_jax.sampling.sampler import plan_cache
from ares_jax.system import hosts, mesh
from ares_jax.system.cluster import check_cluster
from ares_jax.system.profiler import PhaseTimer


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
      hosts.on_process_0(functools.partial(self.data.check_truths, name))
    parts = weights.weight_table(self.model)
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
        plan_cache(self.model, config.engine, prompts=-(-prompts // devices) * devices, group=group,
             prompt_tokens=config.prompt.max_tokens[-1], tokens=config.aepo.sampling.max_tokens)
      except ValueError as error:
        raise ValueError(f"config.{key} = {prompts}: {error}") from error


@contextlib.contextmanager
def open_run(config, *, workdir=None, check=True):
  """Run of a TrainConfig, with a grading pool that ends with it.

  Args:
    config: TrainConfig.
    workdir: the run's folder, where rows that are skipped are listed.
    check: whether the run trains, so that its data and sizes have to fit the mesh.
  """
  check_cluster()
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
