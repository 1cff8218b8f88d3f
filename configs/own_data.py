"""AEPO of Qwen2.5-VL-3B on your own problems, in small: adapters, one chip, 20 iterations.

    python -m ares_jax.train --config=configs/own_data.py --workdir=DIR \\
      --config.model.path=HF_FOLDER --config.data.files.rl=train.jsonl \\
      --config.data.files.eval=held_out.jsonl

A line of your files is {"question": "<image>How many?", "answer": ["3"], "images": ["a.png"]};
docs/data.md says more. Paths are relative to the folder in which the command is started, images to
the folder of their file. All other numbers are those of configs/aepo_3b_lora_colab.py.
Baselines: --config=configs/own_data.py:grpo and :dapo.
Hardware: as configs/aepo_3b_lora_colab.py, one TPU v5e chip according to the plan (benchmarks.md).
Hours: not measured. Expected score: not measured.
"""

from ares_jax.run.recipe import load_config


def get_config(algorithm="aepo"):
  c = load_config(f"aepo_3b_lora_colab.py:{algorithm}", __file__)
  # A text is the path of a file of the schema "plain"; "SCHEMA:PATH" names another schema.
  c.data.files.rl = ("train.jsonl",)
  c.data.files.eval = ("held_out.jsonl",)
  c.data.bad_rows = "skip"  # listed in WORKDIR/bad_rows.jsonl
  c.aepo.update(steps=20, prompts=8, minibatch=64, log_responses=64)
  c.aepo.loop.save_every = 2
  c.evaluate.update(problems=16, samples=4, batch=16)
  return c
