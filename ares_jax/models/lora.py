"""Low-rank adapters: matrices W of the decoder become W + s A B, and A and B alone are trained.

LoRA, arXiv 2106.09685, s = alpha / rank. Adapters are a tree of their own, {target: {"a", "b"}}:
state, gradients, moments and checkpoints hold them and nothing else. The weights under them, the
base, are frozen, shared by policy, reference and rollouts, and kept in the compute dtype: the model
casts them to it anyway, so nothing is lost.

Policy and rollouts compute x W + (x A)(s B) and never add A B to W: in bfloat16 a small A B would
round to nothing against W, and rollouts would come from another policy than the trained one.
L layers, r rank; A has the matrix's input dimensions and r, B has r and its output dimensions.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ares_jax.models import weights
from ares_jax.models.config import ModelConfig
from ares_jax.models.weights import Params, Weight

# Matrices of a decoder block, and how many of their dimensions a product contracts.
TARGETS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What is trained in place of the weights; the vision tower is frozen then."""

  rank: int  # r; 0 = none: the weights themselves are trained
  alpha: float  # s = alpha / rank
  targets: tuple[str, ...]  # matrices of each decoder block, of TARGETS

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"rank = {self.rank} must be >= 0 (0 trains the weights themselves)")
    if not 0 < self.alpha < float("inf"):
      raise ValueError(f"alpha = {self.alpha} must be finite and > 0")
    if not self.targets or len(set(self.targets) & set(TARGETS)) < len(self.targets):
      raise ValueError(f"targets = {self.targets}: name one or more of {', '.join(TARGETS)}, each "
                       "once")


@flax.struct.dataclass
class Base:
  """The frozen weights under adapters."""

  weights: Params  # compute dtype
  scale: float = flax.struct.field(pytree_node=False)  # s


def adapter_table(config: ModelConfig, lora: LoraConfig) -> dict[str, dict[str, Weight]]:
  """Shape, sharding and initialisation of the adapters, split over the mesh as their matrices are:
  a part that has only the heads of its matrix is whole where "model" does not divide them.

  B starts at 0: the first policy is the base, exactly.
  """
  blocks = weights.weight_table(config)["blocks"]
  return {name: _pair(blocks[name], TARGETS[name], lora.rank) for name in lora.targets}


def _pair(matrix, inputs, rank):
  cut = 1 + inputs  # the layer axis stands before the inputs
  width = 1
  for size in matrix.shape[1:cut]:
    width *= size
  return {"a": Weight((*matrix.shape[:cut], rank), P(*matrix.spec[:cut], None), width**-0.5),
          "b": Weight((matrix.shape[0], rank, *matrix.shape[cut:]),
                      P(None, None, *matrix.spec[cut:]), "zeros")}


def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
  """First adapters, float32, on the current mesh."""
  found = adapter_table(config, lora)
  return jax.jit(functools.partial(weights.draw, found), out_shardings=weights.layout(
    found, jax.sharding.get_mesh()))(key)


def abstract(config: ModelConfig, lora: LoraConfig, mesh) -> Params:
  """`jax.ShapeDtypeStruct` of the adapters with their shardings, float32."""
  return weights.abstract_table(adapter_table(config, lora), mesh, jnp.float32)


def join(base: Base | None, trained: Params) -> Params:
  """The weights of a policy from what is trained of it; differentiable.

  Args:
    base: None where `trained` are the weights themselves.
    trained: adapters of `base`.

  Returns:
    Weights for every function of the model: those of the base, blocks with a pair "NAME_lora" where
    matrix NAME is adapted. Nothing of the base is copied.
  """
  if base is None:
    return trained
  return attach(base.weights, {name: {"a": pair["a"], "b": pair["b"] * base.scale}
                               for name, pair in trained.items()})


def attach(params: Params, pairs: Params) -> Params:
  """`params` whose blocks have the pairs A, s B; of arrays or of their shapes."""
  named = {_key(name): pair for name, pair in pairs.items()}
  return params | {"blocks": params["blocks"] | named}


def merge(base: Base | None, trained: Params) -> Params:
  """Weights without adapters: W + s A B, summed in float32 and rounded once to the base's dtype."""
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
  """`PartitionSpec` of everything in `trained`: weights, or adapters of `base`."""
  if base is None:
    return weights.specs(weights.weight_table(config))
  return _specs(config, trained)


def joined_specs(config: ModelConfig, params: Params) -> Params:
  """`PartitionSpec` of everything in what `join` returned."""
  found = weights.specs(weights.weight_table(config))
  pairs = _specs(config, [name for name in TARGETS if _key(name) in params["blocks"]])
  return found | {"blocks": found["blocks"] | {_key(name): pairs[name] for name in pairs}}


def _specs(config, names):
  found = adapter_table(config, LoraConfig(rank=1, alpha=1.0,
                                           targets=tuple(names))) if names else {}
  return weights.specs(found)


def trained_frozen(base: Base | None, frozen: tuple[str, ...]) -> tuple[str, ...]:
  """Of the parts that a config freezes, those that are in what is trained: of adapters none."""
  return frozen if base is None else ()


def _key(name):
  return f"{name}_lora"
