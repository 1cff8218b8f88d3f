"""AdamW, its learning rate, and the update that a non-finite gradient skips.

The learning rate is an argument of `apply_update`, not part of the transformation: it may be
traced, and no schedule counts steps.

Master weights are float32. Moments take 8 bytes a weight in float32, 6 with the first in bfloat16,
and little over 2 with the second also factored into means over rows and columns (Adafactor, arXiv
1804.04235). There is no second moment in bfloat16: at b2 = 0.999 it moves by 0.1% a step, and
bfloat16 rounds changes below 0.2% away, so it would never fall.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from ares_jax.models import lora
from ares_jax.system import compiling, mesh


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its schedule; every field is required."""

  learning_rate: float  # peak
  schedule: Literal["constant", "cosine"]  # after the warm-up
  warmup_steps: int  # linear from 0; 0 = none; in stage 2 iterations
  final_fraction: float  # cosine: rate at the last step over the peak
  b1: float
  b2: float
  eps: float
  weight_decay: float  # decoupled: times the learning rate
  clip: float  # global norm of the gradient; inf = no clipping
  moments: Literal["float32", "bfloat16", "factored"]  # bfloat16: the first; factored: second, too

  def __post_init__(self):
    for name, valid, needed in (
        ("learning_rate", 0 <= self.learning_rate < float("inf"), "finite and >= 0"),
        ("warmup_steps", self.warmup_steps >= 0, ">= 0"),
        ("final_fraction", 0 <= self.final_fraction <= 1, "in [0, 1]"),
        ("b1", 0 <= self.b1 < 1, "in [0, 1)"), ("b2", 0 <= self.b2 < 1, "in [0, 1)"),
        ("eps", self.eps > 0, "> 0"), ("weight_decay", self.weight_decay >= 0, ">= 0"),
        ("clip", self.clip > 0, "> 0 (inf = no clipping)")):
      if not valid:
        raise ValueError(f"{name} is {getattr(self, name)}; must be {needed}")


def learning_rate(config, step, total):
  """The rate, float32, at `step` (0 = the first) of `total`; both may be traced.

  A step is an update of stage 1, or an iteration of stage 2, whose minibatches share one rate.
  During the warm-up the rate is peak (step + 1) / warmup_steps, then constant or a cosine from the
  peak to peak * final_fraction at `total`.
  """
  step, total = jnp.float32(step), jnp.float32(total)
  warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
  if config.schedule == "constant":
    return config.learning_rate * warmup
  # A run shorter than its warm-up has no cosine part: the maximum keeps the division defined.
  length = jnp.maximum(total - config.warmup_steps, 1.0)
  progress = jnp.clip((step - config.warmup_steps) / length, 0.0, 1.0)
  cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
  return config.learning_rate * warmup * (
    config.final_fraction + (1 - config.final_fraction) * cosine)


def stage_optimizer(config, params, base=None):
  """The optimizer of an AepoConfig or SftConfig, with the parts of `params` frozen that it names.

  `params` are weights, or adapters of the lora.Base `base`.

  Raises:
    ValueError: the config freezes a part that the weights do not have.
  """
  frozen = lora.trained_frozen(base, config.frozen)
  unknown = sorted({*frozen} - {*params, "vision"})  # a text model has no tower to freeze
  if unknown:
    raise ValueError(f"frozen parts {unknown} are not in the params; known: {', '.join(params)}")
  trained = {name: jax.tree.map(lambda _, on=name not in frozen: on, part)
             for name, part in params.items()}
  return make_optimizer(config.optimizer, trained=trained)


def make_optimizer(config, *, trained=None):
  """AdamW without its learning rate, for `apply_update`: clip, Adam moments, decoupled decay.

  Where `trained`, a tree of bools like the params, is False, a leaf is frozen: it gets no moments
  and no update and has no part in clipping. None trains all.
  """
  chain = optax.chain(optax.clip_by_global_norm(config.clip), _moments(config),
                      optax.add_decayed_weights(config.weight_decay))
  if trained is None:
    return chain
  frozen = jax.tree.map(lambda leaf: not leaf, trained)
  return optax.chain(optax.masked(optax.set_to_zero(), frozen), optax.masked(chain, trained))


