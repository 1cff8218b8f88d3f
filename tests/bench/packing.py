"""Share of real tokens in the packed rows of configs/aepo_7b.py for skewed lengths; no model runs.

    python -m tests.bench.packing
    python -m tests.bench.packing --medians=0.15 --microbatches=16 --topology=v5e:8x8 --model=4

Responses are lognormal: --medians are of the longest, the spread such that at 0.15 the 99th
percentile is the longest; half of the variance is the prompt's. Prompts have 700 tokens in the
middle. Prints a Markdown table: "as drawn" has prompts in their minibatches as they come,
"balanced" as balance_minibatches orders them, with answers that share prompts or not; tokens of the
smallest and the largest minibatch are of the latter, with every prompt before every answer. With
--topology the last column is what aepo_step computes of these rows on such chips, as ares_jax.plan
counts it, with the largest images.
"""

import argparse
import dataclasses
import functools
import itertools
import time

import jax
import numpy as np

from ares_jax.plan import programs
from ares_jax.plan.jaxpr_cost import traced_flops
from ares_jax.run import config as run_config
from ares_jax.run.model import model_config
from ares_jax.system import chips, mesh
from ares_jax.system import config as config_lib
from ares_jax.training import aepo_step, minibatches
from ares_jax.training.batch import PackedRows, RolloutBatch


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


@functools.cache
def computed(config, model, topology, row_tokens):
  """(a, b): a minibatch of n microbatches of rows of C tokens takes a + b n FLOPs of aepo_step."""
  settings = dataclasses.replace(config.aepo, row_tokens=(row_tokens,))
  parts = settings.prompts * settings.group // settings.minibatch
  with jax.set_mesh(mesh.make_mesh(-1, config.mesh.model, chips.describe_slice(topology)[1])):
    policy = programs.abstract_policy(config.model.lora, model)
    state = aepo_step.abstract_state(settings, policy.params, policy.base)
    batch = RolloutBatch.abstract(model, settings, config.prompt.max_tokens[-1],
                                  config.prompt.windows[-1])
    words, found = mesh.abstract(bool, (model.vocab,)), []
    for microbatches in (1, 2):
      rows = PackedRows.abstract(parts, microbatches, settings.microbatch, row_tokens,
                                 share_prompts=settings.share_prompts)
      traced = aepo_step.aepo_step.trace(model, settings, state, policy.params,
                                         batch.replace(rows=rows), words, policy.base)
      found.append(traced_flops(traced.jaxpr, platform="tpu") / parts)
  return 2 * found[0] - found[1], found[1] - found[0]


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--medians", default="0.05,0.1,0.15,0.25")
  parser.add_argument("--microbatches", default="8,16", help="packed rows, default %(default)s")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--topology", default="", help="chips, such as v5e:8x8; default none")
  parser.add_argument("--model", type=int, default=1, help="chips on the model axis")
  options = parser.parse_args()
  config = config_lib.build(
    run_config.TrainConfig, config_lib.load("configs/aepo_7b.py"), "config")
  print("| median | tokens a sequence | rows a microbatch | prompts | as drawn | balanced | tokens "
        "not computed | row tokens | microbatches | minibatches' tokens | s | "
        "computed PFLOP |\n" + "| --- " * 12 + "|")
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
      pflop = "-"
      if options.topology:
        changed = dataclasses.replace(
          config, mesh=dataclasses.replace(config.mesh, model=options.model),
          aepo=dataclasses.replace(config.aepo, microbatch=microbatch, share_prompts=shared))
        once, each = computed(changed, model_config(config.model), options.topology, row_tokens)
        pflop = f"{(parts * once + count * each) / 1e15:.0f}"
      totals = [lengths_P[order][number::parts].sum() for number in range(parts)]
      print(f"| {median} | {lengths_P.sum() / responses_PG.size:.0f} | {microbatch} | "
            f"{'shared' if shared else 'repeated'} | {before:.1%} | {real:.1%} | {saved:.1%} | "
            f"{row_tokens} | {count} | {min(totals)} to {max(totals)} | {seconds:.1f} | "
            f"{pflop} |",
            flush=True)


if __name__ == "__main__":
  main()
