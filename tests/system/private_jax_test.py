import pathlib
import socket
import subprocess
import sys

import jax
import pytest

import ares_jax

# A run of one process, since jax starts its coordination service once in a process.
CALLS = '''
import sys
import jax
from ares_jax.system import private_jax

address = f"127.0.0.1:{sys.argv[1]}"
jax.distributed.initialize(address, 1, 0, cluster_detection_method="deactivate")

def check(name, call, expected):
  try:
    found = call()
  except Exception as error:
    found = error
  if found != expected:
    sys.exit(f"{name} gave {found!r} instead of {expected!r}")

def wait_in_vain(name, *arguments):
  try:
    getattr(client, name)(*arguments)
  except jax.errors.JaxRuntimeError as error:
    return "DEADLINE_EXCEEDED" in str(error)

check("coordinator_address", private_jax.coordinator_address, address)
client = private_jax.coordination_client()
check("key_value_set", lambda: client.key_value_set("a/1", "x"), None)
check("allow_overwrite", lambda: client.key_value_set("a/1", "y", allow_overwrite=True), None)
check("key_value_dir_get", lambda: client.key_value_dir_get("a/"), [("a/1", "y")])
check("blocking_key_value_get", lambda: client.blocking_key_value_get("a/1", 1000), "y")
check("its timeout", lambda: wait_in_vain("blocking_key_value_get", "b", 100), True)
check("wait_at_barrier", lambda: client.wait_at_barrier("end", 1000), None)
'''


def test_the_coordination_service_has_the_calls_that_are_used():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  done = subprocess.run([sys.executable, "-c", CALLS, str(port)], text=True, capture_output=True,
                        timeout=300)
  if done.returncode:
    pytest.fail(f"jax {jax.__version__} changed what ares_jax/system/private_jax.py uses: "
                f"{done.stderr[-2000:]}")


def test_no_other_module_uses_private_parts_of_jax():
  package = pathlib.Path(ares_jax.__file__).parent
  assert [path.name for path in package.rglob("*.py") if "jax._src" in path.read_text()] == [
    "private_jax.py"]
