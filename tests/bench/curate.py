"""What AdaCS curation holds in memory, at the size of the paper and with responses of its length.

    python -m tests.bench.curate [--problems=224000] [--streamed=64] [--tokens=32000]

Selection: a file of `problems` x 8 lengths to the report of what was chosen. Streaming: `streamed`
problems x 8 responses of `tokens` tokens, made as they are asked for, through the steps before it
in batches of 16; the probe's own sampling and the grader are left out. Memory is the largest the
process grew by while it went on, above what one batch of responses takes.
"""

import argparse
import json
import os
import tempfile
import time
import types

import numpy as np
import psutil

from ares_jax import adacs
from ares_jax.data import curate, digits
from ares_jax.data.chat import Chat


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, size in (("problems", 224_000), ("streamed", 64), ("tokens", 32_000)):
    parser.add_argument(f"--{name}", type=int, default=size)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    selection(os.path.join(folder, "curation.jsonl"), options.problems)
    streaming(folder, options.streamed, options.tokens)


def selection(path, problems):
  rng = np.random.default_rng(0)
  with open(path, "w", encoding="utf-8") as file:
    for number in range(problems):
      passes = int(rng.integers(9))
      tokens = (rng.lognormal(9 - passes / 8, 0.5, 8)).astype(int).tolist()
      tokens = [length if rng.random() < 0.6 else None for length in tokens]
      file.write(json.dumps({"problem": number, "id": f"p{number}", "source": f"s{number % 5}",
                             "passes": passes, "tokens": tokens}) + "\n")
  before, began = memory(), time.perf_counter()
  report = curate.report(path, selection="adacs", count=34_000, samples=8,
                         rng=np.random.default_rng(0))
  print(f"selection: {report['candidates']} right responses of {problems} problems, "
        f"{len(report['chosen'])} chosen: {time.perf_counter() - began:.1f} s, "
        f"{memory() - before:.0f} MiB more at its end")


def streaming(folder, problems, tokens):
  tokenizer = digits.tokenizer()
  chat = Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>"))
  generator = types.SimpleNamespace(
    encoder=types.SimpleNamespace(chat=chat), grader=types.SimpleNamespace(
      grade=lambda texts, truths: (np.ones(len(texts)), None, 0)))

  class Source:
    seen = []

    def __len__(self):
      return problems

    def __getitem__(self, number):
      self.seen.append(memory())
      return {"id": str(number), "source": "s", "answer": "1",
              "responses": [" red" * tokens + f" {number}{sample}" for sample in range(8)]}

  adacs._pass_counts = lambda params, rows, *_: np.zeros(len(rows), int)
  config = adacs.CurateConfig(selection="adacs", problems=problems, samples=8, count=problems,
                              batch=16)
  os.remove(os.path.join(folder, "curation.jsonl"))
  began = time.perf_counter()
  source = Source()
  adacs.curate(None, source, config, generator=generator, workdir=folder, max_tokens=8, seed=0)
  batches = [max(source.seen[start : start + 16]) for start in range(0, len(source.seen), 16)]
  print(f"streaming: {problems} problems x 8 x {tokens} tokens, {time.perf_counter() - began:.0f} "
        f"s; process at most {', '.join(f'{held:.0f}' for held in batches)} MiB batch by batch")


def memory():
  return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
  main()
