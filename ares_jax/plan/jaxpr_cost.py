"""Counts the FLOPs of a traced program on all devices together, with its loops.

Only matrix products count, 2 FLOPs a multiply-add: everything else is below 1% of a transformer.
Recomputation and padding are included, because the program computes them.
"""

import functools
import math

import numpy as np
from jax.extend import core

# Constants of the program decide how much is computed: which layers attend to whole images, which
# blocks of scores a kernel skips. These operations are evaluated to follow such constants.
LARGEST = 1 << 20  # elements of a constant that is followed
_EVALUATED = {
  "broadcast_in_dim": lambda x, p: np.broadcast_to(x.reshape(
    [x.shape[p["broadcast_dimensions"].index(axis)] if axis in p["broadcast_dimensions"] else 1
     for axis in range(len(p["shape"]))]), p["shape"]),
  "convert_element_type": lambda x, p: x.astype(p["new_dtype"]),
  "copy": lambda x, p: x,
  "reshape": lambda x, p: x.reshape(p["new_sizes"]),
  "squeeze": lambda x, p: np.squeeze(x, p["dimensions"]),
  "stop_gradient": lambda x, p: x,
}


def traced_flops(closed, *, platform):
  """FLOPs of one run of `jit(f).trace(...).jaxpr`, summed over devices.

  A loop that may end early is assumed not to. A conditional whose choice is not known counts its
  larger branch.
  `closed` is a ClosedJaxpr; `platform`, "tpu", "cuda" or "cpu", decides between kernels. Raises
  ValueError if a loop has no visible bound.
  """
  total, _ = _jaxpr(closed.jaxpr, [_value(x) for x in closed.consts],
                    [None] * len(closed.jaxpr.invars), platform)
  return total


def _value(x):
  """A constant as a numpy array; None unless it is small and holds bools or integers."""
  small = hasattr(x, "dtype") and x.size <= LARGEST and x.dtype.kind in "biu"
  return np.asarray(x) if small else None


def _jaxpr(jaxpr, consts, arguments, platform):
  """(FLOPs, values of the results, None if unknown)."""
  total = 0
  known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
  for eqn in jaxpr.eqns:
    cost, outputs = _equation(eqn, [_read(known, x) for x in eqn.invars], platform)
    total += cost
    known |= zip(eqn.outvars, outputs, strict=True)
  return total, [_read(known, variable) for variable in jaxpr.outvars]


def _read(known, variable):
  """The value of a literal, or of a variable if it is known, else None."""
  return np.asarray(variable.val) if isinstance(variable, core.Literal) else known.get(variable)


def _equation(eqn, inputs, platform):
  name, params, unknown = eqn.primitive.name, eqn.params, [None] * len(eqn.outvars)
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(left[axis] for axis in contracted), unknown
  if name in _EVALUATED and inputs[0] is not None and eqn.outvars[0].aval.size <= LARGEST:
    return 0, [_EVALUATED[name](inputs[0], params)]
  if name == "dynamic_slice" and inputs[0] is not None:
    return 0, [_part(inputs[0], inputs[1:], params["slice_sizes"])]
  if name == "scan":
    return _scan(eqn, inputs, platform)
  if name == "while":
    return _while(params, inputs, platform), unknown
  if name == "cond":
    return _cond(params, inputs, platform)
  if name == "pallas_call":
    return _kernel(params, inputs, platform), unknown
  if name == "shard_map":
    return _shard_map(eqn, inputs, platform)
  inner = [value for value in params.values() if isinstance(value, core.ClosedJaxpr | core.Jaxpr)]
  # A function with a custom gradient contains the gradient as a second jaxpr, which is not run.
  if not inner:
    return 0, unknown
  jaxpr, consts = _open(inner[0])
  if len(jaxpr.invars) != len(inputs) or len(jaxpr.outvars) != len(unknown):
    inputs = [None] * len(jaxpr.invars)
    return _jaxpr(jaxpr, consts, inputs, platform)[0], unknown
  return _jaxpr(jaxpr, consts, inputs, platform)


def _part(x, starts, sizes):
  """A `dynamic_slice`; from 0 where a device takes its local part, as all parts decide alike."""
  first = [0 if start is None else int(np.clip(start, 0, length - size))
           for start, length, size in zip(starts, x.shape, sizes, strict=True)]
  return x[tuple(slice(at, at + size) for at, size in zip(first, sizes, strict=True))]


def _open(jaxpr):
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr.jaxpr, [_value(x) for x in jaxpr.consts]
  return jaxpr, []


