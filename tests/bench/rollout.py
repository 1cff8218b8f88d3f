"""Rollouts at the same cache bytes: pages against slots of the longest answer, in one run.

    python -m tests.bench.rollout
    python -m tests.bench.rollout --prompts=32 --held=16 --max-tokens=512
    python -m tests.bench.rollout --prompts=16 --held=4 --max-tokens=128 --embed=1536

The model of configs/ares_tiny.py with fresh weights, or one as deep whose residual stream has
--embed features and whose MLPs have 4 times as many: reading its weights, not computing a row,
takes most of a step, as at 7B on a chip. A response ends where the bench says. Lengths
are skewed, lognormal with their median at 0.15 of --max-tokens and their 99th percentile at it, cut
there, or all of them are --max-tokens. Both ways are `sample` with the same prompts, lengths and
`engine.cache_gib`, which holds --held answers of --max-tokens and their prompts. "reserved" decodes
--held rows at once, as a cache with a slot of --max-tokens for each would; "pages" decodes as many
as the sampler starts, after the first round as it knows the lengths of earlier ones. Prints a
Markdown table of the median of `--repeats` rounds, in each of which all run once: wall time, the
process's CPU time, which a busy machine changes less, and the share of tokens drawn twice.
"""

import argparse
import dataclasses
import pathlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.run import config as run_config
from ares_jax.run import setup
from ares_jax.sampling import sampler, scheduler, slots
from ares_jax.system import config as config_lib
from ares_jax.system import mesh

TINY = pathlib.Path(__file__).parent.parent.parent / "configs" / "ares_tiny.py"
GROUP = 8


def skewed(rows, most, seed=0):
  """int32 lengths of `rows` responses: lognormal, median 0.15, 99th percentile 1 of `most`."""
  deviation = np.log(1 / 0.15) / 2.3263
  draws = 0.15 * np.exp(deviation * np.random.default_rng(seed).normal(size=rows))
  return np.int32(np.clip(np.ceil(draws * most), 1, most))


def widen(sizes, embed):
  """Gives `model.sizes` another width; heads keep their size."""
  if embed % sizes.head_dim:
    raise SystemExit(f"--embed={embed} is not a multiple of the head size, {sizes.head_dim}")
  sizes.update(embed=embed, heads=embed // sizes.head_dim, mlp=4 * embed)
  sizes.vision.out = embed


def ending_at(length_B, end):
  """`slots._draw` whose response to prompt p, sample g has length_B[p * G + g] tokens."""
  original = slots._draw

  def draw(state, prompts, *arguments):
    drawn = original(state, prompts, *arguments)
    prompt_S = prompts.prompt_id[slots._prompt(state.row, len(state.tokens), GROUP)]
    row_S = prompt_S * GROUP + state.row % GROUP
    last_S = state.done + 1 >= jnp.asarray(length_B)[row_S]
    return drawn._replace(token=jnp.where(last_S, end, drawn.token))

  return draw


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--held", type=int, default=16)
  parser.add_argument("--max-tokens", type=int, default=256)
  parser.add_argument("--embed", type=int, help="a multiple of the head size, 32")
  parser.add_argument("--chunk", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  most, rows = options.max_tokens, options.prompts * GROUP
  flags = config_lib.load(str(TINY))
  if options.embed:
    widen(flags.model.sizes, options.embed)
  config = run_config.read_config(flags)
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(config) as parts:
    (end,) = parts.generator.end
    params = parts.init_params()
    allowed = parts.generator.allowed.copy()
    allowed[end] = False
    lengths = {"skewed": skewed(rows, most), "equal": np.full(rows, most, np.int32)}
    encoder, model = parts.generator.encoder, parts.model
    problems = [parts.source("eval")[index] for index in range(options.prompts)]
    # A prompt's number tells the length of its answers.
    number_P = np.arange(options.prompts)
    prompts = {kind: encoder.batch(problems, which * options.prompts + number_P)
               for which, kind in enumerate(lengths)}
    width = prompts["equal"].tokens.shape[1]
    # Prompts for three times the answers in slots, and those of a read, are held too.
    read = -(-options.held // GROUP)
    tokens = options.held * most + 5 * read * width
    gib = tokens * 2 * model.layers * model.kv_heads * model.head_dim * 4 / 2**30
    sampling = sampler.SamplingConfig(1.0, 1.0, 0, 0, most)
    def generator(held):
      return dataclasses.replace(
        parts.generator, allowed=allowed, history=scheduler.History(),
        engine=sampler.EngineConfig(slots=held, read=read, chunk=options.chunk, cache_gib=gib))

    ways = {(kind, name): generator(options.held if name == "reserved" else 0)
            for kind in lengths for name in ("reserved", "pages")}
    rounds = {way: [] for way in ways}
    all_lengths = np.concatenate(list(lengths.values()))
    with mock.patch.object(slots, "_draw", ending_at(all_lengths, end)):
      for round_ in range(options.repeats + 2):
        for (kind, name), way in ways.items():
          start = time.perf_counter(), time.process_time()
          samples = way.sample(params, prompts[kind], jax.random.key(0), group=GROUP,
                               sampling=sampling)
          wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
          np.testing.assert_array_equal(samples.mask.sum(1), lengths[kind])
          if round_ > 1:  # The first two compile: the second knows the lengths.
            rounds[kind, name].append((wall, cpu, way.history.redrawn))
  median = {way: np.median(times, 0) for way, times in rounds.items()}
  print(f"{options.prompts} prompts x {GROUP}, {tokens} tokens of cache, on "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, median of {options.repeats} "
        "rounds\n")
  print("| lengths | | wall s | tokens/s | CPU s | times reserved's speed, wall | CPU | "
        "drawn twice |\n" + "| --- " * 8 + "|")
  for (kind, name), (wall, cpu, redrawn) in median.items():
    ratio = median[kind, "reserved"][:2] / median[kind, name][:2]
    print(f"| {kind}, {lengths[kind].mean():.1f} on average | {name} | {wall:.2f} | "
          f"{lengths[kind].sum() / wall:.0f} | {cpu:.2f} | {ratio[0]:.2f} | {ratio[1]:.2f} | "
          f"{redrawn:.1%} |")


if __name__ == "__main__":
  main()
