import functools
import os
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ares_jax.system import compiling, heartbeat, mesh


def announced_double():
  @compiling.Announced
  @functools.partial(jax.jit, static_argnames="times", donate_argnames="x")
  def double(x, *, times):
    return x * 2**times

  return double


def compilations(call):
  """How often XLA compiled the function `double` during a call."""
  found = []
  def listen(name, seconds, fun_name="", **_):
    if "backend_compile" in name and "double" in fun_name:
      found.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    call()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return len(found)


def test_each_new_shape_or_setting_is_announced_once_and_compiled_once(capfd):
  double, counts = announced_double(), []
  for size, times in ((3, 1), (3, 1), (4, 1), (3, 2), (4, 1)):
    counts.append(compilations(functools.partial(double, jnp.ones(size), times=times)))
  assert counts == [1, 0, 1, 1, 0]
  assert capfd.readouterr().err.splitlines() == [
    "compiling double ..."] + 2 * ["compiling double for other shapes ..."]


def test_weak_types_are_compiled_anew_and_other_words_for_a_layout_are_not(capfd):
  double = announced_double()
  layouts = [jax.NamedSharding(mesh.make_mesh(1, 1, jax.devices()[:1]), jax.P(*spec))
             for spec in ((), (None,), ("data",))]
  calls = [jnp.full(3, 2), jnp.full(3, 2, jnp.int32)]
  calls += [jax.device_put(np.ones(3, np.int8), layout) for layout in layouts]
  assert [compilations(functools.partial(double, x, times=1)) for x in calls] == [1, 1, 1, 0, 0]
  assert capfd.readouterr().err.count("compiling") == 3


def test_an_announced_function_can_be_traced_like_any_other(capfd):
  double = announced_double()
  assert float(jax.jit(lambda x: double(x, times=1))(3.0)) == 6
  assert double.lower(jnp.ones(3), times=1).out_info.shape == (3,)
  assert not capfd.readouterr().err


def test_only_process_0_announces(capfd, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  announced_double()(jnp.ones(3), times=1)
  assert not capfd.readouterr().err


def test_the_seconds_of_compiling_are_added_up(monkeypatch):
  before = compiling.seconds()
  clock = iter([10.0, 13.5])
  monkeypatch.setattr(compiling, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
  monkeypatch.setattr(heartbeat, "heartbeat", lambda **_: None)
  with compiling.announced("nothing"):
    pass
  assert compiling.seconds() == before + 3.5


def test_a_stop_while_compiling_comes_when_it_ends_and_says_so(capfd):
  ran = []

  class Interrupted:
    """Stands for a jitted function that is compiled when SIGTERM comes."""

    __name__ = "sft_step"

    def lower(self):
      os.kill(os.getpid(), signal.SIGTERM)
      return self

    def compile(self):
      time.sleep(0.3)  # the message comes from another thread

    def __call__(self):
      ran.append(1)

  with heartbeat.stop_signals():
    with pytest.raises(heartbeat.StopRequested):
      compiling.Announced(Interrupted())()
    with pytest.raises(heartbeat.StopRequested), compiling.announced("decode"):
      ran.append(2)  # nothing else is compiled after the stop
  assert not ran
  err = capfd.readouterr().err
  assert "stopping when sft_step is compiled; once more ends at once" in err
  assert "compiling decode" not in err
