"""AEPO of SmolLM2-135M-Instruct on word problems: a pretrained text model, on a CPU.

    python -m ares_jax.train --config=configs/aepo_smollm2.py --workdir=DIR

In the current folder, model/ is the model and data/ the problems: examples/smollm2/README.md makes
both, runs the arms and shows what came out. The warm-up learns GSM8K's solutions, AdaCS chooses
among solutions in words and bare calculations, AEPO asks SVAMP's problems.
Baselines: --config=configs/aepo_smollm2.py:grpo and :dapo.
Hardware: 2 CPU cores, 8 GiB.
Hours: 1.0 for 34 iterations of AEPO; 1.6 for 40 of GRPO, some beside other work.
Expected score: 11.3% of SVAMP's held-out problems after 40 iterations (drawn answers, one seed).
"""

from ares_jax.run.recipe import choose_preset, recipe


def get_config(algorithm="aepo"):
  c = recipe()
  c.threads = 1  # data reading threads: the device is the same two cores
  c.stall_minutes = 120.0  # without a finished step: the run counts as hung
  c.model.update(path="model", sizes=None, compute_dtype="float32", remat="none", unroll=1)

  def rows(name):
    return (dict(path=f"data/{name}.jsonl", schema="plain", split="", weight=1.0),)

  c.data.digits = None
  c.data.files = dict(warmup=rows("solutions"), sft=rows("sft"), rl=rows("rl"),
                      eval=rows("svamp_test"))

  # The warm-up teaches the form of an answer, so that the prompt need not say it. Shapes for SVAMP
  # (at most 106 tokens) and GSM8K (207); texts alone, so pixels are not used.
  c.prompt.update(suffix="", max_tokens=(108, 216), windows=(0, 0), min_pixels=784, max_pixels=784)
  c.grade.workers = 1
  # 45 KiB of keys and values a token in float32.
  c.engine.update(slots=64, read=16, chunk=16, cache_gib=2.0)

  # 256 of 500 solutions, 66 tokens in the median and 353 at most; then 128 chosen responses.
  sft = dict(batch=8, row_tokens=(384, 640), row_windows=0, microbatch=1, frozen=())
  adamw = dict(learning_rate=1e-4, final_fraction=0.1, weight_decay=0.0, b2=0.99)
  c.warmup.update(steps=32, shuffle=True, **sft)
  c.warmup.optimizer.update(warmup_steps=2, **adamw)
  c.warmup.loop.update(save_every=4, keep=1)
  c.curate.update(problems=160, count=128, batch=16)
  c.adacs.update(steps=16, **sft)
  c.adacs.optimizer.update(warmup_steps=1, **adamw)
  c.adacs.loop.update(save_every=4, keep=1)

  # 216 + 160 tokens, the longest prompt and response.
  c.aepo.update(steps=60, prompts=8, minibatch=64, microbatch=2, row_tokens=(384,),
                log_responses=16)
  c.aepo.sampling.update(top_p=1.0, max_tokens=160)
  c.aepo.filter.batches = 3  # groups that are all right or all wrong teach nothing
  c.aepo.loss.update(old_logprob="sampler", sampler_gap=(0.01, 1.0))
  c.aepo.kl.target = (0.05, 0.05, 0.05)
  c.aepo.optimizer.learning_rate = 2e-5
  c.aepo.loop.update(save_every=5, keep=1)

  c.evaluate.update(problems=300, samples=4, batch=50)
  return choose_preset(c, algorithm)
