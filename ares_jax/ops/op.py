"""Makes an op of a function of arrays: it is jitted, and also takes lists and numpy scalars.

Settings (`static`) are compiled in: they must be Python values, and each new one compiles again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def op(function=None, *, static=()):
  """`jax.jit` for a function of the library.

  Args:
    function: arrays first, settings by keyword alone.
    static: names of its settings. A numpy or jax scalar given for one becomes a Python number.

  Returns:
    The jitted function. Lists and tuples given for arrays become arrays; a setting that is traced,
    or is an array of several numbers, is a ValueError.
  """
  if function is None:
    return functools.partial(op, static=static)
  jitted = jax.jit(function, static_argnames=static)

  @functools.wraps(function)
  def call(*arrays, **named):
    return jitted(*map(_array, arrays), **{
      name: _setting(name, value) if name in static else _array(value)
      for name, value in named.items()})

  return call


def check_three(**arrays):
  """Raises ValueError naming an array that has not one value for each bucket."""
  for name, array in arrays.items():
    if array.shape != (3,):
      raise ValueError(f"{name} has shape {array.shape}; pass [3]: easy, medium, hard")


def _array(value):
  return jnp.asarray(value) if isinstance(value, (list, tuple)) else value


def _setting(name, value):
  if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
    return value
  if isinstance(value, jax.core.Tracer) or value.size != 1:
    raise ValueError(f"{name} = {value} must be a Python number: it is compiled in, so inside "
                     "jax.jit make it a static argument")
  return value.item()
