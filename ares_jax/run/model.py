"""Opens the model that a config names: its sizes, tokenizer, first weights and prompt encoder."""

import dataclasses
import functools
import os

import jax

from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder
from ares_jax.models import hf_config, hf_processor, weights
from ares_jax.models.config import PUBLISHED_SIZES, ModelConfig
from ares_jax.run.tokens import Tokens, check_tokens, open_tokenizer
from ares_jax.sampling.rollout import Generator
from ares_jax.system import compiling
from ares_jax.system.profiler import PhaseTimer


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model without its weights, and the tokens it reads and writes."""

  config: ModelConfig
  tokens: Tokens

  def generator(self, prompt, engine, grader=None):
    """Generator that answers prompts with this model; grader None where no answer is graded."""
    vision, tokens = self.config.images, self.tokens
    encoder = Encoder(Chat(tokens.tokenizer, prompt.suffix, self.config.image_token), prompt,
                      vision.window, vision.patch, vision.merge)
    return Generator(self.config, encoder, tokens.allowed, tokens.end, engine, grader,
                     PhaseTimer())


def open_model(section):
  """OpenModel of a ModelSection. Every command that samples or trains opens its model here.

  Raises:
    ValueError: the section's folder does not exist or holds no model of models/families.py, or its
      tokenizer is not that of the model.
  """
  if section.path and not os.path.isdir(section.path):
    raise ValueError(f"{section.path} is no folder; give the folder of a Hugging Face model")
  config = model_config(section)
  if section.path and config.vision:
    hf_processor.check_processor(section.path, config.vision)
  tokenizer = open_tokenizer(section.path) if section.path else digits.tokenizer()
  return OpenModel(config, check_tokens(config, tokenizer, section.path))


def model_config(section):
  """ModelConfig of a ModelSection, without tokenizer or weights: enough to compile a program.

  Args:
    section: its `path` is a Hugging Face folder, whose config.json is read, or ends in the name of
      a published model, for which no file is needed, or is "" for a fresh model of `sizes`.

  Raises:
    ValueError: the path is none of these, or the folder holds no model of models/families.py.
  """
  run = dict(compute_dtype=section.compute_dtype, remat=section.remat, unroll=section.unroll)
  if not section.path:
    tokenizer = digits.tokenizer()
    return ModelConfig(
      **vars(section.sizes), **run, qkv_bias=True, qk_norm=False, mrope_interleaved=False,
      image_token=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
      vocab=-(-len(tokenizer) // 8) * 8)  # rounded up, so that 8 devices divide the embedding
  if os.path.isdir(section.path):
    return hf_config.model_config(section.path, **run)
  name = os.path.basename(section.path)
  if name not in PUBLISHED_SIZES:
    raise ValueError(f"model.path = {section.path!r} is no folder and ends in no name whose sizes "
                     f"are known: {', '.join(PUBLISHED_SIZES)}")
  return dataclasses.replace(PUBLISHED_SIZES[name], **run)


def first_weights(config, model):
  """Weights that a run starts from, on the current mesh: those of its folder, or fresh ones.

  They are float32, or of the compute dtype where adapters are trained and the weights stay.
  """
  devices = jax.sharding.get_mesh()
  dtype = jax.numpy.dtype(config.model.compute_dtype if config.model.lora.rank else "float32")
  if config.model.path:
    from ares_jax.models import hf

    return hf.from_hf(config.model.path, model, devices, dtype)
  table = weights.weight_table(model)
  draw = jax.jit(functools.partial(weights.init, table, dtype=dtype),
                 out_shardings=weights.shardings(table, devices))
  with compiling.announced("the first weights"):
    return draw(jax.random.key(config.seed))
