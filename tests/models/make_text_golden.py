"""Makes the reference files of the text families in tests/models/golden with transformers.

    PYTHONPATH=tests python tests/models/make_text_golden.py

A random model of some 35k parameters of each, every parameter drawn anew, in bfloat16, and what
transformers computes with it in float32. Tests read the files without torch; oracle_test.py
recomputes them where torch is installed.
"""

import shutil
import sys

import numpy as np
from models.make_golden import (
  GOLDEN,
  GREEDY,
  VOCAB,
  case,
  folder,
  randomise,
  response_start,
  summary,
)

_SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
              num_attention_heads=4, bos_token_id=None, eos_token_id=None)
# Families differ in biases, norms of heads, head size, tying, and how often heads share keys.
FAMILIES = {
  "qwen2": dict(num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True,
                rope_parameters=dict(rope_type="default", rope_theta=1e6)),
  "qwen3": dict(num_key_value_heads=2, rms_norm_eps=1e-6, head_dim=16, tie_word_embeddings=False,
                rope_parameters=dict(rope_type="default", rope_theta=1e6)),
  "llama": dict(num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=True,
                rope_parameters=dict(rope_type="default", rope_theta=1e5)),
}


def write_model(family: str) -> None:
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  shutil.rmtree(folder(family), ignore_errors=True)
  config = AutoConfig.for_model(family, **_SIZES, **FAMILIES[family])
  model = AutoModelForCausalLM.from_config(config)
  randomise(model, 7)
  model.to(torch.bfloat16).save_pretrained(folder(family))


def references(family: str) -> dict[str, np.ndarray]:
  """What transformers computes in float32 on the case "text", QUANTITY -> array."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
  model = AutoModelForCausalLM.from_pretrained(
    folder(family), dtype=torch.float32, attn_implementation="eager").eval()
  tokens, _ = case("text")
  ids = torch.tensor(tokens, dtype=torch.long)[None]
  logits = model(input_ids=ids).logits
  out = {"logits": logits.detach().numpy()[0]}
  first = response_start(tokens)
  logprob = torch.log_softmax(logits[0], -1)[torch.arange(first - 1, len(tokens) - 1),
                                             ids[0, first:]].sum()
  logprob.backward()
  for key, weight in model.named_parameters():
    out[f"/gradient/{key}"] = weight.grad.numpy().copy()
  with torch.no_grad():
    for _ in range(GREEDY):
      ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
  out["greedy"] = ids[0, len(tokens):].numpy()
  return out


def main() -> None:
  for family in FAMILIES:
    write_model(family)
    np.savez_compressed(folder(family) / "references.npz", **summary(references(family)))
    size = sum(path.stat().st_size for path in folder(family).iterdir())
    print(f"{GOLDEN / family}: {size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
  main()
