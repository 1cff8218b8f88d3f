"""Writes the weights of a run as a Hugging Face folder that transformers and vLLM load.

    python -m ares_jax.export --workdir=runs/aepo_7b --out=FOLDER
    python -m ares_jax.export --workdir=runs/ares_tiny --out=FOLDER --stage=adacs
    python -m ares_jax.export --workdir=runs/aepo_3b_lora_colab --out=FOLDER --adapter

Uses the newest checkpoint of --stage, by default of the last stage that has one, or with --best the
one that loop.keep_best kept; the run may go on meanwhile. A model that came from a Hugging Face
folder keeps its tensor names, files, dtypes, tokenizer, processor and licence; a model trained from
scratch is written in float32. Image limits, ends of answers and sampling settings are those of the
run. Adapters are merged into their matrices. With --adapter they are written alone, as a folder
that peft loads onto the model that they were trained on.
"""

if __name__ == "__main__":
  from ares_jax.system import command

  command.begin("export")

import json
import os

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ares_jax.models import hf, lora, peft, weights
from ares_jax.models.serving import Serving
from ares_jax.run import restore
from ares_jax.run.best import best_step
from ares_jax.run.config import read_config
from ares_jax.run.files import require_json
from ares_jax.run.identity import STAGES, latest_stage
from ares_jax.run.model import open_model
from ares_jax.system import mesh
from ares_jax.system.command import UsageError, run

# Another command that the same process imports may have defined these flags already.
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", allow_override=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist yet.")
_STAGE = flags.DEFINE_enum("stage", None, STAGES, "Stage to export; default the last one saved.")
_BEST = flags.DEFINE_bool("best", False, "Export the best checkpoint, by loop.keep_best.")
_ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapters alone, in peft's format.")
_DTYPE = flags.DEFINE_enum("weights_dtype", None, ["float32", "bfloat16"],
                           "Of the weights; default that of the model's folder.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", allow_override=True)


def main():
  if not _WORKDIR.value or not _OUT.value:
    raise UsageError("pass --workdir=DIR, a run's folder, and --out=FOLDER, where to write")
  with jax.set_mesh(mesh.make_mesh(-1, 1)):
    result = export(_WORKDIR.value, _OUT.value, _STAGE.value, adapter=_ADAPTER.value,
                    dtype=_DTYPE.value, best=_BEST.value)
  print(json.dumps(result) if _JSON.value else
        "wrote {folder}: {stage} at step {step}, {parameters:,} parameters".format(**result))


def export(workdir, out, stage=None, *, adapter=False, dtype=None, best=False):
  """Writes the weights of one stage of a run to the new folder `out`, on the current mesh.

  `stage` None is the last one that has a checkpoint. With `best` it is the step that the stage's
  loop.keep_best kept, not the newest. With `adapter` the adapters are written alone, not merged.
  `dtype` is "float32" or "bfloat16", None for that of the model's folder; adapters are float32.

  Returns:
    dict: folder, stage, step, parameters (the number written).

  Raises:
    ValueError: `workdir` is no run or has no checkpoint of the stage; `out` exists; or `adapter` is
      set, but the run trained no adapters, or trained them on a fresh model.
  """
  values = require_json(workdir, "config.json")
  if os.path.exists(out):
    raise ValueError(f"{out} exists; export to a new folder")
  # The mesh of the run does not matter here, and config.json of an old run has no mesh.slice.
  config = read_config(ConfigDict(values | {"mesh": dict(slice=1, data=-1, model=1)}), new=False)
  if adapter and not (config.model.lora.rank and config.model.path):
    raise ValueError(f"{workdir} has model.lora.rank = {config.model.lora.rank}, model.path = "
                     f"{config.model.path!r}: --adapter needs adapters (rank > 0) of a model that "
                     "is in a folder; export without it")
  stage = stage or latest_stage(workdir)
  opened = open_model(config.model)
  model = opened.config
  step = best_step(workdir, stage, getattr(config, stage).loop) if best else None
  step, params, base = restore.restore_params(workdir, stage, config, model, step=step)
  count = weights.count(model)
  if adapter:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    peft.to_peft(params, model, config.model.lora, out, config.model.path)
  elif config.model.path:
    hf.to_hf(lora.merge(base, params), model, out, config.model.path,
             serving=_serving(config, opened), dtype=dtype)
  else:
    hf.to_new_hf(lora.merge(base, params), model, out, tokenizer=opened.tokens.tokenizer,
                 serving=_serving(config, opened), dtype=dtype)
  return {"folder": os.fspath(out), "stage": stage, "step": step, "parameters": count}


def _serving(config, opened):
  """Serving of a run: its prompts, and how stage 2 draws answers."""
  sampling, tokens = config.aepo.sampling, opened.tokens
  return Serving(
    end=tokens.end, never=tuple(np.flatnonzero(~tokens.allowed).tolist()),
    pad=tokens.tokenizer.pad_token_id, temperature=sampling.temperature, top_p=sampling.top_p,
    top_k=sampling.top_k, vocab=opened.config.vocab, min_pixels=config.prompt.min_pixels,
    max_pixels=config.prompt.max_pixels,
    max_tokens=config.prompt.max_tokens[-1] + sampling.max_tokens)


if __name__ == "__main__":
  run(main)
