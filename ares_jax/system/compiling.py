"""Says on stderr what is compiled before that starts, and adds up the seconds it takes."""

import contextlib
import functools
import sys
import time

import jax

from ares_jax.system import heartbeat

_spent = [0.0]  # seconds of this process


def seconds():
  """Seconds that this process has spent compiling inside `announced`."""
  return _spent[0]


@contextlib.contextmanager
def announced(name):
  """Prints "compiling NAME ..." on process 0; a stop that is requested meanwhile comes at the end.

  Raises heartbeat.StopRequested, before or after what is inside. A collective call.
  """
  heartbeat.heartbeat(collective=True)
  if jax.process_index() == 0:
    # On a terminal the line takes the place of the progress bar, which is drawn anew below it.
    erase = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{erase}compiling {name} ...", file=sys.stderr, flush=True)
  began = time.monotonic()
  try:
    with heartbeat.stops_when(f"{name} is compiled"):
      yield
  finally:
    _spent[0] += time.monotonic() - began
  heartbeat.heartbeat(collective=True)


class Announced:
  """A jitted function, called as before, whose compilations are `announced` by its name."""

  def __init__(self, function):
    functools.update_wrapper(self, function)
    self._function = function
    self._compiled = set()  # kinds of arguments for which jax has a program

  def __call__(self, *arguments, **keywords):
    leaves, structure = jax.tree.flatten((arguments, keywords))
    kind = structure, *map(_kind, leaves)
    if kind not in self._compiled and not any(isinstance(x, jax.core.Tracer) for x in leaves):
      with announced(self.__name__ + (" for other shapes" if self._compiled else "")):
        self._function.lower(*arguments, **keywords).compile()  # jax keeps the program for the call
      self._compiled.add(kind)
    return self._function(*arguments, **keywords)

  def __getattr__(self, name):
    return getattr(self._function, name)  # lower, trace, ...


def _kind(leaf):
  """What jax compiles for: an array's type and its part on a device, or the value of a setting."""
  if not hasattr(leaf, "dtype"):
    return leaf
  weak = getattr(getattr(leaf, "aval", None), "weak_type", False)
  sharding = getattr(leaf, "sharding", None)
  # Specs such as P() and P(None), or P("data") of one device, are different and mean the same.
  part = sharding and (sharding.shard_shape(leaf.shape), sharding.num_devices)
  return leaf.shape, leaf.dtype, weak, part
