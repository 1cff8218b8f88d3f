"""`logprob_and_entropy` against its neighbours and the bare matmuls, in one run.

    python tests/bench/logprob_entropy.py
    python tests/bench/logprob_entropy.py --tokens=8192 --embed=3584 --vocab=152064 --dtype=bfloat16
    python tests/bench/logprob_entropy.py --compile-only

Prints a Markdown table: temp memory that XLA plans (`compiled.memory_analysis()`) and the best wall
time of `--repeats` rounds, in each of which every program runs once, so that a busy machine is busy
for all. "gradients" are those of both inputs through both outputs. The bare matmuls are one for the
forward pass and four with gradients (the logits are computed twice), over the same chunks of the
vocabulary and nothing else. --compile-only prints temp memory over sizes of the vocabulary and of
the tokens.

google-tunix 0.1.7 is not in the requirements, as its safetensors < 0.8 excludes ours. Its row says
"not installed" without it; to measure it, in a virtual environment of its own:
    pip install -r requirements.txt
    pip install --no-deps google-tunix==0.1.7 google-metrax==0.2.4 jaxtyping wadler_lindig
    pip install --no-deps sentencepiece perfetto pandas python-dateutil
"""

import argparse
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The command works where the package is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from ares_jax import logprob_and_entropy


def full_logits(hidden_ND, unembed_VD, token_N):
  """What a loss written without care does; autodiff keeps several [N, V]."""
  logits_NV = jnp.einsum("nd,vd->nv", hidden_ND, unembed_VD, preferred_element_type=jnp.float32)
  logprob_NV = jax.nn.log_softmax(logits_NV)
  entropy_N = -(jnp.exp(logprob_NV) * logprob_NV).sum(-1)
  return jnp.take_along_axis(logprob_NV, token_N[:, None], -1)[:, 0], entropy_N


def tunix():
  """google-tunix as its learners call it, on a model that is this head; raises without it."""
  from flax import nnx
  from tunix.rl import algo_core, common

  class Head(nnx.Module):
    def __init__(self, hidden_BTD, unembed_VD):
      self.hidden_BTD, self.unembed_VD = nnx.Param(hidden_BTD), nnx.Param(unembed_VD)

    def __call__(self, tokens_BT, positions, cache, attention_mask):
      return self.hidden_BTD[...] @ self.unembed_VD[...].T, None

  def outputs(hidden_ND, unembed_VD, token_N):
    # Its logits are those of one row, the last position's without use.
    hidden_BTD = jnp.pad(hidden_ND, ((0, 1), (0, 0)))[None]
    graph, state = nnx.split(Head(hidden_BTD, unembed_VD))
    logprob_BT, logits_BTV = common.compute_per_token_logps(
      graph, state, token_N[None, :1], token_N[None], pad_id=-1, eos_id=-1,
      stop_gradient=False, return_logits=True,
    )
    return logprob_BT[0], algo_core.compute_entropy_from_logits(logits_BTV)[0]

  return outputs


def matmul(hidden_ND, unembed_VD, token_N, *, chunk=4096):
  """The products of the forward pass and nothing else: the least that has to be computed."""
  del token_N

  def step(sum_N, rows_VD, start):
    # The barrier keeps XLA from computing only the column that is read.
    return sum_N + lax.optimization_barrier(dot("nd,vd->nv", hidden_ND, rows_VD))[:, 0]

  return fold(step, jnp.zeros(len(hidden_ND)), unembed_VD, chunk)


def matmuls(hidden_ND, unembed_VD, token_N, *, chunk=4096):
  """The products of the forward and the backward pass with recomputation."""
  first_N = matmul(hidden_ND, unembed_VD, token_N, chunk=chunk)

  def step(sums, rows_VD, start):
    hidden_sum_ND, unembed_sum_VD = sums
    logits_NV = dot("nd,vd->nv", hidden_ND, rows_VD).astype(hidden_ND.dtype)
    part_VD = dot("nv,nd->vd", logits_NV, hidden_ND).astype(unembed_VD.dtype)
    return (
      hidden_sum_ND + dot("nv,vd->nd", logits_NV, rows_VD),
      lax.dynamic_update_slice_in_dim(unembed_sum_VD, part_VD, start, 0),
    )

  zeros = jnp.zeros(hidden_ND.shape, jnp.float32), jnp.zeros_like(unembed_VD)
  return first_N, fold(step, zeros, unembed_VD, chunk)


def dot(subscripts, left, right):
  return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def fold(step, value, unembed_VD, chunk):
  """value = step(value, rows, start) over chunks of rows, the last shorter one by itself."""
  chunk = min(chunk, len(unembed_VD))
  full = len(unembed_VD) // chunk

  def one(index, value):
    start = index * chunk
    return step(value, lax.dynamic_slice_in_dim(unembed_VD, start, chunk, 0), start)

  value = lax.fori_loop(0, full, one, value)
  rest_VD = unembed_VD[full * chunk :]
  return step(value, rest_VD, full * chunk) if len(rest_VD) else value


