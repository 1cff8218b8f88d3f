import subprocess
import sys

import pytest

import ares_jax
import ares_jax.ops


def loaded_after(statement):
  """The top-level modules that a fresh interpreter holds after `statement`."""
  code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
  )
  return set(result.stdout.split())


def test_importing_it_loads_no_framework():
  heavy = {"jax", "tensorflow", "transformers", "torch", "flax", "optax"}
  assert not heavy & loaded_after("import ares_jax")
  assert not heavy & loaded_after("from ares_jax.system import heartbeat")


def test_the_ops_need_jax_and_none_of_the_others():
  loaded = loaded_after("import ares_jax\nares_jax.ops.window_entropy, ares_jax.window_entropy")
  assert "jax" in loaded
  assert not {"tensorflow", "transformers", "torch", "flax", "optax"} & loaded


def test_every_op_is_a_name_of_the_package():
  assert set(ares_jax.ops.__all__) <= set(dir(ares_jax))
  for name in ares_jax.ops.__all__:
    assert getattr(ares_jax, name) is getattr(ares_jax.ops, name)
  names = {}
  exec("from ares_jax import *", names)
  assert names["window_entropy"] is ares_jax.ops.window_entropy


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="has no attribute 'window_entrop'"):
    ares_jax.window_entrop  # noqa: B018
  with pytest.raises(ImportError, match="window_entrop"):
    exec("from ares_jax import window_entrop")
