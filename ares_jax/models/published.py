"""The published sizes of Qwen2.5-VL."""

from ares_jax.models.config import ModelConfig, VisionConfig


def _published(embed, layers, heads, kv_heads, mlp, vocab, tied):
  vision = VisionConfig(depth=32, hidden=1280, heads=16, mlp=3420, patch=14, temporal_patch=2,
                        merge=2, window=112, full_attention=(7, 15, 23, 31), out=embed)
  return ModelConfig(vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads,
                     head_dim=128, mlp=mlp, rope_theta=1e6, mrope_sections=(16, 24, 24),
                     norm_eps=1e-6, tied=tied, vision=vision, image_token=151655,
                     compute_dtype="bfloat16", remat="block", unroll=1)


SIZE_3B = _published(2048, 36, 16, 2, 11008, 151936, True)
SIZE_7B = _published(3584, 28, 28, 4, 18944, 152064, False)
BY_NAME = {"Qwen2.5-VL-3B-Instruct": SIZE_3B, "Qwen2.5-VL-7B-Instruct": SIZE_7B}
