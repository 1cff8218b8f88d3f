"""Writes adapters as a folder that the peft library, and programs built on it, can load.

Importing this module needs neither peft nor torch.
"""

import re

import numpy as np
from safetensors.numpy import save_file

from ares_jax.models import hf, hf_files
from ares_jax.models.config import ModelConfig
from ares_jax.models.lora import LoraConfig
from ares_jax.models.weights import Params

# peft prefixes the module names of the model it wraps with this.
_WRAPPED = "base_model.model."


def to_peft(adapters: Params, config: ModelConfig, lora: LoraConfig, folder: hf_files.Folder,
            base: hf_files.Folder) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, float32.

  peft computes x W^T + (alpha / r) x A^T B^T with A [r, inputs] and B [outputs, r]: our
  matrices, transposed. The folder appears complete or not at all. Of a single process.

  Args:
    adapters: {target: {"a", "b"}}, as in lora.adapter_table.
    config, lora: sizes of the base model, and of the adapters.
    folder: must not exist yet.
    base: the Hugging Face folder of the base model, which adapter_config.json names.

  Raises:
    ValueError: the folder exists.
  """
  tensors, modules, decoder = {}, [], "model.language_model." if config.vision else "model."
  for target, pair in adapters.items():
    # In memory transformers nests the decoder of a model with images deeper than the files do.
    rule = hf_files.RULES[f"blocks/{target}"].name.replace("model.", decoder, 1)
    modules.append(rule.removesuffix(".weight").partition("{layer}.")[2])
    for layer in range(config.layers):
      a, b = (np.asarray(pair[part][layer]) for part in ("a", "b"))
      name = _WRAPPED + rule.format(layer=layer).removesuffix("weight")
      tensors[f"{name}lora_A.weight"] = _matrix(a.reshape(-1, lora.rank))
      tensors[f"{name}lora_B.weight"] = _matrix(b.reshape(lora.rank, -1))
  # A pattern, because the vision tower has modules of the same names, without adapters.
  either = "|".join(map(re.escape, modules))
  fields = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": lora.rank,
            "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "target_modules": rf".*{re.escape(decoder)}layers\.\d+\.({either})"}
  with hf.atomic_folder(folder) as partial:
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    hf_files.write_object(partial / "adapter_config.json", fields)


def _matrix(ours):
  return np.ascontiguousarray(np.float32(ours).T)
