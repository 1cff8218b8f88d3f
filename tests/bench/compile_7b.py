"""Compiles Qwen2.5-VL-7B forward and backward for TPU chips, without a TPU; prints bytes a chip.

    python -m tests.bench.compile_7b [--topology=v5e:8x8 --model=1 --rows=64
      --tokens=20480 --windows=384 --layers=28 --remat=block]

The program is the gradient of log-probability and entropy of every token in all parameters: float32
parameters and gradients split over the mesh (`weights.shardings`), activations in bfloat16. An
optimizer's moments are not in it: two more arrays of the parameters' size. Needs `libtpu`.
"""

import argparse
import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax.models import qwen25_vl, weights
from ares_jax.models.config import SIZE_7B
from ares_jax.ops import logprob_and_entropy
from ares_jax.system.mesh import AXES


def tpu_mesh(topology, model):
  """A (1, data, model) mesh of a described TPU slice, such as "v5e:8x8"."""
  # Compiling asks for no TPU; without this libtpu looks for one in the cloud's metadata.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside another process that compiles
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  return Mesh(np.array(devices).reshape(1, -1, model), AXES, axis_types=(AxisType.Auto,) * 3)


def inputs(config, mesh, rows, tokens, windows):
  """Abstract arguments of `loss` behind the parameters: a batch of packed rows with images."""

  def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

  slots = rows, windows, config.vision.window_patches
  return dict(
    tokens=array((rows, tokens), jnp.int32, "data"),
    unit=array((rows, tokens), jnp.int32, "data"),
    positions=array((3, rows, tokens), jnp.int32, None, "data"),
    segment=array((rows, tokens), jnp.int32, "data"),
    vision=qwen25_vl.VisionInput(
      patches=array((*slots, config.vision.patch_dim), jnp.uint8, "data"),
      hw=array((*slots, 2), jnp.int32, "data"),
      image=array(slots, jnp.int32, "data")))


def loss(config, params, batch):
  """Log-probability of every token after its predecessors, and entropy, summed."""
  features = qwen25_vl.vision_features(config, params, batch["vision"])
  embeds = qwen25_vl.embed(config, params, batch["tokens"], batch["unit"], features)
  states = qwen25_vl.hidden(config, params, embeds, batch["positions"], batch["segment"])
  following = jnp.roll(batch["tokens"], -1, axis=1).reshape(-1)
  both = logprob_and_entropy(
    states.reshape(-1, config.embed), qwen25_vl.unembedding(config, params), following,
    axes=("data", "model"))
  return both[0].sum() + both[1].sum()


def gradient(config, mesh, rows, tokens, windows):
  """The lowered gradient of `loss` in the parameters."""
  params = weights.abstract(weights.weight_table(config), mesh, jnp.float32)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    function = jax.jit(jax.grad(loss, argnums=1), static_argnums=0,
                       out_shardings=weights.shardings(weights.weight_table(config), mesh))
    return function.lower(config, params, inputs(config, mesh, rows, tokens, windows))


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5e:8x8")
  parser.add_argument("--model", type=int, default=1, help="chips on the model axis")
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--tokens", type=int, default=20480, help="tokens of a row")
  parser.add_argument("--windows", type=int, default=384, help="image windows of a row")
  parser.add_argument("--layers", type=int, default=SIZE_7B.layers)
  parser.add_argument("--remat", default="block")
  options = parser.parse_args()
  config = dataclasses.replace(SIZE_7B, layers=options.layers, remat=options.remat)
  mesh = tpu_mesh(options.topology, options.model)
  start = time.perf_counter()
  lowered = gradient(config, mesh, options.rows, options.tokens, options.windows)
  lowered_at = time.perf_counter()
  memory = lowered.compile().memory_analysis()
  seconds = lowered_at - start, time.perf_counter() - lowered_at
  gib = [size / 2**30 for size in (memory.argument_size_in_bytes, memory.output_size_in_bytes,
                                   memory.temp_size_in_bytes)]
  print("| topology | mesh | rows x tokens, windows | layers, remat | arguments | gradients "
        "| temporaries | lowering | compiling |\n" + "| --- " * 9 + "|")
  print(f"| {options.topology} | {' x '.join(map(str, mesh.devices.shape))} | {options.rows} x "
        f"{options.tokens}, {options.windows} | {config.layers}, {config.remat} | {gib[0]:.2f} GiB "
        f"| {gib[1]:.2f} GiB | {gib[2]:.2f} GiB | {seconds[0]:.0f} s | {seconds[1]:.0f} s |")


if __name__ == "__main__":
  main()