def gradients(function):
  """Gradients of both inputs through both outputs, which get different weights."""

  def loss(hidden_ND, unembed_VD, token_N):
    logprob_N, entropy_N = function(hidden_ND, unembed_VD, token_N)
    return logprob_N.sum() - 0.5 * entropy_N.sum()

  return jax.grad(loss, (0, 1))


def programs():
  """{name: (forward, with gradients)}, and {name: why it cannot run}."""
  functions, missing = {"ours": logprob_and_entropy, "full logits + autodiff": full_logits}, {}
  try:
    functions["google-tunix"] = tunix()
  except ModuleNotFoundError as error:
    missing["google-tunix"] = "not installed" if error.name == "tunix" else str(error)
  both = {name: (function, gradients(function)) for name, function in functions.items()}
  return both | {"bare matmuls": (matmul, matmuls)}, missing


def shapes(tokens, embed, vocab, dtype):
  array = jax.ShapeDtypeStruct
  return array((tokens, embed), dtype), array((vocab, embed), dtype), array((tokens,), jnp.int32)


def compiled(function, *arguments):
  return jax.jit(function).lower(*arguments).compile()


def temp(program):
  return program.memory_analysis().temp_size_in_bytes / 2**20


def compare(options):
  functions, missing = programs()
  arguments = shapes(options.tokens, options.embed, options.vocab, options.dtype)
  compiled_of = {
    (name, direction): compiled(function, *arguments)
    for name, both in functions.items()
    for direction, function in zip(("forward", "gradients"), both, strict=True)
  }
  rng = np.random.default_rng(0)
  hidden_ND, unembed_VD = (
    jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype) for x in arguments[:2]
  )
  inputs = hidden_ND, unembed_VD / options.embed**0.5, jnp.asarray(
    rng.integers(0, options.vocab, options.tokens), jnp.int32
  )
  seconds = {key: [] for key in compiled_of}
  for round_ in range(options.repeats + 1):
    for key, program in compiled_of.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*inputs))
      if round_:  # The first round touches fresh memory.
        seconds[key].append(time.perf_counter() - start)
  best = {key: min(times) for key, times in seconds.items()}
  device = jax.devices()[0]
  print(f"N={options.tokens} D={options.embed} V={options.vocab} {options.dtype} on "
        f"{device.device_kind}, jax {jax.__version__}, best of {options.repeats} rounds\n")
  print("| | temp, forward | temp, gradients | forward | gradients | of the matmuls, forward "
        "| of the matmuls, gradients |\n| --- | --- | --- | --- | --- | --- | --- |")
  for name in functions:
    cells = [f"{temp(compiled_of[name, x]):.0f} MiB" for x in ("forward", "gradients")]
    cells += [f"{1000 * best[name, x]:.1f} ms" for x in ("forward", "gradients")]
    cells += [f"{best[name, x] / best['bare matmuls', x]:.2f}" for x in ("forward", "gradients")]
    print(f"| {name} | {' | '.join(cells)} |")
  for name, reason in missing.items():
    print(f"| {name} | {reason}{' |' * 6}")
  if "google-tunix" in functions:
    shares = [best["ours", x] / best["google-tunix", x] for x in ("forward", "gradients")]
    print(f"\nours of google-tunix: {shares[0]:.2f} and {shares[1]:.2f}")
  flops = 2 * options.tokens * options.embed * options.vocab
  rates = [count * flops / best["bare matmuls", x] / 1e9
           for count, x in ((1, "forward"), (4, "gradients"))]
  print(f"\nbare matmuls: {rates[0]:.0f} and {rates[1]:.0f} GFLOP/s")


def sweep(options):
  print(f"D={options.embed} {options.dtype} on {jax.devices()[0].device_kind}: temp memory, MiB\n")
  print("| V | N | forward | gradients | one [N, V] float32 |\n| --- | --- | --- | --- | --- |")
  cases = [(vocab, options.tokens) for vocab in (16384, 65536, 151936, 262144)]
  cases += [(options.vocab, tokens) for tokens in (4096, 16384, 65536, 131072)]
  ours = logprob_and_entropy, gradients(logprob_and_entropy)
  for vocab, tokens in cases:
    arguments = shapes(tokens, options.embed, vocab, options.dtype)
    cells = [temp(compiled(function, *arguments)) for function in ours]
    print(f"| {vocab} | {tokens} | {cells[0]:.0f} | {cells[1]:.0f} "
          f"| {tokens * vocab * 4 / 2**20:.0f} |", flush=True)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100),
  )
  parser.add_argument("--tokens", type=int, default=1024, help="N, default %(default)s")
  parser.add_argument("--embed", type=int, default=256, help="D, default %(default)s")
  parser.add_argument("--vocab", type=int, default=151936, help="V, default %(default)s")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--repeats", type=int, default=5, help="rounds, default %(default)s")
  parser.add_argument("--compile-only", action="store_true", help="temp memory over V and N")
  options = parser.parse_args()
  if min(options.tokens, options.embed, options.vocab, options.repeats) < 1:
    parser.error("tokens, embed, vocab and repeats must be >= 1")
  options.dtype = jnp.dtype(options.dtype)
  (sweep if options.compile_only else compare)(options)


if __name__ == "__main__":
  main()
