"""What AdaCS curation holds in memory, at the size of the paper and with responses of its length.

    python -m tests.bench.curate [--problems=224000] [--texts=16000] [--streamed=64]
    python -m tests.bench.curate --only=packing [--rows=34000]

The first three go through the whole of `adacs.curate`, its files and its report among it, with pass
rates from their column and a grader that takes every response for right; memory is the process's,
looked at whenever a row is read. 8 responses a problem of up to `tokens` tokens.
Counts: `problems` problems; for a text stands the number of its tokens.
Texts: `texts` problems with texts of their full length, 4 bytes a token, tokens counted by length.
Streaming: `streamed` problems with texts and the tokenizer, in batches of 16.
Packing: `rows` prompts and responses of realistic lengths (see `packing`) into packed rows of 32768
tokens, of the lengths of configs/aepo_7b.py, and of 17: the share of tokens that are real.
"""

import argparse
import collections
import json
import os
import tempfile
import time
import types

import numpy as np
import psutil

from ares_jax import adacs
from ares_jax.data import digits
from ares_jax.data.chat import Chat
from ares_jax.data.packing import first_fit
from ares_jax.run import config as run_config
from ares_jax.run.setup import StageContext


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, size in (("problems", 224_000), ("texts", 16_000), ("streamed", 64),
                     ("tokens", 32_000), ("rows", 34_000)):
    parser.add_argument(f"--{name}", type=int, default=size)
  parser.add_argument("--only", choices=("counts", "texts", "streaming", "packing"))
  options = parser.parse_args()
  tokenizer = digits.tokenizer()
  chat = Chat(tokenizer, "", tokenizer.convert_tokens_to_ids("<|image_pad|>"))
  cases = {
    "counts": (options.problems, str, lambda text: range(int(text)), 512),
    "texts": (options.texts, lambda tokens: "abc " * tokens, lambda text: range(len(text) // 4),
              512),
    "streaming": (options.streamed, lambda tokens: " red" * tokens, chat.response, 16)}
  for name, (problems, text, response, batch) in cases.items():
    if options.only in (None, name):
      curate(name, Source(problems, options.tokens, text), response, batch=batch)
  if options.only in (None, "packing"):
    packing(options.rows)


class Source:
  """Problems whose responses are shorter the easier they are, made when they are asked for."""

  def __init__(self, problems, tokens, text):
    """`text` is a function of a number of tokens."""
    self.problems, self.tokens, self.text = problems, tokens, text
    self.seen, self.written = [], 0

  def __len__(self):
    return self.problems

  def __getitem__(self, number):
    self.seen.append(memory())
    rng = np.random.default_rng(number)
    passes = int(rng.integers(9))
    # At most `tokens`, half of it at the least.
    lengths = self.tokens - rng.integers(0, 1 + self.tokens * (4 + passes) // 24, 8)
    texts = [self.text(int(length)) for length in lengths]
    self.written += int(lengths.sum())
    return {"id": f"p{number}", "source": f"s{number % 5}", "answer": ["1"],
            "pass_rate": passes / 8, "responses": texts}


def curate(name, source, response, *, batch):
  generator = types.SimpleNamespace(
    encoder=types.SimpleNamespace(chat=types.SimpleNamespace(response=response)),
    judge=lambda texts, truths: types.SimpleNamespace(correct=np.ones(len(texts))))
  problems = len(source)
  config = run_config.CurateConfig(selection="adacs", pass_rates="column", problems=problems,
                                   samples=8, count=min(34_000, problems), batch=batch)
  with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    chosen = adacs.curate(adacs.Probe(None, max_tokens=8), source, config,
                          StageContext(generator, folder, seed=0, threads=1))
    taken, end = time.perf_counter() - began, memory()
    size = os.path.getsize(os.path.join(folder, "curation.jsonl")) / 2**20
    with open(os.path.join(folder, "curation.json"), encoding="utf-8") as file:
      candidates = json.load(file)["candidates"]
    length = len(response(chosen[0]["response"]))
  tenths = [max(part) for part in np.array_split(source.seen[:problems], min(10, problems))]
  print(f"{name}: {problems} problems, {candidates} responses, {source.written / 1e9:.1f} G tokens "
        f"in {taken:.0f} s; {len(chosen)} chosen, the first of {length} tokens; process at most "
        f"{', '.join(f'{held:.0f}' for held in tenths)} MiB tenth by tenth, {end:.0f} at the "
        f"end; curation.jsonl {size:.0f} MiB", flush=True)


def packing(rows):
  """Responses of median 3000 tokens, 95th percentile 12000 and 16384 at most, prompts of 900."""
  rng = np.random.default_rng(0)
  response = np.clip(rng.lognormal(np.log(3000), 0.843, rows), 64, 16384).astype(int)
  prompt = np.clip(rng.lognormal(np.log(900), 0.6, rows), 64, 4096).astype(int)
  windows = np.clip(prompt // 16, 1, 384)
  lengths = prompt + response
  print(f"packing: {lengths.mean():.0f} tokens an example on average, {lengths.max()} at most")
  sizes = list(zip(lengths.tolist(), windows.tolist(), strict=True))
  for choices in ((32768,), (24576, 28672, 32768), tuple(range(24576, 32769, 512))):
    for multiple in (1, 8):
      total, shapes = 0, collections.Counter()
      for start in range(0, rows - 255, 256):
        batch = sizes[start : start + 256]
        count, row_tokens = min(
          ((-(-len(first_fit(batch, (size, 768))) // multiple) * multiple, size)
           for size in choices if size >= max(batch)[0]), key=lambda shape: shape[0] * shape[1])
        total += count * row_tokens
        shapes[count, row_tokens] += 1
      real = lengths[: rows - rows % 256].sum()
      print(f"packing, rows of {len(choices)} sizes, a multiple of {multiple} a step: "
            f"{real / total:.2%} of the tokens are real, {len(shapes)} shapes in "
            f"{sum(shapes.values())} steps", flush=True)


def memory():
  return psutil.Process().memory_info().rss / 2**20


if __name__ == "__main__":
  main()
