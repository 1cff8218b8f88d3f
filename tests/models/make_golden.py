"""Makes the reference files in tests/models/golden with transformers and torch.

    python tests/models/make_golden.py

Two random models of 126k parameters, every parameter drawn anew (norms near 1, biases not 0), and
what transformers computes with them in float32: `tied`, one float32 file with a config.json in the
form of transformers 4, and `untied`, bfloat16 shards with the nested form of transformers 5.
Tests read the files without torch; oracle_test.py recomputes them where torch is installed.
"""

import json
import pathlib
import shutil
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
VARIANTS = ("tied", "untied")
IMAGE, START, END, VOCAB = 6, 3, 4, 128
# Name -> image sizes (height, width) in px, and how many text tokens stand before, between, behind.
# Windows are 56 px: 84, 140, 196 and 308 leave partial ones.
CASES = {
  "text": ((), (40,)),
  "image": (((112, 112),), (5, 9)),
  "unit": (((28, 28),), (1, 3)),
  "images": (((84, 140), (28, 308), (56, 56), (196, 84)), (4, 1, 0, 6, 8)),
}
GREEDY = 64  # tokens


def picture(height: int, width: int, seed: int) -> np.ndarray:
  """A deterministic noisy uint8 image [height, width, 3], the same with every numpy."""
  row, column, channel = np.indices((height, width, 3)).astype(np.uint64)
  x = (row * 7919 + column * 104729 + channel * 1299709 + seed * 15485863) * 2654435761
  return ((x >> 13) % 256).astype(np.uint8)


def case(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
  """Tokens int32 [T] and images of one case."""
  sizes, texts = CASES[name]
  pictures = [picture(height, width, seed) for seed, (height, width) in enumerate(sizes)]
  tokens, count = [], 0
  for index, length in enumerate(texts):
    tokens += [10 + (count + 37 * step) % (VOCAB - 10) for step in range(1, length + 1)]
    count += 41 * length
    if index < len(sizes):
      height, width = sizes[index]
      tokens += [START] + [IMAGE] * (height * width // 784) + [END]
  return np.int32(tokens), pictures


def folder(variant: str) -> pathlib.Path:
  return GOLDEN / variant


def references(variant: str, names=tuple(CASES)) -> dict[str, np.ndarray]:
  """What transformers computes in float32 with the weights of a variant, CASE/QUANTITY -> array."""
  import torch
  from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

  torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
  model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder(variant), dtype=torch.float32, attn_implementation="eager").eval()
  processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 10**6})
  out = {}
  for name in names:
    tokens, pictures = case(name)
    inputs = {}
    if pictures:
      batch = processor(images=pictures, return_tensors="np")
      inputs = {key: torch.tensor(value) for key, value in batch.items()}
      features = model.model.get_image_features(**inputs).pooler_output
      out[f"{name}/features"] = torch.cat(features).detach().numpy()

    def logits(ids, inputs=inputs):
      model.model.rope_deltas = None  # kept from call to call otherwise
      # Without mm_token_type_ids transformers silently falls back to 1-D positions.
      return model(input_ids=ids, attention_mask=torch.ones_like(ids),
                   mm_token_type_ids=(ids == IMAGE).int(), **inputs).logits

    ids = torch.tensor(tokens, dtype=torch.long)[None]
    result = logits(ids)
    out[f"{name}/logits"] = result.detach().numpy()[0]
    if pictures:
      out[f"{name}/positions"] = model.model.get_rope_index(
        ids, (ids == IMAGE).int(), image_grid_thw=inputs["image_grid_thw"])[0][:, 0].numpy()
    # The response: all tokens behind the last image, or the last half of the text.
    first = response_start(tokens)
    model.zero_grad()
    logprob = torch.log_softmax(result[0], -1)[torch.arange(first - 1, len(tokens) - 1),
                                               ids[0, first:]].sum()
    logprob.backward()
    for key, weight in model.named_parameters():
      # A tower that saw no image has no gradient.
      gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
      out[f"{name}/gradient/{key}"] = gradient.numpy().copy()
    if name in ("text", "image", "images"):
      with torch.no_grad():
        for _ in range(GREEDY):
          ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
      out[f"{name}/greedy"] = ids[0, len(tokens):].numpy()
  return out


def response_start(tokens: np.ndarray) -> int:
  images = np.flatnonzero(tokens == END)
  return int(images[-1]) + 1 if images.size else len(tokens) // 2


def summary(reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """References as they are committed: of each gradient the norm and 16 entries spread over it."""
  out = {}
  for key, value in reference.items():
    if "/gradient/" in key:
      flat = value.ravel()
      spread = flat[np.linspace(0, flat.size - 1, 16).astype(int)]
      value = np.float32([np.linalg.norm(flat.astype(np.float64)), *spread])
    out[key] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
  return out


def randomise(model, seed: int) -> None:
  """Draws every parameter anew, so that none can be left out unnoticed."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if "norm" in name or "ln_q" in name:
        weight.copy_(1 + 0.2 * noise)
      elif name.endswith("bias"):
        weight.copy_(0.3 * noise)
      else:
        weight.copy_(noise / weight[0].numel() ** 0.5)


def write_models() -> None:
  import torch
  from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

  for seed, variant in enumerate(VARIANTS):
    shutil.rmtree(folder(variant), ignore_errors=True)
    config = Qwen2_5_VLConfig(
      text_config=dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, bos_token_id=None,
        eos_token_id=None, rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                                mrope_section=[1, 1, 2])),
      vision_config=dict(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=56, out_hidden_size=32,
        fullatt_block_indexes=[1, 3]),
      image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END,
      tie_word_embeddings=variant == "tied")
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model, seed)
    if variant == "tied":
      model.save_pretrained(folder(variant))
      _flatten_config(folder(variant) / "config.json")
    else:
      model.to(torch.bfloat16).save_pretrained(folder(variant), max_shard_size="100KB")


def _flatten_config(path: pathlib.Path) -> None:
  """Rewrites config.json as transformers 4 wrote those of the published models."""
  new = json.loads(path.read_text())
  old = new.pop("text_config") | new
  old.pop("layer_types")
  rope = old.pop("rope_parameters")
  old["rope_theta"] = rope["rope_theta"]
  old["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
  vision = old["vision_config"]
  vision.pop("rope_parameters")
  vision["in_chans"] = vision.pop("in_channels")
  vision["spatial_patch_size"] = vision["patch_size"]
  old["model_type"] = "qwen2_5_vl"
  path.write_text(json.dumps(old, indent=2) + "\n")


def main() -> None:
  write_models()
  for variant in VARIANTS:
    np.savez_compressed(folder(variant) / "references.npz", **summary(references(variant)))
  size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
  print(f"{GOLDEN}: {size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
  main()
