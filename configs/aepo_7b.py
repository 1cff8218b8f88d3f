"""AEPO of Qwen2.5-VL-7B after an AdaCS cold start: the paper's recipe (section 4, appendix A).

    python -m ares_jax.train --config=configs/aepo_7b.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

Data: name your files in `c.data.files` below. Stage 1 chooses among the responses of `sft` by
pass rate; --config.adacs.steps=0 starts a cold-started model at stage 2, and --config.aepo.steps=0
stops after stage 1.
Baselines: --config=configs/aepo_7b.py:grpo and :dapo (ares_jax/run/recipe.py).
Hardware: TPU chips. According to the plan, 8 chips with 6 GiB for keys and values decode 48 of
the longest answers at a time. On v5e:8x8 the programs of an iteration fit with
--config.mesh.model=4 --config.aepo.microbatch=16 (benchmarks.md); stage 1 needs
--config.adacs.microbatch=16 there too.
Hours: not measured. Expected score: not measured.
"""

from ares_jax.run.recipe import choose_preset, recipe


def get_config(algorithm="aepo"):
  c = recipe()
  c.threads = 16  # data reading threads a host
  c.stall_minutes = 60.0  # without a finished step: the run counts as hung
  c.model.update(path="Qwen2.5-VL-7B-Instruct", sizes=None, compute_dtype="bfloat16",
                 remat="block", unroll=1)

  # The files of each stage; ares_jax/data/sources.py shows a line of every schema. A source's
  # weight is its share of the rows drawn.
  c.data.digits = None
  c.data.files = dict(
    warmup=(),
    sft=(dict(path="curated.jsonl", schema="plain", split="", weight=1.0),),
    rl=(dict(path="ViRL39K", schema="virl39k", split="", weight=0.8),
        dict(path="Big-Math", schema="bigmath", split="train", weight=0.2)),
    eval=(dict(path="ARES-hard-validation", schema="ares_hard_validation", split="", weight=1.0),))

  c.prompt.update(
    suffix=" First think, inside <think> and </think>. Then give the final answer in \\boxed{}.",
    # Shapes of a prompt batch: 784 px are a token and 12544 px a window, partial ones at the edges.
    # An image of 4194304 px alone has 5329 tokens: rows beyond the last shape are an error.
    max_tokens=(1024, 2048, 4096), windows=(96, 192, 384),
    min_pixels=262144, max_pixels=4194304)
  c.grade.workers = 8
  # Keys and values of a device. int8_pages decodes faster, but further from the trainer's policy.
  c.engine.update(cache_gib=6.0)

  # The 256 examples of a step are some 40 rows, and microbatches are complete: rows are shortened
  # so that 94% of the tokens are real, not 89% (benchmarks.md). Each size is compiled when it first
  # comes: 17 of them would make 99%.
  sft = dict(batch=256, row_tokens=(24576, 28672, 32768), row_windows=768, microbatch=8,
             frozen=("vision",))
  adamw = dict(learning_rate=2e-5, final_fraction=0.0, weight_decay=0.0, b2=0.999)
  saved = dict(save_every=5, keep=2)
  c.warmup.update(steps=0, shuffle=True, **sft)
  c.warmup.optimizer.update(warmup_steps=0, **adamw)
  c.warmup.loop.update(saved)
  c.curate.update(problems=224_000, count=34_000, batch=512)
  # 2 epochs of 34k responses in batches of 256 are 266 steps.
  c.adacs.update(steps=266, **sft)
  c.adacs.optimizer.update(warmup_steps=13, **adamw)
  c.adacs.loop.update(saved)

  # 4096 + 16384 tokens, the longest prompt and response, or a little more if that pads less.
  c.aepo.update(steps=100, prompts=512, minibatch=128, microbatch=8,
                row_tokens=(20480, 22528, 24576), log_responses=64)
  c.aepo.sampling.update(top_p=0.99, max_tokens=16384)
  c.aepo.filter.batches = 20
  c.aepo.loss.update(old_logprob="recompute", sampler_gap=(0.1, 1.0))
  c.aepo.kl.target = (0.02, 0.02, 0.02)
  c.aepo.optimizer.learning_rate = 1e-6
  c.aepo.loop.update(saved)

  c.evaluate.problems = 512
  return choose_preset(c, algorithm)
