"""The weight table: shape, sharding and initialisation of every tensor.

Parameters are a nested dict of arrays with the keys of `weight_table`. Weights of all blocks are
stacked on a leading axis for `lax.scan`. Mesh axes: "data" (fully sharded weights), "model" (tensor
parallel); every slice has a copy. "heads" in a spec means "model" if that axis divides the heads.
If not, attention splits a row's tokens over "model" (attention.py), and the dimension that "data"
splits is split over both axes.
L layers, V vocabulary, D embed, N query heads, K kv heads, H head size, F mlp.
"""

import dataclasses
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ares_jax.models.config import ModelConfig, VisionConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
  """One tensor of the model."""

  shape: tuple[int, ...]  # with the leading layer axis if it is stacked
  spec: P  # mesh axis of each dimension, or "heads"; `on` resolves that
  init: float | Literal["ones", "zeros"]  # a number is the deviation of a normal distribution

  def on(self, mesh) -> P:
    """The mesh axes of each dimension on a mesh."""
    if "heads" not in tuple(self.spec):
      return self.spec
    split = self.shape[tuple(self.spec).index("heads")] % mesh.shape["model"] == 0
    of = {"heads": "model"} if split else {"heads": None, "data": ("data", "model")}
    return P(*(of.get(axis, axis) for axis in self.spec))


def weight_table(config: ModelConfig) -> dict[str, Any]:
  """Nested dict of `Weight`, the same keys as the parameters."""
  vocab, embed = config.vocab, config.embed
  weights = {
    "embed": Weight((vocab, embed), P("model", "data"), embed**-0.5),
    "blocks": _decoder_blocks(config),
    "final_norm": Weight((embed,), P(None), "ones"),
  }
  if config.vision:
    weights["vision"] = _vision(config.vision)
  if not config.tied:
    weights["unembed"] = Weight((vocab, embed), P("model", "data"), embed**-0.5)
  return weights


def _decoder_blocks(config: ModelConfig) -> dict[str, Weight]:
  layers, embed, mlp = config.layers, config.embed, config.mlp
  heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
  # Each block adds two terms to the residual stream; this keeps its variance near 1 at any depth.
  depth = (2 * layers) ** -0.5
  # K and V are not split over "model": 2 or 4 kv heads do not divide a wide axis, and together they
  # are 2-8% of a block's weights.
  weights = {
    "attention_norm": Weight((layers, embed), P(None, None), "ones"),
    "q": Weight((layers, embed, heads, head_dim), P(None, "data", "heads", None), embed**-0.5),
    "k": Weight((layers, embed, kv_heads, head_dim), P(None, "data", None, None), embed**-0.5),
    "v": Weight((layers, embed, kv_heads, head_dim), P(None, "data", None, None), embed**-0.5),
    "o": Weight((layers, heads, head_dim, embed), P(None, "heads", None, "data"),
                depth * (heads * head_dim) ** -0.5),
    "mlp_norm": Weight((layers, embed), P(None, None), "ones"),
    "gate": Weight((layers, embed, mlp), P(None, "data", "model"), embed**-0.5),
    "up": Weight((layers, embed, mlp), P(None, "data", "model"), embed**-0.5),
    "down": Weight((layers, mlp, embed), P(None, "model", "data"), depth * mlp**-0.5),
  }
  if config.qkv_bias:
    weights["q_bias"] = Weight((layers, heads, head_dim), P(None, "heads", None), "zeros")
    for name in ("k_bias", "v_bias"):
      weights[name] = Weight((layers, kv_heads, head_dim), P(None, None, None), "zeros")
  if config.qk_norm:
    for name in ("q_norm", "k_norm"):
      weights[name] = Weight((layers, head_dim), P(None, None), "ones")
  return weights


