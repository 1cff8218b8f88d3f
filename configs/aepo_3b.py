"""AEPO of Qwen2.5-VL-3B after an AdaCS cold start: the paper's recipe (section 4, appendix A).

    python -m ares_jax.train --config=configs/aepo_3b.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

The numbers are those of configs/aepo_7b.py, which also names the data: the paper trains both sizes
with one recipe.
Baselines: --config=configs/aepo_3b.py:grpo and :dapo.
Hardware: TPU chips. According to the plan, the update takes 6.09 of 15.75 GiB on v5e:8x8 with
--config.mesh.model=4 --config.aepo.microbatch=16 (benchmarks.md); stage 1 needs
--config.adacs.microbatch=16 there too.
Hours: not measured. Expected score: not measured.
"""

from ares_jax.run.recipe import load_config


def get_config(algorithm="aepo"):
  c = load_config(f"aepo_7b.py:{algorithm}", __file__)
  c.model.path = "Qwen2.5-VL-3B-Instruct"
  return c
