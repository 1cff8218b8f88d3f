"""Share of real tokens in the packed rows of configs/aepo_7b.py for skewed lengths; no model runs.

    python -m tests.bench.packing

Responses are lognormal: --medians are of the longest, the spread such that at 0.15 the 99th
percentile is the longest; half of the variance is the prompt's. Prompts have 700 tokens in the
middle. Prints a Markdown table: "as drawn" has prompts in their minibatches as they come,
"balanced" as balance_minibatches orders them; tokens of the smallest and the largest minibatch are
of the latter.
"""

import argparse
import time

import numpy as np

from ares_jax.run import config as run_config
from ares_jax.system import config as config_lib
from ares_jax.training import batch


def drawn(config, longest_prompt, median, seed):
  """int [P, G], tokens of prompts with their responses."""
  rng = np.random.default_rng(seed)
  prompts, most = config.prompts, config.sampling.max_tokens
  normal = np.sqrt(0.5) * (rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, config.group)))
  responses = np.clip(most * median * np.exp(0.815 * normal), 1, most).astype(int)
  return responses + np.clip(rng.lognormal(np.log(700), 0.6, (prompts, 1)), 30,
                             longest_prompt).astype(int)


def share(lengths_PG, sizes):
  """(pack/real, C) of prompts in this order."""
  minibatches = lengths_PG.size // sizes["minibatch"]
  of = [lengths_PG[number::minibatches].ravel() for number in range(minibatches)]
  padded = {size: batch._padded_tokens(batch._fill_rows(of, size), sizes["microbatch"], size)
            for size in sizes["row_tokens"]}
  size = min(padded, key=padded.get)
  return lengths_PG.sum() / padded[size], size


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--medians", default="0.05,0.1,0.15,0.25")
  parser.add_argument("--microbatches", default="8,16", help="packed rows, default %(default)s")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  config = config_lib.build(
    run_config.TrainConfig, config_lib.load("configs/aepo_7b.py"), "config")
  print("| median | tokens a sequence | rows a microbatch | as drawn | balanced | row tokens | "
        "microbatches | minibatches' tokens | s |\n" + "| --- " * 9 + "|")
  for median in map(float, options.medians.split(",")):
    lengths_PG = drawn(config.aepo, config.prompt.max_tokens[-1], median, options.seed)
    for microbatch in map(int, options.microbatches.split(",")):
      sizes = dict(minibatch=config.aepo.minibatch, microbatch=microbatch,
                   row_tokens=config.aepo.row_tokens)
      start = time.perf_counter()
      balanced_PG = lengths_PG[batch.balance_minibatches(lengths_PG, **sizes)]
      seconds = time.perf_counter() - start
      before, _ = share(lengths_PG, sizes)
      real, row_tokens = share(balanced_PG, sizes)
      count = round(lengths_PG.sum() / real / (microbatch * row_tokens))
      minibatches = lengths_PG.size // config.aepo.minibatch
      totals = [balanced_PG[number::minibatches].sum() for number in range(minibatches)]
      print(f"| {median} | {lengths_PG.mean():.0f} | {microbatch} | {before:.1%} | {real:.1%} | "
            f"{row_tokens} | {count} | {min(totals)} to {max(totals)} | {seconds:.1f} |",
            flush=True)


if __name__ == "__main__":
  main()
