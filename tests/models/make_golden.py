"""Makes the reference files in tests/models/golden with transformers and torch.

    python tests/models/make_golden.py

Random models of some 100k parameters, every parameter drawn anew (norms near 1, biases not 0), and
what transformers computes with them in float32. Two are Qwen2.5-VL: `tied`, one float32 file with a
config.json in the form of transformers 4, and `untied`, bfloat16 shards with the nested form of
transformers 5. `qwen2_vl` and `qwen3_vl` are of these families; `qwen3_vl_flat` has no DeepStack.
Tests read the files without torch; oracle_test.py recomputes them where torch is installed.
"""

import json
import math
import pathlib
import shutil
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
VARIANTS = ("tied", "untied")  # of Qwen2.5-VL
FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen3_vl_flat")
IMAGE, START, END, VOCAB = 6, 3, 4, 128
# Name -> image sizes (height, width) in units, which become a token each, and how many text tokens
# stand before, between, behind. Windows are 2 units: odd sizes leave partial ones.
CASES = {
  "text": ((), (40,)),
  "image": (((4, 4),), (5, 9)),
  "unit": (((1, 1),), (1, 3)),
  "images": (((3, 5), (1, 11), (2, 2), (7, 3)), (4, 1, 0, 6, 8)),
}
GREEDY = 64  # tokens


def picture(height: int, width: int, seed: int) -> np.ndarray:
  """A deterministic noisy uint8 image [height, width, 3], the same with every numpy."""
  row, column, channel = np.indices((height, width, 3)).astype(np.uint64)
  x = (row * 7919 + column * 104729 + channel * 1299709 + seed * 15485863) * 2654435761
  return ((x >> 13) % 256).astype(np.uint8)


def case(name: str, unit: int = 28) -> tuple[np.ndarray, list[np.ndarray]]:
  """Tokens int32 [T] and images of one case; a unit has a side of `unit` px."""
  sizes, texts = CASES[name]
  pictures = [picture(unit * rows, unit * columns, seed)
              for seed, (rows, columns) in enumerate(sizes)]
  tokens, count = [], 0
  for index, length in enumerate(texts):
    tokens += [10 + (count + 37 * step) % (VOCAB - 10) for step in range(1, length + 1)]
    count += 41 * length
    if index < len(sizes):
      tokens += [START] + [IMAGE] * math.prod(sizes[index]) + [END]
  return np.int32(tokens), pictures


def folder(variant: str) -> pathlib.Path:
  return GOLDEN / variant


def references(variant: str, names=tuple(CASES)) -> dict[str, np.ndarray]:
  """What transformers computes in float32 with the weights of a variant, CASE/QUANTITY -> array."""
  import torch
  from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

  torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
  model = AutoModelForImageTextToText.from_pretrained(
    folder(variant), dtype=torch.float32, attn_implementation="eager").eval()
  patch = model.config.vision_config.patch_size
  statistics = {} if patch == 14 else dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
  processor = Qwen2VLImageProcessorPil(
    size={"shortest_edge": 784, "longest_edge": 10**6}, patch_size=patch, **statistics)
  out = {}
  for name in names:
    tokens, pictures = case(name, 2 * patch)
    inputs = {}
    if pictures:
      batch = processor(images=pictures, return_tensors="np")
      inputs = {key: torch.tensor(value) for key, value in batch.items()}
      features = model.model.get_image_features(**inputs)
      wide = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
      out[f"{name}/features"] = torch.cat(
        [torch.cat(each) for each in wide], dim=-1).detach().numpy()

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
          last = logits(ids)[:, -1:]
          last[..., IMAGE] = -torch.inf  # an answer holds no images
          ids = torch.cat([ids, last.argmax(-1)], 1)
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
  from transformers import AutoModelForImageTextToText

  for seed, variant in enumerate((*VARIANTS, *FAMILIES)):
    shutil.rmtree(folder(variant), ignore_errors=True)
    model = AutoModelForImageTextToText.from_config(_config(variant))
    randomise(model, seed)
    if variant == "tied":
      model.save_pretrained(folder(variant))
      _flatten_config(folder(variant) / "config.json")
    else:
      model.to(torch.bfloat16).save_pretrained(folder(variant), max_shard_size="100KB")


def _config(variant):
  import transformers

  rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2])
  text = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, bos_token_id=None,
              eos_token_id=None)
  vision = dict(depth=4, hidden_size=32, num_heads=2, spatial_merge_size=2, temporal_patch_size=2)
  kind = "qwen2_5_vl"
  if variant in VARIANTS:
    vision |= dict(intermediate_size=48, patch_size=14, window_size=56, out_hidden_size=32,
                   fullatt_block_indexes=[1, 3])
  elif variant == "qwen2_vl":
    kind, vision = variant, vision | dict(embed_dim=32, mlp_ratio=2, patch_size=14)
  else:
    kind = "qwen3_vl"
    rope |= dict(mrope_section=[4, 2, 2], mrope_interleaved=True)
    text |= dict(head_dim=16)
    vision |= dict(intermediate_size=48, patch_size=16, out_hidden_size=32,
                   num_position_embeddings=25,
                   deepstack_visual_indexes=[0, 2] if variant == "qwen3_vl" else [])
  return transformers.AutoConfig.for_model(
    kind, text_config=text | dict(rope_parameters=rope), vision_config=vision,
    image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END,
    tie_word_embeddings=variant in ("tied", "qwen3_vl"))


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
  for variant in (*VARIANTS, *FAMILIES):
    np.savez_compressed(folder(variant) / "references.npz", **summary(references(variant)))
  size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
  print(f"{GOLDEN}: {size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
  main()