def _vision(config: VisionConfig) -> dict[str, Any]:
  layers, hidden, mlp = config.depth, config.hidden, config.mlp
  heads, head_dim, tower = config.heads, config.head_dim, config.tower
  depth = (2 * layers) ** -0.5
  # The MLP is not split over "model": its published widths, 3420 and 4304, divide by 16 at most.
  weights = {
    "patch": Weight((config.patch_dim, hidden), P(None, "data"), config.patch_dim**-0.5),
    "blocks": {
      "attention_norm": Weight((layers, hidden), P(None, None), "ones"),
      "qkv": Weight((layers, hidden, 3, heads, head_dim), P(None, "data", None, "heads", None),
                    hidden**-0.5),
      "qkv_bias": Weight((layers, 3, heads, head_dim), P(None, None, "heads", None), "zeros"),
      "o": Weight((layers, heads, head_dim, hidden), P(None, "heads", None, "data"),
                  depth * hidden**-0.5),
      "o_bias": Weight((layers, hidden), P(None, None), "zeros"),
      "mlp_norm": Weight((layers, hidden), P(None, None), "ones"),
      "up": Weight((layers, hidden, mlp), P(None, "data", None), hidden**-0.5),
      "up_bias": Weight((layers, mlp), P(None, None), "zeros"),
      "down": Weight((layers, mlp, hidden), P(None, None, "data"), depth * mlp**-0.5),
      "down_bias": Weight((layers, hidden), P(None, None), "zeros"),
    },
    "merger": _merger(config, hidden),
  }
  blocks = weights["blocks"]
  if tower.activation == "silu":
    blocks["gate"], blocks["gate_bias"] = blocks["up"], blocks["up_bias"]
  if tower.layer_norm:
    for name in ("attention_norm_bias", "mlp_norm_bias"):
      blocks[name] = Weight((layers, hidden), P(None, None), "zeros")
  if tower.patch_bias:
    weights["patch_bias"] = Weight((hidden,), P(None), "zeros")
  if config.positions:
    weights["positions"] = Weight((config.positions**2, hidden), P(None, "data"), hidden**-0.5)
  if config.deepstack:  # their norms stand behind the reshape, so they are as wide as a unit
    number = len(config.deepstack)
    weights["deepstack"] = {
      name: Weight((number, *one.shape), P(None, *one.spec), one.init)
      for name, one in _merger(config, config.unit * hidden).items()}
  return weights


def _merger(config: VisionConfig, norm: int) -> dict[str, Weight]:
  merged = config.unit * config.hidden
  weights = {
    "norm": Weight((norm,), P(None), "ones"),
    "up": Weight((merged, merged), P("data", "model"), merged**-0.5),
    "up_bias": Weight((merged,), P("model"), "zeros"),
    "down": Weight((merged, config.out), P("model", "data"), merged**-0.5),
    "down_bias": Weight((config.out,), P(None), "zeros"),
  }
  if config.tower.layer_norm:
    weights["norm_bias"] = Weight((norm,), P(None), "zeros")
  return weights


def init(weights: dict[str, Any], key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
  """Random parameters of a table; the values of a tensor depend only on the key and its name.

  Under `jax.jit(..., out_shardings=shardings(weights, mesh))` no device holds a complete tensor.
  """
  def tensor(path, weight: Weight) -> jax.Array:
    if weight.init == "ones":
      return jnp.ones(weight.shape, dtype)
    if weight.init == "zeros":
      return jnp.zeros(weight.shape, dtype)
    name = zlib.crc32(jax.tree_util.keystr(path).encode())
    return weight.init * jax.random.normal(jax.random.fold_in(key, name), weight.shape, dtype)

  return jax.tree_util.tree_map_with_path(tensor, weights)


def abstract(weights: dict[str, Any], mesh: Mesh, dtype: jnp.dtype) -> Params:
  """`jax.ShapeDtypeStruct` of every tensor of a table, with its sharding."""
  return jax.tree.map(
    lambda weight, sharding: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=sharding),
    weights, shardings(weights, mesh))


def shardings(weights: dict[str, Any], mesh: Mesh) -> Params:
  """`NamedSharding` of every tensor of a table.

  Raises:
    ValueError: names every tensor with a dimension that its mesh axes do not divide.
  """
  errors = []

  def sharding(path, weight: Weight) -> NamedSharding:
    spec = weight.on(mesh)
    for size, axes in zip(weight.shape, spec, strict=True):
      names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
      if size % math.prod(mesh.shape[name] for name in names):
        over = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
        errors.append(f"{name_of(path)} {weight.shape}: {size} over {over}")
    return NamedSharding(mesh, spec)

  tree = jax.tree_util.tree_map_with_path(sharding, weights)
  if errors:
    raise ValueError("weights do not divide over the mesh: " + "; ".join(errors)
                     + "; change the mesh or the model sizes")
  return tree


def specs(weights: dict[str, Any]) -> Params:
  """`PartitionSpec` of every tensor of a table on the current mesh; P() without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.tree.map(lambda weight: P() if mesh.empty else weight.on(mesh), weights)


def name_of(path) -> str:
  """"blocks/q" for the key path of a tensor."""
  return "/".join(entry.key for entry in path)


def count(config: ModelConfig) -> int:
  """Number of parameters; a tied embedding counts once."""
  return sum(math.prod(weight.shape) for weight in jax.tree.leaves(weight_table(config)))