def _moments(config):
  """Scales a gradient by its root mean square and averages it, with either kind of moments."""
  if config.moments != "factored":
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moments)
  # Adafactor's decay rate rises to 1; capped at b2 it ends as Adam's.
  factored = optax.scale_by_factored_rms(
    epsilon=config.eps**2,
    decay_rate_fn=lambda step, _: jnp.minimum(config.b2, 1 - (step + 1.0) ** -0.8))
  return optax.chain(factored, optax.ema(config.b1, accumulator_dtype=jnp.bfloat16))


def init_opt_state(tx, params):
  """First state of `tx`, sharded like the weights, which are on a mesh."""
  init = _sharded_init(tx, params)
  with compiling.announced("the optimizer's first state"):
    return init(params)


def abstract_opt_state(tx, params):
  """The shapes of `init_opt_state`, laid out like `params`, which are shapes on a mesh."""
  return _sharded_init(tx, params).eval_shape(params)


def _sharded_init(tx, params):
  """`tx.init`, jitted; it lays moments out like their parameters and replicates the rest.

  The means of a factored moment are small and replicated too. Without `out_shardings` the moments
  would be replicated under Auto axes.
  """
  shardings = jax.tree.map(lambda x: x.sharding, params)
  replicated = jax.tree.leaves(shardings)[0]
  if isinstance(replicated, jax.sharding.NamedSharding):
    replicated = jax.sharding.NamedSharding(replicated.mesh, jax.sharding.PartitionSpec())
  found = []
  # Inside a trace, because optax makes small arrays, which described devices cannot hold.
  jax.eval_shape(lambda: found.append(_map_state(
    tx, lambda leaf, sharding: replicated if sharding is None else sharding,
    jax.eval_shape(tx.init, params), params, shardings)))
  return jax.jit(tx.init, out_shardings=found[0])


def keep_layout(tx, params, opt_state, specs):
  """Constrains weights and moments, at the end of a jitted step, to the weights' PartitionSpecs.

  Without constraints the compiler chooses the layout of the results, and the next call compiles
  again.
  """
  opt_state = _map_state(tx, lambda leaf, spec: mesh.shard(leaf, *(spec or ())), opt_state, params,
                         specs)
  return jax.tree.map(lambda leaf, spec: mesh.shard(leaf, *spec), params, specs), opt_state


def _map_state(tx, function, state, params, layouts):
  """`function` of every leaf of `tx`'s state and its layout: a parameter's for its moment, or None.

  Counts and the means of factored moments have no parameter's shape and so no layout.
  """
  def of_moment(leaf, param, layout):
    # A frozen leaf has no moments but an empty MaskedNode, which stays as it is.
    if isinstance(leaf, optax.MaskedNode):
      return leaf
    return function(leaf, layout if leaf.shape == param.shape else None)

  return optax.tree_utils.tree_map_params(
    tx, of_moment, state, params, layouts, transform_non_params=lambda leaf: function(leaf, None),
    is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))


def apply_update(tx, grads, opt_state, params, rate, valid=True):
  """Applies one update, or none if the gradient or its squares are not finite, or not `valid`.

  `grads` have any float dtype.

  Returns:
    params, opt_state: unchanged bit for bit (moments and count too) without an update.
    metrics: grad_norm float32 [] (before clipping), skipped float32 [] (0 or 1).

  Raises:
    ValueError: a parameter is not float32; moments and updates in bfloat16 lose small steps.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if leaf.dtype != jnp.float32:
      raise ValueError(f"params{jax.tree_util.keystr(path)} is {leaf.dtype}; master weights must "
                       "be float32")
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  grad_norm = optax.tree_utils.tree_norm(grads)
  finite = jnp.isfinite(grad_norm) & valid
  # Not optax.apply_if_finite: with a limit of N it applies the (N+1)th NaN.
  updates, new_state = tx.update(grads, opt_state, params)
  new_params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
  params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old),
                                   (new_params, new_state), (params, opt_state))
  return params, opt_state, {"grad_norm": grad_norm, "skipped": 1.0 - finite.astype(jnp.float32)}
