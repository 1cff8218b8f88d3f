"""Memory a chip of the 7B model's rollout programs, compiled for a TPU that is not there.

    JAX_PLATFORMS=cpu python -m tests.bench.rollout_memory
    JAX_PLATFORMS=cpu python -m tests.bench.rollout_memory --topology=v5p:2x2x4 --data=4

Needs libtpu. Compiles `slots.decode` with all slots that the cache budget of configs/aepo_7b.py
holds, reading its full response length and the shortest, then `slots.read`, and prints a table.
"""

import argparse
import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ares_jax.models import weights
from ares_jax.models.config import SIZE_7B
from ares_jax.models.vision import VisionInput
from ares_jax.run import config as run_config
from ares_jax.run import setup
from ares_jax.sampling import sampler, scheduler, slots
from ares_jax.system import config as config_lib
from ares_jax.system import mesh

CONFIG = pathlib.Path(__file__).parent.parent.parent / "configs" / "aepo_7b.py"
MODEL = dataclasses.replace(SIZE_7B, remat="none")


def split(tree, *spec):
  """The shapes of `tree`, laid out on the current mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.sharding(*spec)), tree)


def rollout_weights():
  """Shapes of what `sampler.rollout_weights` returns."""
  params = jax.eval_shape(
    lambda key: weights.init(weights.weight_table(MODEL), key, jnp.bfloat16), jax.random.key(0))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    params, sampler.rollout_shardings(MODEL, params))


def report(name, lowered):
  start = time.perf_counter()
  memory = lowered.compile().memory_analysis()
  sizes = [memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes,
           memory.temp_size_in_bytes]
  cells = [f"{size / 2**30:.2f}" for size in [*sizes, sum(sizes)]]
  print(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - start:.0f} |", flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5e:8x8")
  parser.add_argument("--data", type=int, default=16)
  parser.add_argument("--model", type=int, default=4)
  parser.add_argument("--prompts", type=int, default=512, help="of all chips")
  parser.add_argument("--windows", type=int, default=64, help="vision windows a prompt")
  options = parser.parse_args()
  config = setup.build(run_config.TrainConfig, config_lib.load(str(CONFIG)), "config")
  group, sampling = config.aepo.group, config.aepo.sampling
  prompt_tokens = config.prompt.max_tokens[-1]
  devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
  with jax.set_mesh(mesh.make_mesh(options.data, options.model, devices)):
    params = rollout_weights()
    key = split(jax.eval_shape(lambda: jax.random.key(0)))
    allowed = split(jax.ShapeDtypeStruct((MODEL.vocab,), bool))
    sizes = scheduler.plan_cache(MODEL, config.engine, prompts=options.prompts, group=group,
                               prompt_tokens=prompt_tokens, tokens=sampling.max_tokens)
    count, prompt_slots, reads = (options.data * size for size in dataclasses.astuple(sizes))

    def prompts(rows):
      positions = jax.ShapeDtypeStruct((3, rows, prompt_tokens), jnp.int32)
      ints = jax.ShapeDtypeStruct((rows, prompt_tokens), jnp.int32)
      one = jax.ShapeDtypeStruct((rows,), jnp.int32)
      side = MODEL.vision.window // MODEL.vision.patch
      cells = rows, options.windows, side * side
      vision = VisionInput(
        patches=jax.ShapeDtypeStruct((*cells, MODEL.vision.patch_dim), jnp.uint8),
        hw=jax.ShapeDtypeStruct((*cells, 2), jnp.int32),
        image=jax.ShapeDtypeStruct(cells, jnp.int32))
      return split(dict(tokens=ints, length=one, unit=ints, prompt_id=one, vision=vision),
                   "data") | {"positions": split(positions, None, "data")}

    def laid_out(shapes):
      cache = shapes.cache.replace(
        length=split(shapes.cache.length, "data"),
        **{name: split(getattr(shapes.cache, name), None, "data", None, slots.kv_axis(MODEL))
           for name in ("k", "v")})
      fields = {field.name: split(getattr(shapes, field.name), "data")
                for field in dataclasses.fields(shapes) if field.name != "cache"}
      return type(shapes)(cache=cache, **fields)

    read = laid_out(jax.eval_shape(functools.partial(
      slots.empty_prompt_slots, MODEL, prompts=options.prompts, prompt_slots=prompt_slots,
      tokens=prompt_tokens)))
    state = laid_out(jax.eval_shape(functools.partial(slots.idle_slots, MODEL,
                                                      rows=options.prompts * group, slots=count,
                                                      tokens=sampling.max_tokens, group=group,
                                                      branches=0)))
    print(f"{options.topology}, data {options.data} x model {options.model}: {options.prompts} "
          f"prompts in {prompt_slots} slots x {prompt_tokens} tokens, {count} slots x "
          f"{sampling.max_tokens}, jax {jax.__version__}; GiB a chip\n")
    print("| | arguments | results | temporaries | together | compiled in s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for live in (sampling.max_tokens, sampler.MIN_LIVE_TOKENS):
      report(f"decode, {live} tokens live", slots.decode.lower(
        MODEL, params, read, state, key, allowed, None, group=group, sampling=sampling,
        end=(151645,), steps=config.engine.chunk, live=live))
    number = split(jax.ShapeDtypeStruct((reads,), jnp.int32), "data")
    report(f"read {reads} prompts, {options.windows} windows", slots.read_prompts.lower(
      MODEL, params, read, prompts(reads), number, number))


if __name__ == "__main__":
  main()
