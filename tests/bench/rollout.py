"""Rollouts of skewed lengths: slots against batches padded to their longest answer, in one run.

    python -m tests.bench.rollout
    python -m tests.bench.rollout --prompts=32 --slots=32 --max-tokens=512

The model of configs/ares_tiny.py with fresh weights; a response ends where the bench says: lengths
are lognormal with their median at 0.15 of --max-tokens and their 99th percentile at it, cut there.
All ways are `sample` with the same slots, prompts and lengths: "slots" gets all prompts at once and
has prompt slots for a part of them, "all prompts held" for all, "padded" gets as many prompts
a call as fill the slots, and so waits for the longest of each. Prints a Markdown table of the
median of `--repeats` rounds, in each of which all run once: wall time, the process's CPU time,
which a busy machine changes less, and the share of the wall time that no program ran.
"""

import argparse
import pathlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ares_jax.run import config as run_config
from ares_jax.run import setup
from ares_jax.sampling import rollout, sampler, scheduler, slots
from ares_jax.system import config as config_lib
from ares_jax.system import mesh

TINY = pathlib.Path(__file__).parent.parent.parent / "configs" / "ares_tiny.py"
GROUP = 8


def skewed(rows, most, seed=0):
  """int32 lengths of `rows` responses: lognormal, median 0.15, 99th percentile 1 of `most`."""
  deviation = np.log(1 / 0.15) / 2.3263
  draws = 0.15 * np.exp(deviation * np.random.default_rng(seed).normal(size=rows))
  return np.int32(np.clip(np.ceil(draws * most), 1, most))


def ending_at(length_B, end):
  """`slots._draw` whose response to prompt p, sample g has length_B[p * G + g] tokens."""
  original = slots._draw

  def draw(state, prompts, *arguments):
    drawn = original(state, prompts, *arguments)
    prompt_S = prompts.prompt_id[slots._prompt_slot(state, prompts, GROUP)]
    row_S = prompt_S * GROUP + state.row % GROUP
    last_S = state.cache.length + 1 >= jnp.asarray(length_B)[row_S]
    return drawn._replace(token=jnp.where(last_S, end, drawn.token))

  return draw


def timed(function, spent):
  """`function`, whose seconds until its results are there are appended to `spent`."""

  def call(*arguments, **options):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments, **options))
    spent.append(time.perf_counter() - start)
    return result

  return call


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--slots", type=int, default=64)
  parser.add_argument("--max-tokens", type=int, default=256)
  parser.add_argument("--chunk", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  if options.slots % GROUP or options.prompts * GROUP % options.slots:
    raise ValueError(f"--slots={options.slots} must be a multiple of {GROUP} and divide the "
                     f"{options.prompts * GROUP} rows")
  config = run_config.read_config(config_lib.load(str(TINY)))
  with jax.set_mesh(mesh.make_mesh(-1, 1)), setup.open_run(config) as parts:
    (end,) = parts.generator.end
    params = parts.init_params()
    allowed = parts.generator.allowed.copy()
    allowed[end] = False
    engine = sampler.EngineConfig(slots=options.slots, read=options.slots // GROUP,
                                  chunk=options.chunk, cache_gib=8.0)
    generator = rollout.Generator(parts.model, parts.generator.encoder, allowed, (end,), engine,
                                  None, parts.generator.phases)
    rows = [parts.source("eval")[index] for index in range(options.prompts)]
    prompts = generator.encoder.batch(rows, np.arange(options.prompts))
    length_B = skewed(options.prompts * GROUP, options.max_tokens)
    sampling = sampler.SamplingConfig(1.0, 1.0, 0, 0, options.max_tokens)

    def run(name, part):
      factor = (options.prompts if name == "all prompts held"
                else scheduler.PROMPT_SLOT_FACTOR)
      with mock.patch.object(scheduler, "PROMPT_SLOT_FACTOR", factor):
        samples = generator.sample(params, part, jax.random.key(0), group=GROUP, sampling=sampling)
      return samples.mask.sum(1)

    at_once = options.slots // GROUP
    parts_of = {
      "padded": [prompts.take(list(range(start, start + at_once)))
                 for start in range(0, options.prompts, at_once)],
      "all prompts held": [prompts], "slots": [prompts]}
    rounds, spent = {name: [] for name in parts_of}, []
    with (mock.patch.object(slots, "_draw", ending_at(length_B, end)),
          mock.patch.object(slots, "read_prompts", timed(slots.read_prompts, spent)),
          mock.patch.object(slots, "decode", timed(slots.decode, spent))):
      for round_ in range(options.repeats + 1):
        for name, batches in parts_of.items():
          spent.clear()
          start = time.perf_counter(), time.process_time()
          got_B = np.concatenate([run(name, part) for part in batches])
          wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
          np.testing.assert_array_equal(got_B, length_B)
          if round_:  # The first round compiles.
            rounds[name].append((wall, cpu, 1 - sum(spent) / wall))
  median = {name: np.median(times, 0) for name, times in rounds.items()}
  print(f"{options.prompts} prompts x {GROUP}, {options.slots} slots, {options.max_tokens} tokens "
        f"at most, {length_B.mean():.1f} on average, on {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}, median of {options.repeats} rounds\n")
  print("| | wall s | tokens/s | CPU s | times padded's speed, wall | CPU | host alone |\n"
        "| --- | --- | --- | --- | --- | --- | --- |")
  for name, (wall, cpu, host) in median.items():
    ratio = median["padded"] / median[name]
    print(f"| {name} | {wall:.2f} | {length_B.sum() / wall:.0f} | {cpu:.2f} | {ratio[0]:.2f} | "
          f"{ratio[1]:.2f} | {host:.1%} |")


if __name__ == "__main__":
  main()
