"""Answers one question about any number of images, and prints the reasoning and the answer.

    python -m ares_jax.generate --model=FOLDER --image=x.png --question="How many sides?"
    python -m ares_jax.generate --model=FOLDER --image=a.png --image=b.png --temperature=1 \\
      --question="Is <image 2> larger than <image 1>?" --json

FOLDER is a Hugging Face folder, published or written by ares_jax.export. A model trained
with prompt.suffix needs the same text here: --suffix=" First think, ...".
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("generate")

import json
import time

import jax
import jax.numpy as jnp
from absl import flags

from ares_jax.data.prompts import PromptConfig
from ares_jax.grading.response import extract_boxed
from ares_jax.models import hf, hf_processor, lora
from ares_jax.run.config import ModelSection
from ares_jax.run.model import open_model
from ares_jax.sampling.sampler import EngineConfig, SamplingConfig
from ares_jax.system import mesh
from ares_jax.system.command import UsageError, run

# (tokens, windows) of a prompt: powers of two, so that a compilation cache has most programs.
SHAPES = tuple((2**power, 2 ** (power - 3)) for power in range(7, 16))
# 8 GiB hold the keys and values of 150,000 tokens of a 7B model in bfloat16.
ENGINE = EngineConfig(cache_gib=8.0)

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder of the model.")
_IMAGE = flags.DEFINE_multi_string("image", [], "File of an image; may be given several times.")
_QUESTION = flags.DEFINE_string("question", None, "The question; <image> marks where images go.")
_SUFFIX = flags.DEFINE_string("suffix", "", "Text after the question, as in training.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "Longest answer.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus sampling: share of probability to keep.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sample.", lower_bound=0, upper_bound=2**32 - 1)
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", None, "Largest image; default the folder's.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Weights and arithmetic.")
# Another command that the same process imports may have defined this flag already.
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", allow_override=True)


def main():
  if not _MODEL.value or _QUESTION.value is None:
    raise UsageError("pass --model=FOLDER and --question=TEXT")
  sampling = SamplingConfig(temperature=_TEMPERATURE.value, top_p=_TOP_P.value, top_k=0,
                            min_tokens=0, max_tokens=_MAX_TOKENS.value)
  began = time.monotonic()
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    generator, params = load(_MODEL.value, dtype=_DTYPE.value, suffix=_SUFFIX.value,
                             max_pixels=_MAX_PIXELS.value)
    result = generate(generator, params, _QUESTION.value, _IMAGE.value, sampling=sampling,
                      seed=_SEED.value)
  if _JSON.value:
    print(json.dumps(result | {"seconds": round(time.monotonic() - began, 2)}))
  else:
    print(result["response"])


def load(folder, *, dtype, suffix, max_pixels=None):
  """(rollout.Generator without a grader, weights) of a Hugging Face folder, on the current mesh.

  `dtype` of weights and arithmetic is "float32" or "bfloat16". `suffix` is appended to every
  question. `max_pixels` is the largest area of an image; None is the folder's.

  Raises:
    ValueError: the folder is no model of an architecture in models/families.py.
  """
  opened = open_model(ModelSection(
    path=folder, sizes=None, compute_dtype=dtype, remat="none", unroll=1,
    lora=lora.LoraConfig(rank=0, alpha=1.0, targets=tuple(lora.TARGETS))))
  tokens, windows = zip(*SHAPES, strict=True)
  lowest, highest = 1, 1
  if opened.config.vision:
    lowest, highest = hf_processor.pixel_limits(folder, opened.config.vision)
  else:
    windows = (0,) * len(tokens)
  if max_pixels is not None:
    highest = max_pixels
  prompt = PromptConfig(suffix, tokens, windows, min(lowest, highest), highest)
  return opened.generator(prompt, ENGINE), hf.from_hf(
    folder, opened.config, jax.sharding.get_mesh(), jnp.dtype(dtype))


def generate(generator, params, question, images, *, sampling, seed):
  """Answers one question with what `load` returned.

  In `question` <image> marks where an image goes; `images` is a list of file names.

  Returns:
    dict: response (the whole text), reasoning (the text between <think> and </think>, or ""),
    answer (the content of the last \\boxed{...} after it, or None), tokens (their number), finished
    (False where max_tokens cut the response off), token_ids.

  Raises:
    ValueError: an image cannot be used, or the prompt is too long.
  """
  row = {"id": "on the command line", "question": question, "images": list(images)}
  prompts = generator.encoder.batch([row], [0])
  samples = generator.sample(params, prompts, jax.random.key(seed), group=1, sampling=sampling)
  ids = samples.tokens[0][samples.mask[0]].tolist()
  text = generator.encoder.chat.text(ids)
  before, _, _ = text.rpartition("</think>")
  reasoning = before.partition("<think>")[2] if "<think>" in before else before
  return {"response": text, "reasoning": reasoning.strip(), "answer": extract_boxed(text),
          "tokens": len(ids), "finished": bool(ids) and ids[-1] in generator.end, "token_ids": ids}


if __name__ == "__main__":
  run(main)
