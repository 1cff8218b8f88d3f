"""Share of real tokens in the packed rows of configs/aepo_7b.py for skewed lengths; no model runs.

    python -m tests.bench.packing

Responses are lognormal: --medians are of the longest, the spread such that at 0.15 the 99th
percentile is the longest; half of the variance is the prompt's. Prompts have 700 tokens in the
middle. Prints a Markdown table: "as drawn" has prompts in their minibatches as they come,
"balanced" as balance_minibatches orders them, with answers that share prompts or not; tokens of the
smallest and the largest minibatch are of the latter, with every prompt before every answer.
"""

import argparse
import itertools
import time

import numpy as np

from ares_jax.run import config as run_config
from ares_jax.system import config as config_lib
from ares_jax.training import minibatches


def drawn(config, longest_prompt, median, seed):
  """int [P] and int [P, G], tokens of prompts and of their responses."""
  rng = np.random.default_rng(seed)
  prompts, most = config.prompts, config.sampling.max_tokens
  normal = np.sqrt(0.5) * (rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, config.group)))
  responses = np.clip(most * median * np.exp(0.815 * normal), 1, most).astype(int)
  return np.clip(rng.lognormal(np.log(700), 0.6, (prompts, 1)), 30,
                 longest_prompt).astype(int).ravel(), responses


def share(prompts_P, responses_PG, sizes, shared):
  """(pack/real, pack/shared, C, microbatches) of prompts in this order."""
  lengths, group = (prompts_P[:, None] + responses_PG).ravel(), responses_PG.shape[1]
  families = minibatches.families_of(prompts_P, group, sizes["row_tokens"]) if shared else None
  number_B = np.arange(lengths.size) // group % (lengths.size // sizes["minibatch"])
  of = [np.flatnonzero(number_B == number) for number in range(number_B.max() + 1)]
  rows = {size: minibatches.fill_rows(of, lengths, size, families) for size in sizes["row_tokens"]}
  padded = {size: minibatches.padded_tokens(rows[size], sizes["microbatch"], size) for size in rows}
  size = min(padded, key=padded.get)
  saved = sum(families.shared_tokens(row) for part in rows[size] for row in part) if shared else 0
  return ((lengths.sum() - saved) / padded[size], saved / lengths.sum(), size,
          padded[size] // size // sizes["microbatch"])


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--medians", default="0.05,0.1,0.15,0.25")
  parser.add_argument("--microbatches", default="8,16", help="packed rows, default %(default)s")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  config = config_lib.build(
    run_config.TrainConfig, config_lib.load("configs/aepo_7b.py"), "config")
  print("| median | tokens a sequence | rows a microbatch | prompts | as drawn | balanced | tokens "
        "not computed | row tokens | microbatches | minibatches' tokens | s |\n"
        + "| --- " * 11 + "|")
  for median in map(float, options.medians.split(",")):
    prompts_P, responses_PG = drawn(config.aepo, config.prompt.max_tokens[-1], median, options.seed)
    lengths_P = (prompts_P[:, None] + responses_PG).sum(1)
    for microbatch, shared in itertools.product(map(int, options.microbatches.split(",")),
                                                (False, True)):
      sizes = dict(minibatch=config.aepo.minibatch, microbatch=microbatch,
                   row_tokens=config.aepo.row_tokens)
      start = time.perf_counter()
      order = minibatches.balance_minibatches(prompts_P, responses_PG, **sizes,
                                              share_prompts=shared)
      seconds = time.perf_counter() - start
      before = share(prompts_P, responses_PG, sizes, shared)[0]
      real, saved, row_tokens, count = share(prompts_P[order], responses_PG[order], sizes, shared)
      parts = responses_PG.size // config.aepo.minibatch
      totals = [lengths_P[order][number::parts].sum() for number in range(parts)]
      print(f"| {median} | {lengths_P.sum() / responses_PG.size:.0f} | {microbatch} | "
            f"{'shared' if shared else 'repeated'} | {before:.1%} | {real:.1%} | {saved:.1%} | "
            f"{row_tokens} | {count} | {min(totals)} to {max(totals)} | {seconds:.1f} |",
            flush=True)


if __name__ == "__main__":
  main()
