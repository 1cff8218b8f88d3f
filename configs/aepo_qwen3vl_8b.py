"""AEPO of Qwen3-VL-8B after an AdaCS cold start: the paper's recipe (section 4, appendix A).

    python -m ares_jax.train --config=configs/aepo_qwen3vl_8b.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

The numbers are those of configs/aepo_7b.py, which also names the data, but for the capacity for
images: 1024 px are a token here, and a row's images lie densely. The paper trains Qwen2.5-VL.
The folder may be of the Instruct or the Thinking models; the template of the latter opens <think>.
Baselines: --config=configs/aepo_qwen3vl_8b.py:grpo and :dapo.
Hardware: TPU chips. According to the plan, stage 2 takes at most 13.65 of 15.75 GiB on v5e:8x8 with
--config.mesh.model=4 --config.aepo.microbatch=16 (benchmarks.md); stage 1 was not planned.
Hours: not measured. Expected score: not measured.
"""

from ares_jax.run.recipe import load_config


def get_config(algorithm="aepo"):
  c = load_config(f"aepo_7b.py:{algorithm}", __file__)
  c.model.path = "Qwen3-VL-8B-Instruct"
  # A window is 16 tokens of any image. An image of 4194304 px alone has 4096 tokens: with a text
  # it is too long for the last shape, an error.
  c.prompt.windows = (64, 128, 256)
  # All blocks of the tower attend to all of a row's capacity: no more than examples need.
  c.warmup.row_windows = c.adacs.row_windows = 512
  return c
