"""Low-rank adapters: matrices W of the decoder become W + s A B, and only A and B are trained.

LoRA, arXiv 2106.09685, s = alpha / rank. Adapters are a separate tree, {target: {"a", "b"}}: state,
gradients, moments and checkpoints hold nothing else. The base weights are frozen, shared by policy,
reference and rollouts, and kept in the compute dtype, to which the model casts them anyway.

Policy and rollouts compute x W + (x A)(s B) and never add A B to W: in bfloat16 a small A B would
vanish in the rounding of W, and the policy that samples would differ from the trained one.
L layers, r rank; A is [L, inputs..., r], B is [L, r, outputs...].
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ares_jax.models import weights
from ares_jax.models.config import ModelConfig
from ares_jax.models.weights import Params, Weight

# Matrices of a decoder block that can have adapters, and how many of their dimensions are inputs.
TARGETS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Size of the adapters; with adapters all weights are frozen, the vision tower too."""

  rank: int  # r; 0 = no adapters, the weights are trained
  alpha: float  # s = alpha / rank
  targets: tuple[str, ...]  # matrices of each decoder block that have adapters, of TARGETS

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"rank = {self.rank} must be >= 0 (0 trains the weights)")
    if not 0 < self.alpha < float("inf"):
      raise ValueError(f"alpha = {self.alpha} must be finite and > 0")
    if not self.targets or len(set(self.targets) & set(TARGETS)) < len(self.targets):
      raise ValueError(f"targets = {self.targets}: name one or more of {', '.join(TARGETS)}, each "
                       "once")


@flax.struct.dataclass
class Base:
  """The frozen weights that adapters belong to."""

  weights: Params  # compute dtype
  scale: float = flax.struct.field(pytree_node=False)  # s


def adapter_table(config: ModelConfig, lora: LoraConfig) -> dict[str, dict[str, Weight]]:
  """Shape, sharding and initialisation of the adapters, sharded over the mesh like their matrices.

  B starts at 0, so that the first policy is exactly the base.
  """
  blocks = weights.weight_table(config)["blocks"]
  return {name: _pair(blocks[name], TARGETS[name], lora.rank) for name in lora.targets}


def _pair(matrix, inputs, rank):
  cut = 1 + inputs  # the layer axis stands before the inputs
  width = math.prod(matrix.shape[1:cut])
  return {"a": Weight((*matrix.shape[:cut], rank), P(*matrix.spec[:cut], None), width**-0.5),
          "b": Weight((matrix.shape[0], rank, *matrix.shape[cut:]),
                      P(None, None, *matrix.spec[cut:]), "zeros")}


def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
  """Initial adapters, float32, on the current mesh."""
  found = adapter_table(config, lora)
  shardings = weights.shardings(found, jax.sharding.get_mesh())
  return jax.jit(functools.partial(weights.init, found), out_shardings=shardings)(key)


def abstract(config: ModelConfig, lora: LoraConfig, mesh) -> Params:
  """`jax.ShapeDtypeStruct` of the adapters with their shardings, float32."""
  return weights.abstract(adapter_table(config, lora), mesh, jnp.float32)


def join(base: Base | None, trained: Params) -> Params:
  """The weights of a policy from `trained`, adapters of `base` or the weights; differentiable.

  Returns:
    Weights for every function of the model: those of the base, without a copy, and "NAME_lora", A
    and s B, beside each matrix NAME of a block that has an adapter.
  """
  if base is None:
    return trained
  return attach(base.weights, {name: {"a": pair["a"], "b": pair["b"] * base.scale}
                               for name, pair in trained.items()})


def attach(params: Params, pairs: Params) -> Params:
  """`params` with the pairs A, s B in its blocks; for arrays and for their shapes."""
  named = {_key(name): pair for name, pair in pairs.items()}
  return params | {"blocks": params["blocks"] | named}


def merge(base: Base | None, trained: Params) -> Params:
  """Weights without adapters: W + s A B, summed in float32 and cast to the base's dtype."""
  if base is None:
    return trained
  blocks = dict(base.weights["blocks"])
  for name, pair in trained.items():
    blocks[name] = _merged(blocks[name], pair["a"], pair["b"], base.scale)
  return base.weights | {"blocks": blocks}


@jax.jit
def _merged(matrix, a, b, scale):
  product = jax.vmap(functools.partial(jnp.tensordot, axes=1))(a, scale * b)
  return (matrix.astype(jnp.float32) + product).astype(matrix.dtype)


def specs(config: ModelConfig, base: Base | None, trained: Params) -> Params:
  """`PartitionSpec` of every array in `trained`: weights, or adapters of `base`."""
  if base is None:
    return weights.specs(weights.weight_table(config))
  return _specs(config, trained)


def joined_specs(config: ModelConfig, params: Params) -> Params:
  """`PartitionSpec` of every array in a result of `join`."""
  found = weights.specs(weights.weight_table(config))
  pairs = _specs(config, [name for name in TARGETS if _key(name) in params["blocks"]])
  return found | {"blocks": found["blocks"] | {_key(name): pairs[name] for name in pairs}}


def _specs(config, names):
  if not names:
    return {}
  return weights.specs(adapter_table(config, LoraConfig(rank=1, alpha=1.0, targets=tuple(names))))


def trained_frozen(base: Base | None, frozen: tuple[str, ...]) -> tuple[str, ...]:
  """The parts of the trained tree that a config freezes; none with adapters."""
  return frozen if base is None else ()


def _key(name):
  return f"{name}_lora"
