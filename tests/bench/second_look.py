"""Whether a second look pays in the digits problem, and on hard problems alone, before stage 2.

    python -m tests.bench.second_look --workdir=runs/claims/second_look/0 [--stage=adacs]

A finished cold start on a problem with `smudge` (docs/digits.md) answers held-out problems. Its own
first pass over the cells is sampled once; from there it is made to answer ("stepwise") or to look
again ("check"). "direct" is made to answer without working, "free" is left alone. Prints the share
of right answers by level, the difference of check and stepwise with its 95% interval over problems,
and the entropy of the three kinds among the free answers.
"""

import argparse
import collections
import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from ares_jax.data.digits import KINDS, DigitsSource
from ares_jax.grading.response import extract_boxed
from ares_jax.run.config import read_config
from ares_jax.run.files import require_json
from ares_jax.run.restore import restore_params
from ares_jax.run.setup import open_run
from ares_jax.sampling.sampler import stage_key
from ares_jax.system import mesh
from ares_jax.system.tables import markdown_table

DIRECT, STOP, AGAIN = "<think> </think>", " </think>", " wait check"
BATCH = 128  # problems


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--stage", default="adacs")
  parser.add_argument("--problems", type=int, default=2048)
  options = parser.parse_args()
  values = require_json(options.workdir, "config.json")
  config = read_config(ConfigDict(values), new=False)
  longest = config.prompt.max_tokens[-1] + config.aepo.sampling.max_tokens
  prompt = dataclasses.replace(config.prompt, max_tokens=(longest,))
  config = dataclasses.replace(config, prompt=prompt)
  with jax.set_mesh(mesh.make_mesh(-1, 1)), open_run(config, check=False) as run:
    _, params, _ = restore_params(options.workdir, options.stage, config, run.model)
    rows = list(map(DigitsSource(config.data.digits.problem, "test", 0,
                                 options.problems).__getitem__, range(options.problems)))
    answers = {kind: [] for kind in ("direct", "stepwise", "check", "free")}
    for start in range(0, len(rows), BATCH):
      batch = rows[start:start + BATCH]
      for kind, texts in answer(run, params, batch).items():
        answers[kind] += texts
  print(table(rows, answers))


def answer(run, params, rows):
  """{kind: responses} of a batch of rows."""
  free = continued(run, params, rows, [""] * len(rows))
  # A free answer may be direct; the first pass begins with the first cell.
  worked = continued(run, params, rows, [f"<think> {row['colours'][0]}" for row in rows])
  first = [text.partition(AGAIN)[0].partition(STOP)[0] for text in worked]
  return {"free": free,
          "direct": continued(run, params, rows, [DIRECT] * len(rows)),
          "stepwise": continued(run, params, rows, [text + STOP for text in first]),
          "check": continued(run, params, rows, [text + AGAIN for text in first])}


def continued(run, params, rows, begun):
  """Responses that begin with the texts `begun` and are sampled from there."""
  encoder, encoded = run.generator.encoder, []
  for row, text in zip(rows, begun, strict=True):
    prompt, tokens = encoder.encode(row), run.tokenizer(text)["input_ids"]
    after = prompt.positions.max() + 1 + np.arange(len(tokens), dtype=np.int32)
    encoded.append(dataclasses.replace(
      prompt, tokens=np.int32([*prompt.tokens, *tokens]),
      positions=np.concatenate([prompt.positions, np.tile(after, (3, 1))], 1),
      learnt=np.concatenate([prompt.learnt, np.zeros(len(tokens), bool)])))
  numbers = np.arange(len(rows))
  numbers = np.resize(numbers, BATCH)  # one shape
  batch = encoder.batch([rows[n] for n in numbers], numbers, [encoded[n] for n in numbers])
  sampling = run.config.evaluate.sampling(run.config.aepo.sampling.max_tokens)
  samples = run.generator.sample(params, batch, stage_key(0, "evaluate"), group=1,
                                 sampling=sampling)
  return [text + encoder.chat.text(tokens[mask]) for text, tokens, mask
          in zip(begun, samples.tokens, samples.mask, strict=False)]


def table(rows, answers):
  right = {kind: np.float64([extract_boxed(text) == row["answer"]
                             for row, text in zip(rows, texts, strict=True)])
           for kind, texts in answers.items()}
  levels = np.array([row["level"] for row in rows])
  modes = [DigitsSource.mode_of(text) for text in answers["free"]]
  lines = []
  for level in [*np.unique(levels), "all"]:
    chosen = np.flatnonzero((levels == level) | (level == "all"))
    gain = 100 * (right["check"] - right["stepwise"])[chosen]
    counts = collections.Counter(modes[index] for index in chosen)
    shares = np.array([counts[kind] / len(chosen) for kind in KINDS])
    entropy = -sum(share * np.log(share) for share in shares if share)
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    scores = [f"{100 * right[kind][chosen].mean():.1f}" for kind in right]
    lines.append([level, len(chosen), *scores, f"{gain.mean():+.1f} ± {half:.1f}",
                  " / ".join(f"{100 * share:.0f}" for share in shares), f"{entropy:.2f}"])
  return "\n".join(markdown_table(
    ["level", "problems", *right, "check - stepwise", " / ".join(KINDS) + ", %", "entropy, nats"],
    lines))


if __name__ == "__main__":
  main()
