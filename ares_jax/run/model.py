"""Opens the model of a config: sizes, tokenizer, first weights, tokens that end an answer."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np

from ares_jax.data import digits
from ares_jax.models import weights
from ares_jax.models.config import ModelConfig


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
