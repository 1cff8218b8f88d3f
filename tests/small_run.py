"""A run's folder written by hand: three AEPO iterations, texts that try to be markup."""

import json

import numpy as np
import tiny

from ares_jax.run import responses

HOSTILE = "</script><script>window.broken = 1</script><!--<img src=x onerror='window.broken = 1'>"
# tokens and their entropies in nats
TOKENS = (("<think>", 0.0), (" wait", 2.0), (HOSTILE, 1.0), (" so", 3.0), (" 7", 0.0))
NAMES = ("easy", "medium", "hard")


def line(step, sample, correct, rate, stage="aepo", problem="p0", image=()):
  return {"stage": stage, "step": step, "id": problem, "sample": sample,
          "question": f"Question <b>{problem}</b>", "answer": "7", "images": list(image),
          "response": "".join(text for text, _ in TOKENS), "correct": correct, "format_ok": 1.0,
          "pass_rate": rate, "tokens": [text for text, _ in TOKENS],
          "entropy": [nats for _, nats in TOKENS]}


def metrics(step):
  found = {"stage": "aepo", "step": step, "hwe/threshold": 1.5, "response/tokens": 5.0,
           "rollout/batches": 1, "seconds/rollout": 0.5, "seconds/step": 1.0,
           "reward/accuracy": step / 4, "response/entropy": 1.2, "hwe/batch_threshold": 1.4}
  for index, name in enumerate(NAMES):
    found |= {f"hwe/target/{name}": 1.0 + index, f"hwe/multiplier/{name}": 0.25,
              f"kl/kappa/{name}": 1.0 + step, f"kl/outside/{name}": 0.04 + 0.01 * step,
              # No hard prompt in the second iteration.
              f"hwe/count/{name}": None if (index, step) == (2, 2) else 1.0}
  return found


def write(folder, **changes):
  """Fills a folder; `changes` of the tiny config as in tiny.values."""
  folder.mkdir(exist_ok=True)
  config = tiny.values(aepo__group=8, aepo__minibatch=32, aepo__microbatch=32,
                       aepo__entropy__window=2, **changes)
  (folder / "config.json").write_text(config.to_json_best_effort())
  picture = np.zeros((56, 56, 3), np.uint8)
  picture[:28] = 255
  name, jpeg = responses._jpeg(picture, turn=True)
  responses._write_images(folder, [("", {name: jpeg})])
  image = [name]
  rollouts = [line(step, sample, float(sample < right), right / 8, problem=f"p{step}", image=image)
              for step, right in ((1, 6), (2, 3), (3, 0)) for sample in range(4)]
  held_out = {stage: [line(step, sample, float(sample), 0.5, stage, "test", image)
                      for sample in range(2)] for stage, step in (("adacs", 2), ("aepo", 3))}
  part = {"n": 4, "length": 5.0, "accuracy": 0.5}
  results = {stage: {"bucket": {name: part for name in NAMES}, "level": {"1": part}}
             for stage in held_out}
  (folder / "held_out").mkdir()
  for name, lines in {"rollouts": rollouts, "metrics": [metrics(step) for step in (1, 2, 3)],
                      **{f"held_out/{stage}": kept for stage, kept in held_out.items()}}.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  (folder / "results.json").write_text(json.dumps(results))
  return str(folder)
