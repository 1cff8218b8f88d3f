"""Opens the model that a config names: its sizes, tokenizer, first weights and prompt encoder."""

import dataclasses
import functools
import os

import jax
import numpy as np

from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.prompts import Encoder
from ares_jax.models import hf_config, weights
from ares_jax.models.config import PUBLISHED_SIZES, ModelConfig
from ares_jax.run.files import read_json
from ares_jax.sampling.rollout import Generator
from ares_jax.system.profiler import PhaseTimer


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model without its weights, and the tokens it reads and writes."""

  config: ModelConfig
  tokenizer: object  # of transformers
  end: tuple[int, ...]  # ids that end an answer
  allowed: np.ndarray  # bool [V], tokens that an answer may hold

  def generator(self, prompt, engine, grader=None):
    """Generator that answers prompts with this model; grader None where no answer is graded."""
    vision = self.config.vision
    encoder = Encoder(Chat(self.tokenizer, prompt.suffix, self.config.image_token), prompt,
                      vision.window, vision.patch, vision.merge)
    return Generator(self.config, encoder, self.allowed, self.end, engine, grader, PhaseTimer())


def open_model(section):
  """OpenModel of a ModelSection. Every command that samples or trains opens its model here.

  Raises:
    ValueError: the section's folder does not exist or is no Qwen2.5-VL model.
  """
  if section.path:
    if not os.path.isdir(section.path):
      raise ValueError(f"{section.path} is no folder; give the folder of a Hugging Face Qwen2.5-VL "
                       "model")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(section.path)
  else:
    tokenizer = digits.tokenizer()
  config, end = model_config(section), end_tokens(section.path, tokenizer)
  return OpenModel(config, tokenizer, end, allowed_tokens(tokenizer, config.vocab, end))


def model_config(section):
  """ModelConfig of a ModelSection, without tokenizer or weights: enough to compile a program.

  Args:
    section: its `path` is a Hugging Face folder, whose config.json is read, or ends in the name of
      a published model, for which no file is needed, or is "" for a fresh model of `sizes`.

  Raises:
    ValueError: the path is none of these, or the folder is no Qwen2.5-VL model.
  """
  run = dict(compute_dtype=section.compute_dtype, remat=section.remat, unroll=section.unroll)
  if not section.path:
    tokenizer = digits.tokenizer()
    return ModelConfig(
      **vars(section.sizes), **run, image_token=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
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
  return jax.jit(functools.partial(weights.init, table, dtype=dtype),
                 out_shardings=weights.shardings(table, devices))(jax.random.key(config.seed))


def end_tokens(folder, tokenizer):
  """Ids that end an answer: those of the folder's generation_config.json, as in transformers.

  The tokenizer's end-of-text token is taken where the folder names none or is "".
  """
  ids = read_json(folder, "generation_config.json").get("eos_token_id") if folder else None
  if ids is None:
    ids = tokenizer.eos_token_id
  return tuple(ids) if isinstance(ids, list) else (ids,)


def allowed_tokens(tokenizer, vocab, end):
  """bool [V]: tokens that an answer may hold: those of `end` and all that are not special."""
  allowed = np.zeros(vocab, bool)
  allowed[: len(tokenizer)] = True
  allowed[[index for index in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder)
           if index not in end and tokenizer.added_tokens_decoder[index].special]] = False
  return allowed
