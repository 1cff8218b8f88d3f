"""AEPO of Qwen2.5-VL-3B with adapters (LoRA) on one chip of 16 GB, such as Colab's TPU v5e-1.

    python -m ares_jax.train --config=configs/aepo_3b_lora_colab.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

Images of at most 448 x 448 pixels and answers of 1024 tokens; 16 prompts x 8 an iteration, one
update. The weights are held once, in bfloat16 (7 GiB): under the policy's adapters, under the
reference's, and for rollouts. All other numbers are those of configs/aepo_7b.py.
Baselines: --config=configs/aepo_3b_lora_colab.py:grpo and :dapo.
Hardware: one TPU v5e chip, according to the plan (benchmarks.md).
Hours: not measured. Expected score: not measured.
"""

from ares_jax.run.recipe import load_config


def get_config(algorithm="aepo"):
  c = load_config(f"aepo_7b.py:{algorithm}", __file__)
  c.threads = 4
  c.model.path = "Qwen2.5-VL-3B-Instruct"
  c.model.lora.update(rank=16, alpha=32.0)  # 30 million weights in adapters; s = 32 / 16

  c.data.bad_rows = "skip"  # rows that are longer than the shapes below
  c.data.files.sft = ()
  c.adacs.steps = 0  # no cold start
  c.data.files.rl = (dict(path="geometry3k", schema="geometry3k", split="train", weight=1.0),)
  c.data.files.eval = (dict(path="geometry3k", schema="geometry3k", split="test", weight=1.0),)
  # 200704 px are 256 tokens and 16 windows of a square; long images have partial windows as well.
  c.prompt.update(max_tokens=(512,), windows=(32,), min_pixels=50176, max_pixels=200704)
  c.grade.workers = 2
  c.engine.update(cache_gib=4.0)  # 36 KiB a token

  c.aepo.update(prompts=16, minibatch=128, microbatch=1, row_tokens=(3072,), log_responses=16)
  c.aepo.sampling.max_tokens = 1024
  c.aepo.filter.batches = min(c.aepo.filter.batches, 4)
  c.aepo.optimizer.learning_rate = 2e-5  # adapters want more than weights; ours, not tuned
  c.evaluate.update(problems=128, samples=4, batch=16)
  return c
