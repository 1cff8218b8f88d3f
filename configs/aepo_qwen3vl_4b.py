"""AEPO of Qwen3-VL-4B after an AdaCS cold start: the paper's recipe (section 4, appendix A).

    python -m ares_jax.train --config=configs/aepo_qwen3vl_4b.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

The numbers are those of configs/aepo_qwen3vl_8b.py; --config.model.path may be a folder of the 2B
model too.
Baselines: --config=configs/aepo_qwen3vl_4b.py:grpo and :dapo.
Hardware: TPU chips. According to the plan, stage 2 takes at most 10.46 of 15.75 GiB on v5e:8x8 with
--config.mesh.model=4 --config.aepo.microbatch=16, 2B 8.77 (benchmarks.md); stage 1 was not planned.
Hours: not measured. Expected score: not measured.
"""

from ares_jax.run.recipe import load_config


def get_config(algorithm="aepo"):
  c = load_config(f"aepo_qwen3vl_8b.py:{algorithm}", __file__)
  c.model.path = "Qwen3-VL-4B-Instruct"
  return c
