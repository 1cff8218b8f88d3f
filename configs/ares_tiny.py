"""Both stages of ARES from scratch, on real handwriting, on a laptop.

    python -m ares_jax.train --config=configs/ares_tiny.py

A tiny model of the true Qwen2.5-VL architecture (0.55 M parameters) first learns to read and to add
(a warm-up, instead of pretrained weights). Then AdaCS (stage 1) and AEPO (stage 2) run as for the
7B model. No data are needed: docs/digits.md describes the problem.
Baselines: --config=configs/ares_tiny.py:grpo and :dapo (ares_jax/run/recipe.py).
Hardware: 2 CPU cores, 2 GiB.
Hours: 0.11 (6.4 minutes) with an empty compilation cache on two idle cores of an AMD EPYC.
Expected score: 88 to 96% right at temperature 1 over ten seeds on one type of CPU. In nine of them
the last fifth of the iterations changes nothing, the tenth still gains (benchmarks.md).
"""

from ares_jax.run.recipe import choose_preset, recipe


def get_config(algorithm="aepo"):
  c = recipe()
  c.threads = 1  # data reading threads: the device is the same two cores
  c.stall_minutes = 20.0  # without a finished step: the run counts as hung
  c.model.update(path="", compute_dtype="float32", remat="none", unroll=3)
  c.model.sizes = dict(
    embed=96, layers=3, heads=3, kv_heads=1, head_dim=32, mlp=256, rope_theta=1e4,
    mrope_sections=(4, 6, 6), norm_eps=1e-6, tied=True,
    vision=dict(
      depth=2, hidden=64, heads=2, mlp=128, patch=14, temporal_patch=2, merge=2,
      window=28,  # px: one cell, so window layers read and the full layer compares
      full_attention=(1,), out=96))

  c.data.files = None
  c.data.digits = dict(
    problem=dict(rows=2, columns=2, levels=5, operators=("+",), noise=0.02, smudge=0.0,
                 keys=tuple(range(10))),
    # Shares of (direct, stepwise, check) traces at level 1 and at the highest, linear in between:
    # the designed part of the problem.
    teacher=dict(slip=0.06, responses=4, first_level=(0.50, 0.05, 0.45),
                 last_level=(0.36, 0.54, 0.10), first_warmup=(0.85, 0.12, 0.03),
                 last_warmup=(0.75, 0.22, 0.03), captions=(0.9, 0.0), drills=(0.8, 0.0),
                 first_captions=0.125, first_drills=0.2, varied=True,
                 warmup_smudge=0.0),
    sft=640, rl=100_000, eval=256)

  c.prompt.update(suffix="", max_tokens=(26,), windows=(4,), min_pixels=28 * 28,
                  max_pixels=112 * 112)
  c.grade.workers = 1
  # Rows decoded at once; prompts read a call; tokens a call; GiB a device.
  c.engine.update(slots=128, read=32, cache_gib=1.0)

  sft = dict(batch=64, row_tokens=(160,), row_windows=24, microbatch=4, frozen=())
  adamw = dict(final_fraction=0.1, weight_decay=0.01, b2=0.98)
  c.warmup.update(steps=1200, shuffle=False, **sft)
  c.warmup.optimizer.update(learning_rate=3e-3, warmup_steps=150, **adamw)
  c.warmup.loop.update(save_every=200, keep=1)
  c.curate.update(problems=640, count=512, batch=64)
  c.adacs.update(steps=60, **sft)
  c.adacs.optimizer.update(learning_rate=5e-4, warmup_steps=30, **adamw)
  c.adacs.loop.update(save_every=200, keep=1)

  c.aepo.update(steps=120, prompts=32, minibatch=256, microbatch=8, row_tokens=(164,),
                log_responses=16)
  c.aepo.sampling.update(top_p=1.0, max_tokens=56)
  c.aepo.filter.batches = 1
  c.aepo.loss.update(old_logprob="sampler", sampler_gap=(0.01, 1.0))
  c.aepo.kl.target = (0.05, 0.05, 0.05)
  c.aepo.optimizer.learning_rate = 3e-4
  c.aepo.loop.update(save_every=10, keep=1)

  c.evaluate.problems = 256
  return choose_preset(c, algorithm)
