"""Drawing one token a row against `jax.random.categorical` and a nucleus by sorting, in one run.

    python -m tests.bench.sampling
    python -m tests.bench.sampling --rows=256 --scale=1

Prints a Markdown table of the best wall time of `--repeats` rounds, in each of which every program
runs once, so that a busy machine is busy for all. `categorical` draws from the whole vocabulary and
returns the token alone; ours returns entropy and both log-probabilities with it.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from ares_jax.ops.sampling import next_token


def by_sorting(key, logits_BV):
  """Top-p 0.99 as samplers commonly have it: sort, cumulate, cut, `categorical`."""
  order_BV = jnp.argsort(-logits_BV, axis=-1)
  sorted_BV = jnp.take_along_axis(logits_BV, order_BV, 1)
  prob_BV = jax.nn.softmax(sorted_BV)
  kept_BV = jnp.cumsum(prob_BV, 1) - prob_BV < 0.99
  place_B = jax.random.categorical(key, jnp.where(kept_BV, sorted_BV, -jnp.inf))
  return jnp.take_along_axis(order_BV, place_B[:, None], 1)[:, 0]


def ours(key, logits_BV, **how):
  allowed_BV = jnp.ones((1, logits_BV.shape[1]), bool)
  return next_token(logits_BV, jax.random.uniform(key, logits_BV.shape[:1]), allowed_BV, **how)


PROGRAMS = {
  "categorical": jax.random.categorical,
  "ours, whole vocabulary": functools.partial(ours, temperature=1.0, top_p=1.0, top_k=0),
  "ours, top-p 0.99": functools.partial(ours, temperature=1.0, top_p=0.99, top_k=0),
  "ours, top-k 50": functools.partial(ours, temperature=1.0, top_p=1.0, top_k=50),
  "ours, temperature 0.7, top-p 0.99": functools.partial(ours, temperature=0.7, top_p=0.99,
                                                         top_k=0),
  "top-p 0.99 by sorting": by_sorting,
}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--vocab", type=int, default=151936)
  parser.add_argument("--scale", type=float, default=3.0, help="standard deviation of the logits")
  parser.add_argument("--repeats", type=int, default=7)
  options = parser.parse_args()
  key = jax.random.key(0)
  logits_BV = options.scale * jax.random.normal(key, (options.rows, options.vocab))
  compiled = {name: jax.jit(program).lower(key, logits_BV).compile()
              for name, program in PROGRAMS.items()}
  seconds = {name: [] for name in compiled}
  for round_ in range(options.repeats + 1):
    for name, program in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(program(key, logits_BV))
      if round_:  # The first round touches fresh memory.
        seconds[name].append(time.perf_counter() - start)
  best = {name: min(times) for name, times in seconds.items()}
  print(f"B={options.rows} V={options.vocab} float32 on {jax.devices()[0].device_kind}, jax "
        f"{jax.__version__}, best of {options.repeats} rounds\n")
  print("| | ms | of categorical |\n| --- | --- | --- |")
  for name, time_ in best.items():
    print(f"| {name} | {1000 * time_:.1f} | {time_ / best['categorical']:.2f} |")


if __name__ == "__main__":
  main()
