"""AEPO of Qwen2.5-VL-7B after an AdaCS cold start: the paper's recipe (section 4, appendix A).

    python -m ares_jax.train --config=configs/aepo_7b.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

The data are named in `c.data.files` below: stage 1 chooses among the responses of `curated` by pass
rate, --config.adacs.steps=0 starts a cold-started model at stage 2, and --config.aepo.steps=0 stops
after stage 1.

Hardware: TPU chips. Hours and expected score: not measured. By plan, 8 chips with 6 GiB for keys
and values decode 40 answers at a time, and hold 32 prompts of 4096 tokens of the 512; on v5e:8x8
an iteration's programs fit with --config.mesh.model=4 --config.aepo.microbatch=16 (benchmarks.md),
and stage 1 there needs --config.adacs.microbatch=16 too, or --config.adacs.steps=0.
Baselines: --config=configs/aepo_7b.py:grpo and :dapo (ares_jax/run/presets.py).
"""

from ml_collections import ConfigDict

from ares_jax.run.presets import choose_preset


def get_config(algorithm="aepo"):
  c = ConfigDict()
  c.seed = 0
  c.threads = 16  # data reading threads a host
  c.stall_minutes = 60.0  # without a finished step: the run counts as hung
  # Of several processes: s until all are there; s without a sign of one until the others end.
  c.hosts = dict(join=300.0, heartbeat=30.0)
  c.mesh = dict(slice=1, data=-1, model=1)

  c.model = dict(path="Qwen2.5-VL-7B-Instruct", sizes=None, compute_dtype="bfloat16",
                 remat="block", unroll=1,
                 # Rank 0 trains all weights; see configs/aepo_3b_lora_colab.py for adapters.
                 lora=dict(rank=0, alpha=32.0, targets=("q", "k", "v", "o", "gate", "up", "down")))

  # What each stage draws from; ares_jax/data/sources.py shows a line of every schema. A source's
  # weight is its share of the rows drawn.
  c.data = ConfigDict(dict(digits=None, bad_rows="error"))
  c.data.files = dict(
    lessons=(),
    curated=(dict(path="curated.jsonl", schema="plain", split="", weight=1.0),),
    prompts=(dict(path="ViRL39K", schema="virl39k", split="", weight=0.8),
             dict(path="Big-Math", schema="bigmath", split="train", weight=0.2)),
    test=(dict(path="ARES-hard-validation", schema="ares_hard_validation", split="", weight=1.0),))

  c.prompt = dict(
    suffix=" First think, inside <think> and </think>. Then give the final answer in \\boxed{}.",
    # Shapes of a prompt batch: 784 px are a token and 12544 px a window, partial ones at the edges.
    # An image of 4194304 px alone has 5329 tokens: rows beyond the last shape are an error.
    max_tokens=(1024, 2048, 4096), windows=(96, 192, 384),
    min_pixels=262144, max_pixels=4194304)
  c.grade = dict(workers=8, timeout=2.0, timeout_share=0.1, grader="layered")  # s an answer
  # As many rows at once as fit into 6 GiB of keys and values a device; prompts read a call.
  c.engine = dict(slots=0, read=8, chunk=64, cache_gib=6.0)

  adam = dict(b1=0.9, b2=0.999, eps=1e-8, clip=1.0, moments="float32")
  loop = dict(save_every=5, keep=2, strict=False, max_skipped=5)
  # The 256 examples of a step are some 40 rows, and microbatches are whole: rows are shortened so
  # that 94% of the tokens are real, not 89% (benchmarks.md). Each size is compiled when it first
  # comes: 17 of them would make 99%.
  sft = dict(shuffle=True, row_tokens=(24576, 28672, 32768), row_windows=768, microbatch=8,
             frozen=("vision",), loop=loop)
  c.warmup = dict(steps=0, batch=256, **sft, optimizer=dict(
    learning_rate=2e-5, schedule="cosine", warmup_steps=0, final_fraction=0.0, weight_decay=0.0,
    **adam))
  # pass_rates="column" takes each row's own "pass_rate", in eighths, in the place of a probe.
  c.curate = dict(selection="adacs", pass_rates="probe", problems=224_000, samples=8, count=34_000,
                  batch=512)
  # 2 epochs of 34k responses in batches of 256 are 266 steps.
  c.adacs = dict(steps=266, batch=256, **sft, optimizer=dict(
    learning_rate=2e-5, schedule="cosine", warmup_steps=13, final_fraction=0.0, weight_decay=0.0,
    **adam))

  c.aepo = ConfigDict(dict(
    steps=100, prompts=512, group=8, branches=0, minibatch=128, microbatch=8, frozen=("vision",),
    # 4096 + 16384 tokens, the longest prompt and response, or a little more if that pads less.
    row_tokens=(20480, 22528, 24576), log_responses=64))
  c.aepo.sampling = dict(temperature=1.0, top_p=0.99, top_k=0, min_tokens=0, max_tokens=16384)
  c.aepo.filter = dict(batches=20, low=0.01, high=0.99)
  c.aepo.entropy = dict(window=4, quantile=0.95, quantile_of="window", reduce="mean", decay=0.9,
                        detector="window", cover="window")
  c.aepo.reward = dict(
    kind="aepo", easy=0.75, medium=0.375, rule="signed", target="ema", target_scale=(0.8, 1.0, 1.2),
    target_decay=0.9, var_floor=1.0, cap=0.5, penalize="wrong", alpha_rate=0.05, token_bonus=0.0)
  c.aepo.loss = dict(advantage="std", equal_groups="zero", clip_low=0.2, clip_high=0.3,
                     clip_dual=3.0, average="token", old_logprob="recompute", importance_cap=2.0,
                     sampler_gap=(0.1, 1.0))
  # beta, rho and the controller's numbers are ours: the paper does not print them.
  c.aepo.kl = dict(estimator="k3", dynamic=True, start=(1.0, 1.0, 1.0), beta=(0.01, 0.01, 0.01),
                   rho=0.5, target=(0.02, 0.02, 0.02), rate=0.1, low=0.1, high=10.0)
  c.aepo.optimizer = dict(learning_rate=1e-6, schedule="constant", warmup_steps=0,
                          final_fraction=1.0, weight_decay=0.01, **adam)
  c.aepo.loop = loop

  c.evaluate = dict(problems=512, samples=8, batch=64, temperature=1.0, top_p=1.0)
  c.wandb = dict(project="", name="")  # Weights & Biases; no project: nothing is sent
  return choose_preset(c, algorithm)
