"""Both stages of ARES from scratch, on real handwriting, on a laptop.

    python -m ares_jax.train --config=configs/ares_tiny.py

Hardware: 2 CPU cores, 2 GiB; 6.6 minutes where nothing was compiled before (README.md says when and
where that was measured, and the expected score).
A tiny model of the true Qwen2.5-VL architecture (0.55 M parameters) first learns to read and to add
(warm-up: it takes the place of pretrained weights), then AdaCS (stage 1) and AEPO (stage 2) run as
for the 7B model. Baselines: --config=configs/ares_tiny.py:grpo and :dapo (ares_jax/run/presets.py).
"""

from ml_collections import ConfigDict

from ares_jax.run.presets import choose_preset


def get_config(algorithm="aepo"):
  c = ConfigDict()
  c.seed = 0
  c.threads = 1  # data reading threads: the device is the same two cores
  c.stall_minutes = 20.0  # without a finished step: the run counts as hung
  # Of several processes: s until all are there; s without a sign of one until the others end.
  c.hosts = dict(join=300.0, heartbeat=30.0)
  c.mesh = dict(slice=1, data=-1, model=1)

  c.model = ConfigDict(dict(path="", compute_dtype="float32", remat="none", unroll=3))
  # Rank 0 trains all weights; from nothing, adapters of random weights would learn little.
  c.model.lora = dict(rank=0, alpha=32.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
  c.model.sizes = dict(
    embed=96, layers=3, heads=3, kv_heads=1, head_dim=32, mlp=256, rope_theta=1e4,
    mrope_sections=(4, 6, 6), norm_eps=1e-6, tied=True,
    vision=dict(
      depth=2, hidden=64, heads=2, mlp=128, patch=14, temporal_patch=2, merge=2,
      window=28,  # px: one cell, so window layers read and the full layer compares
      full_attention=(1,), out=96))

  c.data = ConfigDict(dict(files=None, bad_rows="error"))
  c.data.digits = dict(
    problem=dict(rows=2, columns=2, levels=5, operators=("+",), noise=0.02),
    # Shares of (direct, stepwise, check) traces at level 1 and at the highest, linear in between:
    # the designed part of the problem.
    teacher=dict(slip=0.06, responses=4, first_level=(0.50, 0.05, 0.45),
                 last_level=(0.36, 0.54, 0.10), first_lesson=(0.85, 0.12, 0.03),
                 last_lesson=(0.75, 0.22, 0.03), captions=(0.9, 0.0), drills=(0.8, 0.0)),
    curated=640, prompts=100_000, test=256)

  c.prompt = dict(suffix="", max_tokens=(26,), windows=(4,), min_pixels=28 * 28,
                  max_pixels=112 * 112)
  c.grade = dict(workers=1, timeout=2.0, timeout_share=0.1, grader="layered")  # s an answer
  # Rows decoded at once; prompts read a call; tokens a call; GiB a device.
  c.engine = dict(slots=128, read=32, chunk=8, cache_gib=1.0)

  adam = dict(schedule="cosine", warmup_steps=30, final_fraction=0.1, b1=0.9, b2=0.98, eps=1e-8,
              weight_decay=0.01, clip=1.0, moments="float32")
  loop = dict(save_every=200, keep=1, strict=False, max_skipped=5)
  packed = dict(batch=64, row_tokens=(160,), row_windows=24, microbatch=4, frozen=())
  c.warmup = dict(steps=1200, shuffle=False, loop=loop, **packed,
                  optimizer=dict(learning_rate=3e-3, **adam))
  c.curate = dict(selection="adacs", pass_rates="probe", problems=640, samples=8, count=512,
                  batch=64)
  c.adacs = dict(steps=60, shuffle=True, loop=loop, **packed,
                 optimizer=dict(learning_rate=5e-4, **adam))

  c.aepo = ConfigDict(dict(
    steps=120, prompts=32, group=8, branches=0, minibatch=256, microbatch=8, row_tokens=(164,),
    frozen=("vision",), log_responses=16))
  c.aepo.sampling = dict(temperature=1.0, top_p=1.0, top_k=0, min_tokens=0, max_tokens=56)
  c.aepo.filter = dict(batches=1, low=0.01, high=0.99)
  c.aepo.entropy = dict(window=4, quantile=0.95, quantile_of="window", reduce="mean", decay=0.9,
                        detector="window", cover="window")
  c.aepo.reward = dict(
    kind="aepo", easy=0.75, medium=0.375, rule="signed", target="ema", target_scale=(0.8, 1.0, 1.2),
    target_decay=0.9, var_floor=1.0, cap=0.5, penalize="wrong", alpha_rate=0.05, token_bonus=0.0)
  c.aepo.loss = dict(advantage="std", equal_groups="zero", clip_low=0.2, clip_high=0.3,
                     clip_dual=3.0, average="token", old_logprob="sampler", importance_cap=2.0,
                     sampler_gap=(0.01, 1.0))
  c.aepo.kl = dict(estimator="k3", dynamic=True, start=(1.0, 1.0, 1.0), beta=(0.01, 0.01, 0.01),
                   rho=0.5, target=(0.05, 0.05, 0.05), rate=0.1, low=0.1, high=10.0)
  c.aepo.optimizer = dict(
    learning_rate=3e-4, schedule="constant", warmup_steps=0, final_fraction=1.0, b1=0.9, b2=0.999,
    eps=1e-8, weight_decay=0.01, clip=1.0, moments="float32")
  c.aepo.loop = dict(save_every=10, keep=1, strict=False, max_skipped=5)

  c.evaluate = dict(problems=256, samples=8, batch=64, temperature=1.0, top_p=1.0)
  c.wandb = dict(project="", name="")  # Weights & Biases; no project: nothing is sent
  return choose_preset(c, algorithm)
