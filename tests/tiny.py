"""The smallest run of both stages that tests share: configs/ares_tiny.py with smaller numbers."""

import pathlib

from ares_jax.data.sharded import Part
from ares_jax.data.traces import encode_example
from ares_jax.run import config as run_config
from ares_jax.system import config as config_lib
from ares_jax.system import shares

ROOT = pathlib.Path(__file__).parent.parent


def values(**changes):
  """The ConfigDict; `changes` are dotted keys with `__` for the dot."""
  config = config_lib.load(str(ROOT / "configs" / "ares_tiny.py"))
  small = {
    "model.unroll": 1, "model.sizes.embed": 32, "model.sizes.layers": 2, "model.sizes.heads": 2,
    "model.sizes.head_dim": 16, "model.sizes.mlp": 64, "model.sizes.mrope_sections": (2, 3, 3),
    "model.sizes.vision.hidden": 32, "model.sizes.vision.mlp": 32, "model.sizes.vision.out": 32,
    "data.digits.problem.levels": 2, "data.digits.sft": 8,
    "data.digits.rl": 64, "data.digits.eval": 8,
    "warmup.optimizer.warmup_steps": 1, "adacs.optimizer.warmup_steps": 1,
    "warmup.steps": 2, "warmup.batch": 8, "warmup.row_tokens": (80,), "adacs.steps": 2,
    "adacs.batch": 4, "adacs.row_tokens": (80,), "curate.problems": 8, "curate.samples": 4,
    "curate.count": 8, "curate.batch": 8,
    "aepo.steps": 3, "aepo.prompts": 4, "aepo.group": 4, "aepo.minibatch": 16,
    "aepo.microbatch": 4, "aepo.row_tokens": (80,), "aepo.sampling.max_tokens": 12,
    "aepo.log_responses": 2, "aepo.loop.save_every": 1,
    "evaluate.problems": 6, "evaluate.samples": 2, "evaluate.batch": 4,
  }
  small |= {key.replace("__", "."): value for key, value in changes.items()}
  with config.unlocked():
    config.update_from_flattened_dict(small)
  return config


def get_config():
  """The same for a command: --config=tests/tiny.py."""
  return values()


def read(**changes):
  """TrainConfig of `values(**changes)`."""
  return run_config.read_config(values(**changes))


def trace_batch(encoder, rows, *, row_multiple, **limits):
  """The TraceBatch of rows with a "response", as fine-tuning packs them."""
  examples = [encode_example(encoder, row, **limits) for row in rows]
  return Part(shares.share(len(rows)), rows, examples).traces(encoder, row_multiple=row_multiple,
                                                              **limits)