def _scan(eqn, inputs, platform):
  params = eqn.params
  jaxpr, consts = _open(params["jaxpr"])
  # What is sliced or stacked has one axis more outside than in the body. The parameters that say
  # how many they are have other names in each version of jax.
  stacks = [_stacked(*pair) for pair in zip(eqn.outvars, jaxpr.outvars, strict=True)]
  slices = [_stacked(*pair) for pair in zip(eqn.invars, jaxpr.invars, strict=True)]
  results, carries = sum(stacks), stacks.count(False)
  shared = inputs[:slices.count(False) - carries]
  slices = inputs[slices.count(False):]
  if all(x is None for x in slices):
    once, outputs = _jaxpr(jaxpr, consts, [*shared, *[None] * (carries + len(slices))], platform)
    stacked = [None if x is None else np.broadcast_to(x, (params["length"], *np.shape(x)))
               for x in outputs[carries:]]
    return params["length"] * once, [*[None] * carries, *stacked]
  total, rows = 0, []
  # Results are stacked in the order of the slices, also by a scan that runs backwards.
  for index in range(params["length"]):
    now = [None if x is None else x[index] for x in slices]
    once, outputs = _jaxpr(jaxpr, consts, [*shared, *[None] * carries, *now], platform)
    total, rows = total + once, [*rows, outputs[carries:]]
  stacked = [None if any(row[index] is None for row in rows)
             else np.stack([row[index] for row in rows]) for index in range(results)]
  return total, [*[None] * carries, *stacked]


def _stacked(outside, inside):
  return len(outside.aval.shape) > len(inside.aval.shape)


def _while(params, inputs, platform):
  """FLOPs of the most rounds: the smallest limit that the condition sets on a counter."""
  body, consts = _open(params["body_jaxpr"])
  skip = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
  fixed = inputs[skip[0]:skip[1]]
  once, _ = _jaxpr(body, consts, [*fixed, *[None] * (len(body.invars) - len(fixed))], platform)
  if not once:
    return 0
  condition, consts = _open(params["cond_jaxpr"])
  start = [*inputs[:skip[0]], *inputs[skip[1]:]]
  first = dict(zip((*condition.constvars, *condition.invars), (*consts, *start), strict=True))
  value = functools.partial(_read, first)
  # Under `vmap` each loop has a counter of its own; the largest distance to the limit counts.
  bounds = [int(np.max(value(right) - value(left))) for eqn in condition.eqns
            if eqn.primitive.name == "lt" for left, right in [eqn.invars]
            if left in condition.invars and value(left) is not None and value(right) is not None]
  if not bounds:
    raise ValueError(f"a loop has no visible bound: {params['cond_jaxpr']}")
  return max(0, min(bounds)) * once


def _cond(params, inputs, platform):
  branches = [_open(branch) for branch in params["branches"]]
  chosen = range(len(branches))
  if params.get("branches_platforms") is not None:
    names = params["branches_platforms"]
    chosen = [next((index for index, of in enumerate(names) if of is not None and platform in of),
                   len(names) - 1)]
  elif inputs[0] is not None:
    chosen = [int(np.clip(inputs[0], 0, len(branches) - 1))]
  found = [_jaxpr(*branches[index], inputs[1:], platform) for index in chosen]
  best = max(found, key=lambda part: part[0])
  return best if len(found) == 1 else (best[0], [None] * len(best[1]))


def _kernel(params, inputs, platform):
  jaxpr, consts = _open(params["jaxpr"])
  name = params["name"] or jaxpr.debug_info.func_name
  if name.startswith("paged_"):
    return 0  # lengths that only a run knows say how much it computes
  once, _ = _jaxpr(jaxpr, consts, [None] * len(jaxpr.invars), platform)
  share = 1.0
  if name.startswith("splash_mha"):
    # Operand 1 is nonzero for every block of scores that the kernel computes.
    share = float(np.mean(inputs[1] != 0)) if inputs[1] is not None else 1.0
  return once * math.prod(params["grid_mapping"].grid) * share


def _shard_map(eqn, inputs, platform):
  """FLOPs of all devices, each of which runs the body on its local part."""
  jaxpr, consts = _open(eqn.params["jaxpr"])
  mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
  devices = math.prod(mesh.shape[axis] for axis in manual)
  local = [None if value is None else value[tuple(slice(0, size) for size in variable.aval.shape)]
           for value, variable in zip(inputs, jaxpr.invars, strict=True)]
  once, outputs = _jaxpr(jaxpr, consts, local, platform)
  joined = [None if value is None or variable.aval.size > LARGEST else np.tile(value, [
              size // part for size, part in zip(variable.aval.shape, value.shape, strict=True)])
            for value, variable in zip(outputs, eqn.outvars, strict=True)]
  return devices * once, joined
