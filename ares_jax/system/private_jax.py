"""What the package uses of jax without a public name: the client of its coordination service.

The service connects the processes of a run: a key-value store and barriers that need no device.
tests/system/private_jax_test.py makes every call and says which one a version of jax breaks. The
imports are inside the functions, so that a run of one process does not depend on them.
"""


def coordination_client():
  """The client of this process, after `jax.distributed.initialize`.

  Its calls: key_value_set, key_value_dir_get, blocking_key_value_get, wait_at_barrier.
  """
  from jax._src import distributed
  return distributed.global_state.client


def coordinator_address():
  """HOST:PORT of process 0's service."""
  from jax._src import distributed
  return distributed.global_state.coordinator_address
