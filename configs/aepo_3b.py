"""AEPO of Qwen2.5-VL-3B after an AdaCS cold start: the paper's recipe (section 4, appendix A).

    python -m ares_jax.train --config=configs/aepo_3b.py --workdir=DIR \\
      --config.model.path=HF_FOLDER

The data are named in `c.data.files` of configs/aepo_7b.py.

The numbers are those of configs/aepo_7b.py: the paper trains both sizes with one recipe. Baselines:
--config=configs/aepo_3b.py:grpo and :dapo. Hardware: TPU chips; by plan the update takes 6.09
of 15.75 GiB on v5e:8x8 with --config.mesh.model=4 --config.aepo.microbatch=16 (benchmarks.md),
where stage 1 needs --config.adacs.microbatch=16 too, or --config.adacs.steps=0.
Hours and expected score: not measured.
"""

import os

from ares_jax.system.config import load


def get_config(algorithm="aepo"):
  c = load(os.path.join(os.path.dirname(__file__), f"aepo_7b.py:{algorithm}")).unlock()
  c.model.path = "Qwen2.5-VL-3B-Instruct"
  return c
